"""The cascade judge: the learned judge grades every answer, the llm judge those that decide who is
in the better half.

Pure decisions over a generation's grades stand here; search/rounds.py asks. Whatever is no
candidate of a generation (references, the distribution's mean, validation and verdict) is graded by
the llm judge alone.
What it saves and how often it errs: docs/JUDGES.md.
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

EPSILON = 1e-9  # of a grade: where nothing is left of the residuals, equal candidates are decided

Floats: TypeAlias = NDArray[np.float64]
# (candidates, tasks) -> the llm judge's grades [candidates, tasks]
Ask: TypeAlias = Callable[[list[int], list[int]], Floats]


class CheapJudge(Judge, Protocol):
    """A judge that knows which tasks it can grade."""

    def check(self, tasks: Iterable[Task]) -> None:
        """Raise TaskError for a task that it cannot grade."""


class DearJudge(Judge, WaitingJudge, Protocol):
    """A judge that is waited for and paid for."""

    @property
    def cost(self) -> float: ...


class CascadeJudge:
    """`dear` is what counts; `cheap` stands in for it where it changes nothing, but for a share
    `error` of the generations.
    """

    def __init__(self, cheap: CheapJudge, dear: DearJudge, error: float) -> None:
        self.cheap, self.dear, self.error = cheap, dear, error
        self.name = f"cascade:{dear.name}"
        self.version = sha256(f"{dear.version}/{cheap.version}/{error}".encode()).hexdigest()[:12]

    @property
    def cost(self) -> float:
        """What the llm judge cost, in the currency of its prices."""
        return self.dear.cost

    def check(self, tasks: Sequence[Task]) -> None:
        """Raise TaskError for a task that the learned judge was not fitted on."""
        self.cheap.check(tasks)

    def grade(self, task: Task, answer: Answer) -> Grade:
        """The llm judge's grade."""
        return self.dear.grade(task, answer)

    def submit(self, tasks: Sequence[Task], answers: Sequence[Answer]) -> PendingGrades:
        """Ask the llm judge. Raises as its `submit`."""
        return self.dear.submit(tasks, answers)

    def close(self, drain: bool = True) -> None:
        """Close the llm judge."""
        self.dear.close(drain)


def settle(
    cheap: Floats, ask: Ask, keep: int, error: float, blocks: Iterable[Sequence[int]]
) -> Floats:
    """The llm judge's grades [c, t] as far as the better `keep` hang on them, nan elsewhere;
    `cheap` [c, t] are the learned ones.

    The tasks come in `blocks`, the same for all candidates.
    """
    dear = np.full(cheap.shape, np.nan)
    for tasks in blocks:
        asked = sorted(undecided(cheap, dear, keep, error))
        if not asked:
            break
        dear[np.ix_(asked, list(tasks))] = ask(asked, list(tasks))
    return dear


def effects(residual: Floats) -> tuple[Floats, Floats]:
    """([c] shifts of the candidates, [t] of the tasks): the least squares fit of shift + task to
    the residuals that are there.

    A task's shift is how the learned judge misjudges it in all of a generation's answers, which are
    much alike; it must not count for those who were asked about the task alone. The shifts of the
    tasks that were asked average to 0, those of others are 0.
    """
    asked = ~np.isnan(residual)
    r, there = np.where(asked, residual, 0.0), asked.astype(float)
    by_candidate, by_task = there.sum(axis=1), there.sum(axis=0)
    share = there / np.maximum(by_task, 1)
    # tasks eliminated: (diag(n) - A diag(1/m) A') shift = row sums - A diag(1/m) column sums;
    # singular along 1, lstsq takes the shortest
    shift = np.linalg.lstsq(
        np.diag(by_candidate) - there @ share.T, r.sum(axis=1) - share @ r.sum(axis=0), rcond=1e-9
    )[0]
    task = np.where(
        by_task > 0, (r - there * shift[:, None]).sum(axis=0) / np.maximum(by_task, 1), 0.0
    )
    level = float(task[by_task > 0].mean()) if asked.any() else 0.0
    return np.where(by_candidate > 0, shift, 0.0) + level, np.where(by_task > 0, task - level, 0.0)


def completed(cheap: Floats, dear: Floats) -> Floats:
    """[c, t]: the llm's grades, and where it was not asked the learned ones moved by the shifts of
    candidate and task.

    The means of its rows estimate the llm's means without bias whatever the learned judge is worth
    (prediction-powered inference, Angelopoulos et al. 2023, arXiv 2301.09633, with the fresh grades
    counted in).
    """
    shift, task = effects(dear - cheap)
    return np.where(np.isnan(dear), cheap + shift[:, None] + task, dear)


def undecided(cheap: Floats, dear: Floats, keep: int, error: float) -> set[int]:
    """Candidates of whom it is open whether they are among the better `keep`; at first all, whose
    grades need a level.

    One is decided when its estimate is further from the border (midway between the estimates in
    places `keep` and `keep` + 1) than z standard errors, so that each is wrong with a share of at
    most error / candidates / 2 (Bonferroni; the half makes up for looking after every block). A
    standard error is s / √n √(1 - n / N), s of the candidate's n residuals without the shifts, and
    that of the average candidate where its own is smaller.
    """
    count, tasks = cheap.shape
    residual = dear - cheap
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
    means = completed(cheap, dear).mean(axis=1)
    ordered = np.sort(means)[::-1]
    border = (ordered[keep - 1] + ordered[keep]) / 2
    z = NormalDist().inv_cdf(1 - error / count / 2)
    return {i for i in unfinished if abs(means[i] - border) < z * errors[i] - EPSILON}


def composed(
    cheap: Sequence[Grade], dear: Sequence[Grade | None], values: Sequence[float] | None = None
) -> list[Grade]:
    """A candidate's grades: the llm's where it was asked, else the learned one moved to its value
    of `completed`, so that the grades' mean is the estimate; without `values`, moved by their mean
    difference. Such grades may leave 1 to 5.
    """
    differences = [d.value - c.value for c, d in zip(cheap, dear, strict=True) if d is not None]
    shift = float(np.mean(differences)) if differences else 0.0
    moved = (
        [c.value + shift for c in cheap] if values is None else [round(float(v), 6) for v in values]
    )
    return [
        d if d is not None else Grade(value, None, f"{c.reason}, moved by {value - c.value:+.2f}")
        for c, d, value in zip(cheap, dear, moved, strict=True)
    ]
