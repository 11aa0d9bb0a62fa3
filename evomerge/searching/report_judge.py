"""How a search reports on its judge at the verdict, for the report page.

The rules judge, which is always available, is the second judge. It is not an authority, but two
judges seldom agree by chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, Protocol

import numpy as np

from evomerge.answering.engine import Answer
from evomerge.judging.cascade import CascadeJudge
from evomerge.judging.grade import Grade, Judge
from evomerge.judging.rules.judge import RulesJudge
from evomerge.searching.records.judge_report import JudgePair, JudgeReport, JudgeSide
from evomerge.tasks import Task

SHOWN = 8  # answers side by side
TEXT, REASON = 600, 300  # characters kept of a text and of a reason


class JudgedAnswers(Protocol):
    """One candidate's answers and grades on the tasks, in their order."""

    @property
    def answers(self) -> Sequence[Answer]: ...

    @property
    def grades(self) -> Sequence[Grade]: ...


def report_judge(
    judge_name: str,
    judge_version: str,
    tasks: Sequence[Task],
    evaluations: Mapping[str, JudgedAnswers],
    held_out: Mapping[str, Any] | None = None,
) -> JudgeReport:
    """What a search stores about its judge at the verdict.

    `evaluations` holds the candidates' answers to the held-out `tasks` and their grades, "winner"
    and the best "uniform" among them. `held_out` is a learned judge's own agreement, as its file
    has it. Pairs are what differs most: the two judges of one answer, or, where the rules judge
    graded, the winner and a parent.
    """
    grades = {name: _values(e.grades) for name, e in evaluations.items()}
    rules_grades, pairs = None, []
    if judge_name == RulesJudge.name:
        pairs = _two_answers(tasks, evaluations, grades)
    else:
        judge, rules = RulesJudge(), {}
        for name, e in evaluations.items():
            rules[name] = [judge.grade(t, a) for t, a in zip(tasks, e.answers, strict=True)]
        rules_grades = {name: _values(found) for name, found in rules.items()}
        pairs = _two_judges(judge_name, tasks, evaluations, rules)
    known = None if held_out is None else dict(held_out)
    n = len(tasks)
    return JudgeReport(judge_name, judge_version, n, grades, rules_grades, known, tuple(pairs))


def known_agreement(judge: Judge) -> Mapping[str, Any] | None:
    """How far a learned judge, alone or in a cascade, agreed with references when it was fitted."""
    from evomerge.judging.learned.judge import LearnedJudge

    learned = judge
    if isinstance(judge, CascadeJudge):
        learned = judge.proxy
    if not isinstance(learned, LearnedJudge):
        return None
    return learned.facts.held_out or None


def _two_judges(
    judge: str,
    tasks: Sequence[Task],
    evaluations: Mapping[str, JudgedAnswers],
    rules: Mapping[str, Sequence[Grade]],
) -> list[JudgePair]:
    """One answer per task on which the two judges differ most, largest first."""

    def gap(case: tuple[int, str]) -> float:
        i, name = case
        return abs(evaluations[name].grades[i].value - rules[name][i].value)

    worst = []
    for i in range(len(tasks) if evaluations else 0):
        worst.append(max(product([i], evaluations), key=gap))
    differing = [case for case in worst if gap(case) > 0]
    pairs = []
    for i, name in sorted(differing, key=lambda case: (-gap(case), case[0]))[:SHOWN]:
        ours, theirs = evaluations[name].grades[i], rules[name][i]
        sides = (_side(judge, ours), _side(RulesJudge.name, theirs))
        text = cut(evaluations[name].answers[i].text, TEXT)
        pairs.append(_pair(tasks[i], sides, name, text))
    return pairs


def _two_answers(
    tasks: Sequence[Task],
    evaluations: Mapping[str, JudgedAnswers],
    grades: Mapping[str, Sequence[float]],
) -> list[JudgePair]:
    """The tasks on which the winner and the best parent differ most, either way, largest first.

    The best parent is the one with the highest mean.
    """
    parents = [name for name in evaluations if name not in ("winner", "uniform")]
    if "winner" not in evaluations or not parents:
        return []
    best = max(parents, key=lambda name: float(np.mean(grades[name])))
    gaps = [abs(w - p) for w, p in zip(grades["winner"], grades[best], strict=True)]
    differing = [i for i in range(len(tasks)) if gaps[i] > 0]
    pairs = []
    for i in sorted(differing, key=lambda i: (-gaps[i], i))[:SHOWN]:
        ours, theirs = evaluations["winner"], evaluations[best]
        sides = (
            _side("winner", ours.grades[i], ours.answers[i]),
            _side(best, theirs.grades[i], theirs.answers[i]),
        )
        pairs.append(_pair(tasks[i], sides))
    return pairs


def _pair(
    task: Task,
    sides: tuple[JudgeSide, JudgeSide],
    who: str | None = None,
    text: str | None = None,
) -> JudgePair:
    question, reference = cut(task.input, TEXT), cut(task.output, TEXT)
    return JudgePair(task.stored_id, question, reference, who, text, sides)


def _side(name: str, grade: Grade, answer: Answer | None = None) -> JudgeSide:
    text = None if answer is None else cut(answer.text, TEXT)
    return JudgeSide(name, float(grade.value), cut(grade.reason, REASON), text)


def _values(grades: Sequence[Grade]) -> list[float]:
    return [float(grade.value) for grade in grades]


def cut(text: str, limit: int) -> str:
    """The text, or its first `limit` characters and an ellipsis."""
    return text if len(text) <= limit else text[:limit] + " …"
