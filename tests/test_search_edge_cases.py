"""A search at its limits: no candidate, fixed failures, small splits, killed verdicts, changed
files.
"""

import json
import re
from contextlib import suppress
from io import StringIO

import numpy as np
import pytest
from pydantic import ValidationError
from search_tools import LAYERS, Cut, QualityJudge, TaskEngine, make_search, make_study

from evomerge.console import Console
from evomerge.errors import EngineError, EvomergeError, InputError, StudyError, StudyFileError
from evomerge.genome.genome import make_genome
from evomerge.judging.grade import Grade
from evomerge.recipe import Recipe
from evomerge.reporting.sentences import notes
from evomerge.searching.choosing import choose
from evomerge.searching.history import History
from evomerge.searching.open_search import open_search
from evomerge.searching.preflight import check_study
from evomerge.searching.samplers.make_sampler import make_sampler
from evomerge.searching.starting.known_candidates import encode
from evomerge.searching.starting.source_study import start_from_source
from evomerge.study import JudgeSection, TaskSource, read_study


def candidates(search):
    return [r for r in search.ledger.records() if r.role == "candidate"]


def right_or_wrong(study):
    return study.replace(judge=JudgeSection(kind="rules", metric="correct"))


class ClosedJudge(QualityJudge):
    """Only tasks whose number `closed` says are right or wrong."""

    def __init__(self, closed):
        super().__init__()
        self.closed = closed

    def grade(self, task, answer):
        grade = super().grade(task, answer)
        return Grade(
            grade.value, grade.value > 3 if self.closed(int(task.task_id)) else None, "as it says"
        )


def test_a_search_continues_once_the_cause_of_its_failures_is_fixed(tmp_path):
    class Broken(TaskEngine):
        def answer(self, prompts, settings=None, on_answer=None, deadline=None):
            if not np.allclose(self.vector, self.vector[0]):
                raise EngineError("no memory")
            return super().answer(prompts)

    with pytest.raises(EngineError, match="in a row failed"):
        make_search(tmp_path, make_study(trials=8), Broken())[0].run()
    search, _, _ = make_search(tmp_path, make_study(trials=8))
    assert search.run().n == 16


@pytest.mark.parametrize("validation", [0.0, 0.2])
def test_a_limit_that_the_references_use_up_is_told_in_a_line(tmp_path, validation):
    search, _, _ = make_search(
        tmp_path,
        make_study(trials=8, time_limit="0.0001s", validation=validation),
        tasks=(24, 8, 8),
    )
    with pytest.raises(EvomergeError, match="candidate"):
        search.run()


def test_a_second_verdict_that_was_killed_is_made_again(tmp_path):
    first = make_search(tmp_path, make_study(trials=8))[0].run()
    for key in ("finalists", "verdict", "look"):
        search, _, _ = make_search(tmp_path, make_study(trials=24))
        remember = search.ledger.remember

        def killed(name, value, remember=remember, key=key):
            if name == key:
                raise Cut
            remember(name, value)

        search.ledger.remember = killed
        with suppress(Cut):
            search.run()
    search, _, _ = make_search(tmp_path, make_study(trials=24))
    verdict = search.run()
    assert verdict != first, "the old winner's verdict"
    assert "have now been used 2 times" in " ".join(notes(search.ledger.facts))


def test_a_failure_in_a_later_block_of_a_race_counts(tmp_path):
    study = make_study(ranking="race", subset=16, trials=8)
    sampler = make_sampler(study, make_genome(study, LAYERS))
    doomed = sampler.draw(History(), sampler.slot(History(), 0, 3))

    class Late(TaskEngine):
        first = None

        def answer(self, prompts, settings=None, on_answer=None, deadline=None):
            if np.allclose(self.vector, doomed, atol=1e-3):
                Late.first = Late.first or tuple(prompts)
                if tuple(prompts) != Late.first:
                    raise EngineError("out of memory with a long prompt")
            return super().answer(prompts)

    search, _, _ = make_search(tmp_path, study, Late())
    search.run()
    assert [r.index for r in candidates(search) if r.state == "failed"] == [3]


@pytest.mark.parametrize("ranking", ["subset", "race"])
def test_few_closed_tasks_are_enough_for_every_generation(tmp_path, ranking):
    study = right_or_wrong(make_study(trials=24, ranking=ranking, subset=4))
    search, _, _ = make_search(tmp_path, study, judge=ClosedJudge(lambda i: i % 5 == 0))
    search.run()
    assert all(r.n >= 2 for r in candidates(search)), "one task has no standard error"


def test_a_validation_split_without_closed_tasks_is_never_used_silently(tmp_path):
    study = right_or_wrong(make_study(trials=8, validation=0.2))
    search, _, _ = make_search(
        tmp_path, study, judge=ClosedJudge(lambda i: i < 40), tasks=(24, 16, 8)
    )
    with suppress(StudyFileError):  # refused in a line, or chosen by the search tasks
        search.run()
    assert "NaN" not in json.dumps(search.ledger.storage.attributes().get("validation"))


