"""What a study stores about its judge at the verdict, for the report page.

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
from evomerge.tasks import Task

SHOWN = 8  # answers side by side
TEXT, REASON = 600, 300  # characters kept of a text and of a reason


class JudgedAnswers(Protocol):
    """One candidate's answers and grades on the tasks, in their order."""

    @property
    def answers(self) -> Sequence[Answer]: ...

    @property
    def grades(self) -> Sequence[Grade]: ...


def judge_facts(
    judge_name: str,
    judge_version: str,
    tasks: Sequence[Task],
    evaluations: Mapping[str, JudgedAnswers],
    held_out: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a search stores about its judge at the verdict, ready for JSON.

    `evaluations` holds the candidates' answers to the held-out `tasks` and their grades, "winner"
    and the best "uniform" among them. `held_out` is a learned judge's own agreement, as its file
    has it. {"name", "version", "n": tasks, "grades": {candidate: [n]}, "rules": the same by the
    rules judge, or None where it was the judge, "pairs": what differs most, each {task_id, input,
    reference, who, text, "sides": two of {name, grade, reason, text}}, "held_out"}: two judges of
    the answer `text` of `who`, or the winner and a parent with texts of their own.
    """
    grades = {name: _values(e.grades) for name, e in evaluations.items()}
    facts: dict[str, Any] = {
        "name": judge_name,
        "version": judge_version,
        "n": len(tasks),
        "grades": grades,
        "rules": None,
        "held_out": None if held_out is None else dict(held_out),
    }
    if judge_name == RulesJudge.name:
        return facts | {"pairs": _two_answers(tasks, evaluations, grades)}
    judge, rules = RulesJudge(), {}
    for name, e in evaluations.items():
        rules[name] = [judge.grade(t, a) for t, a in zip(tasks, e.answers, strict=True)]
    values = {name: _values(found) for name, found in rules.items()}
    return facts | {"rules": values, "pairs": _two_judges(judge_name, tasks, evaluations, rules)}


def known_agreement(judge: Judge) -> Mapping[str, Any] | None:
    """How far a learned judge, alone or in a cascade, agreed with references when it was fitted."""
    from evomerge.judging.learned.judge import LearnedJudge

    learned = judge.proxy if isinstance(judge, CascadeJudge) else judge
    return (learned.facts.held_out or None) if isinstance(learned, LearnedJudge) else None


def _two_judges(
    judge: str,
    tasks: Sequence[Task],
    evaluations: Mapping[str, JudgedAnswers],
    rules: Mapping[str, Sequence[Grade]],
) -> list[dict[str, Any]]:
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
        sides = [_side(judge, ours), _side(RulesJudge.name, theirs)]
        pairs.append(_pair(tasks[i], sides, name, evaluations[name].answers[i]))
    return pairs


def _two_answers(
    tasks: Sequence[Task],
    evaluations: Mapping[str, JudgedAnswers],
    grades: Mapping[str, Sequence[float]],
) -> list[dict[str, Any]]:
    """The tasks on which the winner and the best parent differ most, either way, largest first.

    The best parent is the one with the highest mean.
    """
    parents = []
    for name in evaluations:
        if name in ("base", "instruct") or name.startswith("sibling:"):
            parents.append(name)
    if "winner" not in evaluations or not parents:
        return []
    best = max(parents, key=lambda name: float(np.mean(grades[name])))
    gaps = [abs(w - p) for w, p in zip(grades["winner"], grades[best], strict=True)]
    differing = [i for i in range(len(tasks)) if gaps[i] > 0]
    pairs = []
    for i in sorted(differing, key=lambda i: (-gaps[i], i))[:SHOWN]:
        sides = []
        for name in ("winner", best):
            sides.append(_side(name, evaluations[name].grades[i], evaluations[name].answers[i]))
        pairs.append(_pair(tasks[i], sides))
    return pairs


def _pair(
    task: Task, sides: list[dict[str, Any]], who: str | None = None, answer: Answer | None = None
) -> dict[str, Any]:
    """`who` gave the `answer` that both sides are about, or each side has its own text."""
    return {
        "task_id": task.stored_id,
        "input": cut(task.input, TEXT),
        "reference": cut(task.output, TEXT),
        "who": who,
        "text": None if answer is None else cut(answer.text, TEXT),
        "sides": sides,
    }


def _side(name: str, grade: Grade, answer: Answer | None = None) -> dict[str, Any]:
    text = None if answer is None else cut(answer.text, TEXT)
    return {
        "name": name,
        "grade": float(grade.value),
        "reason": cut(grade.reason, REASON),
        "text": text,
    }


def _values(grades: Sequence[Grade]) -> list[float]:
    return [float(grade.value) for grade in grades]


def cut(text: str, limit: int) -> str:
    """The text, or its first `limit` characters and an ellipsis."""
    return text if len(text) <= limit else text[:limit] + " …"
