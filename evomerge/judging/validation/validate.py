"""How far a judge can be trusted, measured on answers that a reference has graded.

This is `evomerge judge validate`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evomerge.judging.answer_files import AnswerLine, grade_lines, read_answers
from evomerge.judging.factory import check_tasks, judge_from_options
from evomerge.judging.grade import Grade, Judge
from evomerge.judging.validation.agreement import (
    RESAMPLES,
    Agreement,
    Agreements,
    compare,
    spearman,
)
from evomerge.judging.validation.families import wanted_models
from evomerge.judging.validation.reference import Joined, join_grades, pick, read_grades
from evomerge.tasks import load_tasks

AGAIN = 200  # answers that are graded a second time


@dataclass(frozen=True)
class Repeatability:
    """Two runs over the same n answers: share of equal grades, mean distance, and Spearman.

    `spearman` is over the answers, None where one run is constant.
    """

    n: int
    same: float
    distance: float
    spearman: float | None


@dataclass(frozen=True)
class Validation:
    """The result; `cost_per_100` is None where the judge has no price."""

    judge: str
    reference: str
    n_models: int
    n_answers: int
    n_tasks: int
    agreements: Agreements
    again: Repeatability | None
    reference_again: Repeatability | None
    seconds_per_100: float
    cost_per_100: float | None
    unmatched: str

    def as_json(self) -> dict[str, Any]:
        """The object that --json prints."""
        a = self.agreements
        return {
            "judge": self.judge,
            "reference": self.reference,
            "n_models": self.n_models,
            "n_answers": self.n_answers,
            "within_task": a.within_task.as_json(),
            "model_level": a.model_level.as_json(),
            "within_model": a.within_model.as_json(),
            "difficulty_baseline": a.difficulty_baseline.as_json(),
            "pairs": {gap: pairs.as_json() for gap, pairs in a.pairs.items()},
            "seconds_per_100": self.seconds_per_100,
        }

    def as_text(self) -> str:
        """The table for people."""
        a = self.agreements
        lines = [
            f"{self.judge} against {self.reference}: {self.n_answers} answers of "
            f"{self.n_models} models to {self.n_tasks} tasks",
            "",
            "Spearman                                          value   95 % interval     n",
            _row("within one task, across models (judge by this)", a.within_task, "tasks"),
            _row("across the models' means", a.model_level, "models"),
            _row("within a model, across tasks", a.within_model, "models"),
            _row("  explained by task difficulty alone", a.difficulty_baseline, "models"),
            "",
            "Model pairs in the right order, by the gap of their means",
            *(_row(f"  {gap}", pairs, "pairs") for gap, pairs in a.pairs.items()),
            "",
            f"a second run of {self.judge}: {_rerun_text(self.again)}",
        ]
        if self.reference_again:
            lines.append(f"a second take of {self.reference}: {_rerun_text(self.reference_again)}")
        cost = "no cost"
        if self.cost_per_100:
            cost = f"cost {self.cost_per_100:.4g}"
        lines.append(f"{self.seconds_per_100:.3g} s per 100 answers, {cost}")
        lines.append(f"Intervals: the models resampled with replacement, {RESAMPLES:,} times.")
        if self.unmatched:
            lines.append(self.unmatched)
        return "\n".join(lines)


def validate_files(
    tasks_path: str | Path,
    answers_path: str | Path,
    grades_path: str | Path,
    reference: str,
    judge: str,
    settings: Sequence[str] = (),
    again: int = AGAIN,
    models: str = "all",
) -> Validation:
    """Grade the answers that `reference` has graded, and compare.

    `judge` and `settings` are as for `judge_from_options`. `again` answers, drawn with a fixed
    seed, are graded a second time without a cache. `models` is all, tuning or test: only those
    families. Raises TaskError and InputError for the files, and what the judge raises.
    """
    tasks = load_tasks(tasks_path)
    wanted = wanted_models(models)
    graded = read_grades(grades_path, tasks)
    first = pick(graded, [reference], grades_path)
    grades = {}
    for key, grade in first.items():
        if wanted(key[0]):
            grades[key] = grade
    answers = []
    for line in read_answers(answers_path, tasks):
        if wanted(line.model):
            answers.append(line)
    joined = join_grades(answers, grades)
    chosen = judge_from_options(judge, settings)
    check_tasks(chosen, (line.task for line in joined.lines))
    cost_before = _cost(chosen)
    began = time.perf_counter()
    given = grade_lines(chosen, joined.lines)
    seconds = time.perf_counter() - began
    cost = _cost(chosen) - cost_before
    _close(chosen)
    second = pick(graded, [reference], grades_path, take=2)
    takes = []
    for key, grade in second.items():
        if key in grades:
            takes.append((grades[key], grade))
    reference_again = None
    if takes:
        reference_again = _repeatability(*zip(*takes, strict=True))
    n = len(given)
    return Validation(
        judge=chosen.name,
        reference=reference,
        n_models=len({line.model for line in joined.lines}),
        n_answers=n,
        n_tasks=len({str(line.task.task_id) for line in joined.lines}),
        agreements=_compare(joined, given),
        again=_second_run(judge, settings, joined.lines, given, again),
        reference_again=reference_again,
        seconds_per_100=round(100 * seconds / n, 5),
        cost_per_100=100 * cost / n if cost else None,
        unmatched=joined.unmatched(),
    )


def _compare(joined: Joined, given: Sequence[Grade]) -> Agreements:
    models = _places(line.model or "" for line in joined.lines)
    tasks = _places(str(line.task.task_id) for line in joined.lines)
    judge, reference = np.full((2, len(models), len(tasks)), np.nan)
    for line, grade, expected in zip(joined.lines, given, joined.grades, strict=True):
        cell = models[line.model or ""], tasks[str(line.task.task_id)]
        judge[cell] = grade.value
        reference[cell] = expected
    return compare(judge, reference)


def _places(names: Iterable[str]) -> dict[str, int]:
    """Each different name's place in their order."""
    return {name: i for i, name in enumerate(sorted(set(names)))}


