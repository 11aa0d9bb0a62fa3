"""A search says in its log when its grades can teach it nothing."""

from io import StringIO

import pytest
from search_tools import QualityJudge, TaskEngine, make_search, make_study

from evomerge.answering.engine import Answer
from evomerge.console import Console
from evomerge.judging.grade import Grade


class Cut(TaskEngine):
    """No answer ends by itself."""

    def answer(self, *arguments, **named):
        return [Answer(a.text, True, a.tokens) for a in super().answer(*arguments, **named)]


class Constant(QualityJudge):
    """Every answer gets 3."""

    def grade(self, task, answer):
        return Grade(3.0, None, "as always")


class Deaf(QualityJudge):
    """The grade is the task's, whatever the answer."""

    def grade(self, task, answer):
        return Grade(1.0 + int(task.task_id) % 4, None, "not read")


def log_of(folder, engine=None, judge=None, **search):
    stream = StringIO()
    study = make_study(trials=24, **search)
    make_search(folder, study, engine, judge, console=Console(stream))[0].run()
    return [line for line in stream.getvalue().splitlines() if line.startswith("warning: ")]


@pytest.mark.parametrize("ranking", ["all", "subset"])
def test_what_can_be_learned_from_brings_no_warning(tmp_path, ranking):
    assert log_of(tmp_path, ranking=ranking) == []


def test_answers_that_are_all_cut_off_are_told_once(tmp_path):
    (line,) = log_of(tmp_path, Cut())
    assert "100% of the answers of the parents and uniform weights were cut off" in line
    assert "generation.max_new_tokens" in line


def test_constant_grades_are_told_once(tmp_path):
    (line,) = log_of(tmp_path, judge=Constant())
    assert "has the same grade, 3" in line


@pytest.mark.parametrize("ranking", ["all", "subset"])
def test_equal_scores_are_told_once(tmp_path, ranking):
    (line,) = log_of(tmp_path, judge=Deaf(), ranking=ranking)
    assert "all have the same score" in line


def test_equal_candidates_are_told_where_the_references_differ(tmp_path):
    class Flat(TaskEngine):
        def apply(self, recipe):
            super().apply(recipe)
            if len(set(self.vector.tolist())) > 1:  # a candidate
                self.vector[:] = 1.0
                self.name = "the same"

    (line,) = log_of(tmp_path, Flat())
    assert "the candidates of generation 1 all have the same score" in line
