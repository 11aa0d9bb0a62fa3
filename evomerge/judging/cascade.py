"""The cascade judge: a fast proxy grades every answer, the llm judge only those that matter.

The proxy is the learned judge. The llm judge grades the answers that decide which candidates of a
generation belong to the better half. This file holds the pure decisions over a generation's grades;
searching/generation/cascade_round.py requests the grades. Everything else (references, the
distribution's mean, validation and verdict) is graded by the llm judge alone. docs/JUDGES.md
reports what this saves and how often it errs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from statistics import NormalDist
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from evomerge.judging.grade import Grade, Judge, PendingGrades, WaitingJudge

if TYPE_CHECKING:
    from evomerge.answering.engine import Answer
    from evomerge.tasks import Task

FEWEST = 4  # answers of a candidate that the llm judge grades before anything is decided

EPSILON = 1e-9  # of a grade: where the residuals leave no spread, equal candidates are decided

Floats: TypeAlias = NDArray[np.float64]
# (candidates, tasks) -> the llm judge's grades [candidates, tasks]
Ask: TypeAlias = Callable[[list[int], list[int]], Floats]


class ProxyJudge(Judge, Protocol):
    """A judge that knows which tasks it can grade."""

    def check(self, tasks: Iterable[Task]) -> None:
        """Raise TaskError for a task that it cannot grade."""


class ExpensiveJudge(Judge, WaitingJudge, Protocol):
    """A judge whose grades cost time and money."""

    @property
    def cost(self) -> float: ...


class CascadeJudge:
    """Grades by `expensive`; `proxy` stands in where that does not change a generation's ranking.

    `error` is the share of generations in which the better half may differ.
    """

    def __init__(self, proxy: ProxyJudge, expensive: ExpensiveJudge, error: float) -> None:
        self.proxy = proxy
        self.expensive = expensive
        self.error = error
        self.name = f"cascade:{expensive.name}"
        versions = f"{expensive.version}/{proxy.version}/{error}"
        self.version = sha256(versions.encode()).hexdigest()[:12]

    @property
    def cost(self) -> float:
        """What the llm judge has cost, in the currency of its prices."""
        return self.expensive.cost

    def check(self, tasks: Sequence[Task]) -> None:
        """Raise TaskError for a task that the learned judge was not fitted on."""
        self.proxy.check(tasks)

    def grade(self, task: Task, answer: Answer) -> Grade:
        """The llm judge's grade."""
        return self.expensive.grade(task, answer)

    def submit(self, tasks: Sequence[Task], answers: Sequence[Answer]) -> PendingGrades:
        """Request grades from the llm judge. Raises as its `submit`."""
        return self.expensive.submit(tasks, answers)

    def close(self, drain: bool = True) -> None:
        """Close the llm judge."""
        self.expensive.close(drain)


def settle(
    proxy: Floats, ask: Ask, keep: int, error: float, blocks: Iterable[Sequence[int]]
) -> Floats:
    """The llm judge's grades [c, t] that decide which `keep` candidates are best; nan elsewhere.

    `proxy` [c, t] are the learned judge's grades. The tasks come in `blocks`, the same for all
    candidates.
    """
    expensive = np.full(proxy.shape, np.nan)
    for tasks in blocks:
        candidates = sorted(undecided(proxy, expensive, keep, error))
        if not candidates:
            break
        expensive[np.ix_(candidates, list(tasks))] = ask(candidates, list(tasks))
    return expensive