def _second_run(
    judge: str, settings: Sequence[str], lines: Sequence[AnswerLine], given: Sequence[Grade], n: int
) -> Repeatability | None:
    """Run the judge again, without its cache, on n answers."""
    if n <= 0:
        return None
    rows = sorted(random.Random(0).sample(range(len(lines)), min(n, len(lines))))
    fresh = judge_from_options(judge, settings, cache=None)
    grades = grade_lines(fresh, [lines[i] for i in rows])
    _close(fresh)
    return _repeatability([given[i].value for i in rows], [grade.value for grade in grades])


def _repeatability(first: Sequence[float], second: Sequence[float]) -> Repeatability:
    a = np.array(first, float)
    b = np.array(second, float)
    rank = spearman(a, b)
    defined = None
    if not np.isnan(rank):
        defined = rank
    return Repeatability(
        len(a),
        float(np.mean(np.abs(a - b) < 1e-9)),
        float(np.mean(np.abs(a - b))),
        defined,
    )


def _cost(judge: Judge) -> float:
    return float(getattr(judge, "cost", 0.0))


def _close(judge: Judge) -> None:
    close = getattr(judge, "close", None)
    if close is not None:
        close()


def _row(name: str, a: Agreement, of: str) -> str:
    value, low, high = map(_figure, (a.value, a.low, a.high))
    return f"{name:49} {value}   {low} to {high}   {a.n} {of}"


def _figure(value: float | None) -> str:
    if value is None:
        return "  –  "
    return f"{value:.3f}"


def _rerun_text(again: Repeatability | None) -> str:
    if again is None:
        return "not requested"
    text = f"{again.same:.0%} of {again.n} grades the same, {again.distance:.3f} apart on average"
    if again.spearman is not None:
        text += f", Spearman {again.spearman:.3f}"
    return text
