"""What a search remembers of its judge when it takes the verdict, for the report page.

It holds two judges' grades: those of the study's judge, and those of the rules judge,
which needs no model and is always available. It is not an authority, but a difference that two
judges both see is seldom an artefact of one of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from evomerge.judging.rules.judge import RulesJudge

if TYPE_CHECKING:
    from evomerge.answering.engine import Answer
    from evomerge.judging.grade import Grade
    from evomerge.tasks import Task

SHOWN = 8  # pairs shown side by side
TEXT, REASON = 600, 300  # characters kept of a text and of a reason
PARENTS = ("base", "instruct")


class GradedAnswers(Protocol):
    """One candidate's answers to the tasks and their grades, in the order of the tasks."""

    @property
    def answers(self) -> Sequence[Answer]: ...

    @property
    def grades(self) -> Sequence[Grade]: ...


def judge_facts(
    judge_name: str,
    judge_version: str,
    tasks: Sequence[Task],
    examined: Mapping[str, GradedAnswers],
    held_out: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a search remembers of its judge at the verdict, ready for JSON.

    `examined` holds each candidate's answers to the held-out `tasks` and their grades, "winner" and
    the best "uniform" among them. `held_out` is a learned judge's own agreement, from its file.

    Returns {"name", "version", "n": tasks, "grades": {candidate: [n]}, "rules": the same by the
    rules judge (None where it graded the study), "pairs": the largest differences, each {task_id,
    input, reference, who, text, "sides": two of {name, grade, reason, text}}, "held_out"}. A pair
    holds two judges' grades of the answer `text` by `who`, or the answers of the winner and a
    parent.
    """
    grades = {name: _values(found.grades) for name, found in examined.items()}
    facts: dict[str, Any] = {
        "name": judge_name,
        "version": judge_version,
        "n": len(tasks),
        "grades": grades,
        "rules": None,
    }
    if judge_name == RulesJudge.name:
        facts["pairs"] = _answer_pairs(tasks, examined, grades)
    else:
        rules = _grades_by_rules(tasks, examined)
        facts["rules"] = {name: _values(found) for name, found in rules.items()}
        facts["pairs"] = _judge_pairs(judge_name, tasks, examined, rules)
    facts["held_out"] = None if held_out is None else dict(held_out)
    return facts


def _values(grades: Sequence[Grade]) -> list[float]:
    return [float(grade.value) for grade in grades]


def _grades_by_rules(
    tasks: Sequence[Task], examined: Mapping[str, GradedAnswers]
) -> dict[str, list[Grade]]:
    judge = RulesJudge()
    grades: dict[str, list[Grade]] = {}
    for name, found in examined.items():
        pairs = zip(tasks, found.answers, strict=True)
        grades[name] = [judge.grade(task, answer) for task, answer in pairs]
    return grades


def _judge_pairs(
    judge: str,
    tasks: Sequence[Task],
    examined: Mapping[str, GradedAnswers],
    rules: Mapping[str, Sequence[Grade]],
) -> list[dict[str, Any]]:
    """Per task the answer on which the two judges differ most, the largest difference first."""
    if not examined:
        return []

    def gap(task: int, name: str) -> float:
        return abs(examined[name].grades[task].value - rules[name][task].value)

    found: list[tuple[float, int, str]] = []
    for i in range(len(tasks)):
        worst = max(examined, key=partial(gap, i))
        if gap(i, worst) > 0:
            found.append((-gap(i, worst), i, worst))
    pairs = []
    for _, i, name in sorted(found, key=lambda place: place[:2])[:SHOWN]:
        sides = [_side(judge, examined[name].grades[i]), _side(RulesJudge.name, rules[name][i])]
        pairs.append(_pair(tasks[i], sides, name, examined[name].answers[i]))
    return pairs


def _answer_pairs(
    tasks: Sequence[Task],
    examined: Mapping[str, GradedAnswers],
    grades: Mapping[str, Sequence[float]],
) -> list[dict[str, Any]]:
    """The tasks on which the winner and the best parent differ most, either way."""
    parents = [name for name in examined if name in PARENTS or name.startswith("sibling:")]
    if "winner" not in examined or not parents:
        return []
    best = max(parents, key=lambda name: float(np.mean(grades[name])))
    gaps = [abs(w - p) for w, p in zip(grades["winner"], grades[best], strict=True)]
    differing = [i for i in range(len(tasks)) if gaps[i] > 0]
    differing.sort(key=lambda i: (-gaps[i], i))
    pairs = []
    for i in differing[:SHOWN]:
        sides = []
        for name in ("winner", best):
            sides.append(_side(name, examined[name].grades[i], examined[name].answers[i]))
        pairs.append(_pair(tasks[i], sides))
    return pairs


def _pair(
    task: Task, sides: list[dict[str, Any]], who: str | None = None, answer: Answer | None = None
) -> dict[str, Any]:
    """Two sides of one task: about the `answer` that `who` gave, or each with its own text."""
    return {
        "task_id": task.task_id,
        "input": _cut(task.input, TEXT),
        "reference": _cut(task.output, TEXT),
        "who": who,
        "text": _text(answer),
        "sides": sides,
    }


def _side(name: str, grade: Grade, answer: Answer | None = None) -> dict[str, Any]:
    return {
        "name": name,
        "grade": float(grade.value),
        "reason": _cut(grade.reason, REASON),
        "text": _text(answer),
    }


def _text(answer: Answer | None) -> str | None:
    return None if answer is None else _cut(answer.text, TEXT)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[:limit] + " …"