def effects(residual: Floats) -> tuple[Floats, Floats]:
    """([c] shifts of the candidates, [t] of the tasks) by least squares; nan residuals are missing.

    The model is residual = candidate's shift + task's shift. A task's shift is how the learned
    judge misjudges that task in all of a generation's answers, which are much alike; it must not be
    charged to the candidates that were graded on this task alone. The shifts of the tasks with
    residuals average to 0, those of the others are 0.
    """
    known = ~np.isnan(residual)
    r = np.where(known, residual, 0.0)
    there = known.astype(float)
    by_candidate = there.sum(axis=1)
    by_task = there.sum(axis=0)
    share = there / np.maximum(by_task, 1)
    # tasks eliminated: (diag(n) - A diag(1/m) A') shift = row sums - A diag(1/m) column sums;
    # singular along 1, lstsq takes the shortest
    matrix = np.diag(by_candidate) - there @ share.T
    sums = r.sum(axis=1) - share @ r.sum(axis=0)
    shift = np.linalg.lstsq(matrix, sums, rcond=1e-9)[0]
    left = (r - there * shift[:, None]).sum(axis=0) / np.maximum(by_task, 1)
    task = np.where(by_task > 0, left, 0.0)
    level = 0.0
    if known.any():
        level = float(task[by_task > 0].mean())
    return np.where(by_candidate > 0, shift, 0.0) + level, np.where(by_task > 0, task - level, 0.0)


def completed(proxy: Floats, expensive: Floats) -> Floats:
    """The llm's grades [c, t], and the learned ones moved by their shifts where those are nan.

    The means of its rows estimate the llm's means without bias, however good or bad the learned
    judge is (prediction-powered inference, Angelopoulos et al. 2023, arXiv 2301.09633, with the
    fresh grades counted in).
    """
    shift, task = effects(expensive - proxy)
    return np.where(np.isnan(expensive), proxy + shift[:, None] + task, expensive)


def undecided(proxy: Floats, expensive: Floats, keep: int, error: float) -> set[int]:
    """The candidates that may or may not be among the best `keep`; all of them at first.

    A candidate is decided when its estimate is further from the border (midway between the
    estimates in places `keep` and `keep` + 1) than z standard errors, so that each decision is
    wrong with probability at most error / candidates / 2 (Bonferroni; the half makes up for
    looking after every block). A standard error is s / √n √(1 - n / N), where s is the deviation of
    the candidate's n residuals without the shifts, or the average candidate's if that is larger.
    """
    count, tasks = proxy.shape
    residual = expensive - proxy
    n = (~np.isnan(residual)).sum(axis=1)
    unfinished = {i for i in range(count) if n[i] < tasks}
    if not unfinished or (n < min(FEWEST, tasks)).any():
        return unfinished
    if count <= keep:
        return set()
    shift, task = effects(residual)
    left = np.nansum((residual - shift[:, None] - task) ** 2, axis=1)
    # a task's shift takes one of `count` away
    spread = np.sqrt(left / np.maximum(n - 1, 1) * count / (count - 1))
    errors = np.maximum(spread, spread.mean()) / np.sqrt(n) * np.sqrt(1 - n / tasks)
    means = completed(proxy, expensive).mean(axis=1)
    ordered = np.sort(means)[::-1]
    border = (ordered[keep - 1] + ordered[keep]) / 2
    z = NormalDist().inv_cdf(1 - error / count / 2)
    return {i for i in unfinished if abs(means[i] - border) < z * errors[i] - EPSILON}


def composed(
    proxy: Sequence[Grade],
    expensive: Sequence[Grade | None],
    values: Sequence[float] | None = None,
) -> list[Grade]:
    """A candidate's grades: the llm's, or the learned ones moved to `values` where there is none.

    `values` are a row of `completed`, so that the grades' mean is the estimate. Without them, the
    learned grades are moved by the mean difference. Moved grades may leave 1 to 5.
    """
    pairs = list(zip(proxy, expensive, strict=True))
    if values is None:
        differences = []
        for own, known in pairs:
            if known is not None:
                differences.append(known.value - own.value)
        shift = 0.0
        if differences:
            shift = float(np.mean(differences))
        moved = [own.value + shift for own in proxy]
    else:
        moved = [round(float(value), 6) for value in values]
    grades = []
    for (own, known), value in zip(pairs, moved, strict=True):
        if known is None:
            reason = f"{own.reason}, moved by {value - own.value:+.2f}"
            grades.append(Grade(value, None, reason))
        else:
            grades.append(known)
    return grades
