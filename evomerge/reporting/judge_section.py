"""The report's section on the judge: which judge graded, and how far its grades can be trusted.

It is computed from the JudgeReport that a search stores at the verdict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from evomerge.judging.validation.agreement import spearman

if TYPE_CHECKING:
    from evomerge.searching.records.judge_report import JudgePair, JudgeReport
    from evomerge.searching.records.study_facts import CascadeSavings

LEVELS = (1, 2, 3, 4, 5)
FITTED = {
    "within_task": "within one task, across models",
    "model_level": "across models’ means",
}


@dataclass(frozen=True)
class MeanFigure:
    """A mean over n values and its standard error s / sqrt(n); None where it is not defined."""

    mean: float | None
    stderr: float | None
    n: int


@dataclass(frozen=True)
class GradeBar:
    """How many grades are nearest to `level`."""

    level: int
    count: int
    share: float


@dataclass(frozen=True)
class CandidateRow:
    """One candidate's grades, and their mean by the rules judge where that is another judge."""

    name: str
    mean: float | None
    stderr: float | None
    n: int
    bars: list[GradeBar]
    rules: MeanFigure | None


@dataclass(frozen=True)
class JudgeComparison:
    """How far two judges agree on the same answers.

    `spearman`: within one task over the candidates, averaged over the tasks on which both judges
    distinguish between any of them; `difference`: first minus second, averaged within a task and
    then over the tasks; `orders`: the candidates by each judge's mean, highest first.
    """

    spearman: MeanFigure
    difference: MeanFigure
    candidates: int
    orders: tuple[list[str], list[str]]


@dataclass(frozen=True)
class FittedFigure:
    """One figure of a learned judge on models that it was not fitted on, with a 95 % interval."""

    name: str
    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class SavedGrades:
    """The expensive judge graded `asked` of `graded` answers; `saved` is the share it did not."""

    graded: int
    asked: int
    saved: float


@dataclass(frozen=True)
class JudgeView:
    """Everything that the page shows about the judge; `top` scales all bars alike."""

    name: str
    version: str
    rows: list[CandidateRow]
    top: float
    agreement: JudgeComparison | None
    held_out: list[FittedFigure]
    savings: SavedGrades | None
    pairs: Sequence[JudgePair]
    by_rules: bool


def judge_section(
    report: JudgeReport | None, cascade: CascadeSavings | None = None
) -> JudgeView | None:
    """What the page shows about the judge, and about what a cascade judge saved."""
    if report is None:
        return None
    grades, rules = report.grades, report.rules
    by_rules: dict[str, MeanFigure] = {}
    agreement = None
    if rules:
        by_rules = {name: mean_figure(rules[name]) for name in grades}
        agreement = compare_judges(grades, rules)
    rows, highest = [], 0.0
    for name, values in grades.items():
        own, bars = mean_figure(values), grade_bars(values)
        highest = max(highest, *(bar.share for bar in bars))
        rows.append(CandidateRow(name, own.mean, own.stderr, own.n, bars, by_rules.get(name)))
    return JudgeView(
        name=report.name,
        version=report.version,
        rows=rows,
        top=highest or 1.0,
        agreement=agreement,
        held_out=fitted_figures(report.held_out),
        savings=saved_grades(cascade),
        pairs=report.pairs,
        by_rules=rules is None,
    )


def mean_figure(values: Sequence[float]) -> MeanFigure:
    """Mean and standard error s / sqrt(n), with n - 1 in s; no error for fewer than two values."""
    n = len(values)
    if n == 0:
        return MeanFigure(None, None, 0)
    mean = float(np.mean(values))
    if n == 1:
        return MeanFigure(mean, None, 1)
    return MeanFigure(mean, float(np.std(values, ddof=1)) / math.sqrt(n), n)


def grade_bars(grades: Sequence[float]) -> list[GradeBar]:
    """The share of grades nearest to each of 1 to 5; halves round up, outliers go to the ends."""
    nearest = [min(5, max(1, math.floor(grade + 0.5))) for grade in grades]
    counts = [nearest.count(level) for level in LEVELS]
    total = len(grades) or 1
    return [GradeBar(level, n, n / total) for level, n in zip(LEVELS, counts, strict=True)]


def compare_judges(
    first: Mapping[str, Sequence[float]], second: Mapping[str, Sequence[float]]
) -> JudgeComparison:
    """How far two judges' grades of the same answers, {candidate: [tasks]}, agree."""
    # [candidates, tasks]
    a = np.array([first[name] for name in first], dtype=np.float64)
    b = np.array([second[name] for name in first], dtype=np.float64)
    by_task = [spearman(a[:, t], b[:, t]) for t in range(a.shape[1])]
    return JudgeComparison(
        spearman=mean_figure([value for value in by_task if not math.isnan(value)]),
        difference=mean_figure((a - b).mean(0).tolist()),
        candidates=len(first),
        orders=(by_mean(first), by_mean({name: second[name] for name in first})),
    )


def by_mean(grades: Mapping[str, Sequence[float]]) -> list[str]:
    """The candidates' names by their mean grade, highest first."""
    return sorted(grades, key=lambda name: (-float(np.mean(grades[name])), name))


def fitted_figures(held_out: Mapping[str, Any] | None) -> list[FittedFigure]:
    """A learned judge's agreement with its references on models that it was not fitted on."""
    known = held_out or {}
    named = [(text, known.get(key)) for key, text in FITTED.items()]
    for gap, value in known.get("pairs", {}).items():
        named.append((f"model pairs {gap.replace('-', ' to ')} apart ordered right", value))
    figures = []
    for name, value in named:
        if isinstance(value, Mapping):
            figures.append(
                FittedFigure(name, value.get("value"), value.get("low"), value.get("high"))
            )
    return figures


def saved_grades(cascade: CascadeSavings | None) -> SavedGrades | None:
    """How many grades of the expensive judge a cascade saved; None without a cascade judge."""
    if cascade is None or not cascade.graded:
        return None
    return SavedGrades(cascade.graded, cascade.asked, 1 - cascade.asked / cascade.graded)
