"""Figures on who graded and how far that can be believed, for the report page.

When a search takes its verdict it remembers `judge_facts`; `judge_section` makes of them what the
page shows. The second
judge is the rules judge, which is always there: it is no authority, but what two judges see alike
is seldom one's whim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from evomerge.judging.rules.judge import RulesJudge
from evomerge.judging.validation.agreement import spearman

if TYPE_CHECKING:
    from evomerge.answering.engine import Answer
    from evomerge.judging.grade import Grade
    from evomerge.tasks import Task

SHOWN = 8  # answers side by side
TEXT, REASON = 600, 300  # characters kept of a text and of a reason
LEVELS = (1, 2, 3, 4, 5)


class Examined(Protocol):
    """What one candidate did on the tasks, in their order."""

    @property
    def answers(self) -> Sequence[Answer]: ...

    @property
    def grades(self) -> Sequence[Grade]: ...


def judge_facts(
    judge_name: str,
    judge_version: str,
    tasks: Sequence[Task],
    examined: Mapping[str, Examined],
    held_out: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a search remembers of its judge at the verdict, ready for JSON.

    `examined` holds the candidates' answers to the held-out `tasks` and their grades, "winner" and
    the best "uniform" among them. `held_out` is a learned judge's own agreement, as its file has
    it. {"name", "version", "n": tasks, "grades": {candidate: [n]}, "rules": the same by the rules
    judge or None where that judged, "pairs": what differs most, each {task_id, input, reference,
    who, text, "sides": two of {name, grade, reason, text}}, "held_out"}: two judges of `who`'s
    answer `text`, or the winner and a parent with texts of their own.
    """
    grades = {name: [float(grade.value) for grade in e.grades] for name, e in examined.items()}
    rules = None
    if judge_name != RulesJudge.name:
        judge = RulesJudge()
        rules = {
            name: [judge.grade(t, a) for t, a in zip(tasks, e.answers, strict=True)]
            for name, e in examined.items()
        }
    pairs = (
        _two_judges(judge_name, tasks, examined, rules)
        if rules is not None
        else _two_answers(tasks, examined, grades)
    )
    return {
        "name": judge_name,
        "version": judge_version,
        "n": len(tasks),
        "grades": grades,
        "rules": None
        if rules is None
        else {name: [float(grade.value) for grade in found] for name, found in rules.items()},
        "pairs": pairs,
        "held_out": None if held_out is None else dict(held_out),
    }


