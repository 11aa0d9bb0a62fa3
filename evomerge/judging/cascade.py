"""The cascade judge: the learned judge grades every answer, the llm judge those that decide who is in the better half.

Pure decisions over a generation's grades stand here; search/rounds.py asks. Whatever is no candidate of a generation
(references, the distribution's mean, validation and verdict) is graded by the llm judge alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evomerge.answering.engine import Answer
from evomerge.judging.grade import Grade, PendingGrades
from evomerge.judging.learned import LearnedJudge
from evomerge.judging.llm import LlmJudge
from evomerge.study import JudgeSection
from evomerge.tasks import Task

FEWEST = 4  # answers of a candidate that the llm judge grades before anything is decided


class CascadeJudge:
    """`dear` is what counts; `cheap` stands in for it where it changes nothing."""

    def __init__(self, section: JudgeSection, cache: Path | None = None, seed: int = 0, total: bool = True) -> None:
        """As `LlmJudge`; also raises InputError for the learned judge's file."""
        self.cheap = LearnedJudge(section.file or "")
        self.dear = LlmJudge(section, cache, seed, total)
        self.error = section.error
        self.name = f"cascade:{self.dear.name}"
        self.version = sha256(f"{self.dear.version}/{self.cheap.version}/{self.error}".encode()).hexdigest()[:12]

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


def estimates(cheap: NDArray[np.float64], dear: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """([c] means, [c, t] residuals) from the learned grades [c, t] and the llm's, nan where it was not asked.

    mean = mean(cheap over all tasks) + mean(dear - cheap over those asked): unbiased for the llm's mean whatever the learned
    judge is worth (prediction-powered inference, Angelopoulos et al. 2023, arXiv 2301.09633, with fresh grades counted in).
    """
    residual = dear - cheap
    asked = ~np.isnan(residual)
    shift = np.where(asked, residual, 0.0).sum(axis=1) / np.maximum(asked.sum(axis=1), 1)
    return cheap.mean(axis=1) + shift, residual


def undecided(cheap: NDArray[np.float64], dear: NDArray[np.float64], keep: int, error: float) -> set[int]:
    """Candidates of whom it is open whether they are among the better `keep`.

    A candidate is decided when its estimate is further from the border (midway between the estimates in places `keep` and
    `keep` + 1) than z standard errors; each is wrong with a share of at most error / candidates (Bonferroni). A standard error is
    s / √n √(1 - n / N) of the n residuals, with s that of the average candidate where its own is smaller; nothing is open
    where all were asked.
    """
    from statistics import NormalDist

    count, tasks = cheap.shape
    means, residual = estimates(cheap, dear)
    n = (~np.isnan(residual)).sum(axis=1)
    unfinished = {i for i in range(count) if n[i] < tasks}
    if count <= keep or (n < min(FEWEST, tasks)).any():
        return unfinished if count > keep else set()
    spread = np.array([np.nanstd(row, ddof=1) if m > 1 else 0.0 for row, m in zip(residual, n, strict=True)])
    spread = np.maximum(spread, spread.mean())
    errors = spread / np.sqrt(n) * np.sqrt(1 - n / tasks)
    ordered = np.sort(means)[::-1]
    border = (ordered[keep - 1] + ordered[keep]) / 2
    z = NormalDist().inv_cdf(1 - error / count)
    return {i for i in unfinished if abs(means[i] - border) <= z * errors[i]}


def composed(cheap: Sequence[Grade], dear: Sequence[Grade | None]) -> list[Grade]:
    """A candidate's grades: the llm's where it was asked, elsewhere the learned one moved by their mean difference, so that the
    grades' mean is the estimate. Such grades may leave 1 to 5."""
    differences = [d.value - c.value for c, d in zip(cheap, dear, strict=True) if d is not None]
    shift = float(np.mean(differences)) if differences else 0.0
    return [
        d if d is not None else Grade(c.value + shift, None, f"{c.reason}, moved by {shift:+.2f}") for c, d in zip(cheap, dear, strict=True)
    ]