def test_two_tasks_do_not_make_a_trial_beat_the_mean():
    assert choose({"5": {"a": 4, "b": 3}, "mean": {"a": 3, "b": 2}}) == "mean"
    rng, lost = np.random.default_rng(0), 0
    for _ in range(1000):
        level = rng.uniform(1.5, 4.5, 3)
        drawn = {
            k: np.clip(np.round(level + 0.9 * rng.standard_normal(3)), 1, 5)
            for k in ("1", "2", "3", "mean")
        }
        lost += (
            choose({k: {str(i): float(x) for i, x in enumerate(v)} for k, v in drawn.items()})
            != "mean"
        )
    assert lost <= 30, "three standard errors are one in 700 for each"


@pytest.mark.parametrize("source", ["a/b", "../x", "second"])
def test_a_source_study_that_cannot_be_one_is_refused(tmp_path, source):
    with pytest.raises(ValidationError, match="source_study"):
        make_study("second", source_study=source)
    # nor where it was not validated
    study = make_study("second")
    section = study.search.model_copy(update={"source_study": source})
    study = study.model_copy(update={"search": section})
    search, _, _ = make_search(tmp_path, study)
    with pytest.raises(EvomergeError):
        start_from_source(study, f"sqlite:///{tmp_path}/second.db", search.genome, search.ledger)


@pytest.mark.parametrize(
    "change",
    [
        {"base_model": "stranger"},
        {"parameters": {"normalize": True}},
        {"parameters": {"lambda": 0.5}},
    ],
)
def test_a_recipe_that_merges_otherwise_is_no_first_candidate(change):
    sibling = {"model": "sibling", "parameters": {"weight": 0.7}}
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "dtype": "float32",
        "models": [sibling],
    } | change
    with pytest.raises(StudyFileError):
        encode(make_genome(make_study(), LAYERS), Recipe.from_dict(recipe), "x")


def test_a_first_candidate_that_changed_is_refused(pair, tmp_path):
    study = read_study(pair / "study.yaml")
    genome, path = make_genome(study, LAYERS), tmp_path / "known.yaml"
    study = read_study(pair / "study.yaml", [f"search.recipes=[{path}]"])
    url = f"sqlite:///{tmp_path}/s.db"
    path.write_text(genome.decode([0.5] * 4).to_yaml(), encoding="utf-8")
    with open_search(study, url, Console(StringIO())) as search:
        trial = search.ledger.start("candidate", [0.5] * 4, 0, 0)
        search.ledger.storage.end_trial(trial.number, "result", {"n": 1}, 1.0)
    path.write_text(genome.decode([0.6] * 4).to_yaml(), encoding="utf-8")
    with pytest.raises(StudyError, match="recipes"), open_search(study, url, Console(StringIO())):
        pass


def test_differences_in_difficulty_are_not_noise_between_generations(tmp_path):
    class Uneven(QualityJudge):
        def grade(self, task, answer):
            return Grade(
                float(re.search(r"quality (\S+)", answer.text)[1]) - int(task.task_id) % 4,
                None,
                "as it says",
            )

    study = make_study(trials=80, patience=3, lr_adapt=False, sigma=0.15)
    search, _, _ = make_search(tmp_path, study, TaskEngine(noise=0.05), judge=Uneven())
    search.run()
    assert len(candidates(search)) == 80, (
        "each three generations are better than those before them, to the last"
    )


def test_the_error_of_weighted_sources_is_that_of_their_means(tmp_path):
    study = make_study(
        trials=8, sources=(TaskSource(file="a", weight=9.0), TaskSource(file="b", weight=1.0))
    )
    search, _, _ = make_search(tmp_path, study, TaskEngine(noise=0.2))
    verdict = search.run()
    for r in candidates(search):
        groups = [
            [g.grade for task, g in r.grades.items() if task.startswith(f"{i}-")] for i in range(2)
        ]
        errors = [
            w**2 * np.var(g, ddof=1) / len(g) for w, g in zip((0.9, 0.1), groups, strict=True)
        ]
        assert r.stderr == pytest.approx(np.sqrt(sum(errors)), rel=0.1)
    assert verdict.candidates["winner"].stderr < 0.2


def test_check_counts_what_a_search_has(pair):
    lines = {line.subject: line for line in check_study(read_study(pair / "study.yaml"))}
    assert lines["tasks"].text.startswith("16 to search on")
    grows = {
        line.subject: line
        for line in check_study(read_study(pair / "study.yaml", ["search.subset=4"]))
    }
    assert "at least" in grows["cost"].text, (
        "with learning-rate adaptation the step size shrinks too"
    )


def test_check_finds_a_split_that_the_search_refuses(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"input": "a"}\n{"input": "b"}\n', encoding="utf-8")
    (tmp_path / "s.yaml").write_text(
        "genome: {base_model: /b, models: [/a]}\ntasks: [{file: t.jsonl}]\n", encoding="utf-8"
    )
    found = {line.subject: line.level for line in check_study(read_study(tmp_path / "s.yaml"))}
    assert found["tasks"] == "wrong"


def test_a_setting_that_is_no_yaml_is_told_in_a_line(pair):
    with pytest.raises(InputError):
        read_study(pair / "study.yaml", ["search.vectors=[[1, 2"])


def test_a_study_that_goes_on_has_not_ended(tmp_path):
    make_search(tmp_path, make_study(trials=8))[0].run()

    class Cutting(TaskEngine):
        def answer(self, prompts, settings=None, on_answer=None, deadline=None):
            raise Cut

    search, _, _ = make_search(tmp_path, make_study(trials=24), Cutting())
    with suppress(Cut):
        search.run()
    assert not any("The search ended" in sentence for sentence in notes(search.ledger.facts))