def judge_section(facts: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What the page shows of `judge_facts`; a key "cascade" beside them, {"graded", "asked"}, tells
    what a cascade saved.
    """
    if facts is None:
        return None
    grades, rules = facts["grades"], facts.get("rules")
    rows = [
        {
            "name": name,
            **mean_and_error(values),
            "bars": shares(values),
            "rules": mean_and_error(rules[name]) if rules else None,
        }
        for name, values in grades.items()
    ]
    return {
        "name": facts["name"],
        "version": facts["version"],
        "rows": rows,
        # one scale for all bars
        "top": max((bar["share"] for row in rows for bar in row["bars"]), default=0.0) or 1.0,
        "agreement": agreement(grades, rules) if rules else None,
        "held_out": held_out_rows(facts.get("held_out")),
        "savings": savings(facts.get("cascade")),
        "pairs": facts["pairs"],
        "by_rules": rules is None,
    }


def mean_and_error(values: Sequence[float]) -> dict[str, Any]:
    """{"mean", "stderr", "n"}: the standard error is s / sqrt(n) with n - 1 in s; None with fewer
    than two values.
    """
    n = len(values)
    error = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else None
    return {"mean": float(np.mean(values)) if n else None, "stderr": error, "n": n}


def shares(grades: Sequence[float]) -> list[dict[str, Any]]:
    """The share of the grades nearest to each of 1 to 5; a half goes up, and what lies outside to
    the end.
    """
    nearest = [min(5, max(1, math.floor(grade + 0.5))) for grade in grades]
    counts = [nearest.count(level) for level in LEVELS]
    return [
        {"level": level, "count": count, "share": count / len(grades) if grades else 0.0}
        for level, count in zip(LEVELS, counts, strict=True)
    ]


def agreement(a: Mapping[str, Sequence[float]], b: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """How far two judges' grades of the same answers, {candidate: [tasks]}, agree.

    "spearman": within one task over the candidates, mean over the tasks where both tell any apart;
    "difference": of the grades, a minus b, mean within a task and then over the tasks; each {mean,
    stderr, n tasks}. "orders": the candidates by each judge's mean, highest first.
    """
    # [candidates, tasks]
    first, second = (np.array([grades[name] for name in a], dtype=np.float64) for grades in (a, b))
    by_task = [spearman(first[:, t], second[:, t]) for t in range(first.shape[1])]
    orders = [
        [name for _, name in sorted((-float(np.mean(grades[name])), name) for name in a)]
        for grades in (a, b)
    ]
    return {
        "spearman": mean_and_error([value for value in by_task if not math.isnan(value)]),
        "difference": mean_and_error((first - second).mean(0).tolist()),
        "candidates": len(a),
        "orders": orders,
    }


def held_out_rows(held_out: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """A learned judge's agreement with its references on models that it was not fitted on, a row
    per figure.
    """
    names = {"within_task": "within one task, across models", "model_level": "across models’ means"}
    found = [(text, (held_out or {}).get(key)) for key, text in names.items()]
    found += [
        (f"model pairs {gap.replace('-', ' to ')} apart ordered right", value)
        for gap, value in (held_out or {}).get("pairs", {}).items()
    ]
    return [
        {"name": text, **{k: value.get(k) for k in ("value", "low", "high")}}
        for text, value in found
        if isinstance(value, Mapping)
    ]


def savings(cascade: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Of `graded` answers the costly judge was `asked` about so many."""
    if not cascade or not cascade["graded"]:
        return None
    graded, asked = int(cascade["graded"]), int(cascade["asked"])
    return {"graded": graded, "asked": asked, "saved": 1 - asked / graded}


def _two_judges(
    judge: str,
    tasks: Sequence[Task],
    examined: Mapping[str, Examined],
    rules: Mapping[str, Sequence[Grade]],
) -> list[dict[str, Any]]:
    """One answer per task on which the two judges differ most, largest first."""

    def gap(place: tuple[int, str]) -> float:
        i, name = place
        return abs(examined[name].grades[i].value - rules[name][i].value)

    worst = (
        [max(((i, name) for name in examined), key=gap) for i in range(len(tasks))]
        if examined
        else []
    )
    chosen = sorted(
        (place for place in worst if gap(place) > 0), key=lambda place: (-gap(place), place[0])
    )[:SHOWN]
    return [
        _pair(
            tasks[i],
            [_side(judge, examined[name].grades[i]), _side(RulesJudge.name, rules[name][i])],
            name,
            examined[name].answers[i],
        )
        for i, name in chosen
    ]


def _two_answers(
    tasks: Sequence[Task], examined: Mapping[str, Examined], grades: Mapping[str, Sequence[float]]
) -> list[dict[str, Any]]:
    """The tasks on which the winner and the parent with the highest mean differ most, either way,
    largest first.
    """
    parents = [
        name for name in examined if name in ("base", "instruct") or name.startswith("sibling:")
    ]
    if "winner" not in examined or not parents:
        return []
    best = max(parents, key=lambda name: float(np.mean(grades[name])))
    gaps = [abs(w - p) for w, p in zip(grades["winner"], grades[best], strict=True)]
    chosen = sorted((i for i in range(len(tasks)) if gaps[i] > 0), key=lambda i: (-gaps[i], i))[
        :SHOWN
    ]
    return [
        _pair(
            tasks[i],
            [
                _side(name, examined[name].grades[i], examined[name].answers[i])
                for name in ("winner", best)
            ],
        )
        for i in chosen
    ]


def _pair(
    task: Task, sides: list[dict[str, Any]], who: str | None = None, answer: Answer | None = None
) -> dict[str, Any]:
    """`who` gave the `answer` that both sides are about; without it each side has a text of its
    own.
    """
    told = {
        "task_id": task.task_id,
        "input": _cut(task.input, TEXT),
        "reference": _cut(task.output, TEXT),
    }
    return told | {
        "who": who,
        "text": None if answer is None else _cut(answer.text, TEXT),
        "sides": sides,
    }


def _side(name: str, grade: Grade, answer: Answer | None = None) -> dict[str, Any]:
    text = None if answer is None else _cut(answer.text, TEXT)
    return {
        "name": name,
        "grade": float(grade.value),
        "reason": _cut(grade.reason, REASON),
        "text": text,
    }


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[:limit] + " …"
