"""When a search ends, and why: candidates, wall time, money, or convergence, whichever comes first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.console import duration, seconds
from evomerge.searching.ledger import TrialRecord
from evomerge.searching.verdict import metric_values
from evomerge.study import SearchSection

NOISE = 2.0  # standard errors that a generation's mean must gain to count as better


@dataclass(frozen=True)
class Spent:
    """What a study has spent in all its runs: seconds, and the judge's money in the currency of its
    prices.
    """

    seconds: float = 0.0
    money: float = 0.0


def why_stop(s: SearchSection, candidates: int, spent: Spent) -> str | None:
    """The reason to begin no further candidate, in words; None: go on."""
    if candidates >= s.trials:
        return f"all {s.trials} candidates are done"
    limit = None if s.time_limit is None else seconds(s.time_limit)
    if limit is not None and spent.seconds >= limit:
        return f"the time limit of {s.time_limit} is reached after {candidates} of {s.trials} candidates ({duration(spent.seconds)})"
    money = spent.money + spent.seconds / 3600 * s.hourly_price
    if s.max_cost is not None and money >= s.max_cost:
        return (
            f"{money:.2f} of {s.max_cost:g} are spent after {candidates} of {s.trials} candidates"
        )
    return None


def why_converged(
    s: SearchSection,
    generations: Sequence[Sequence[TrialRecord]],
    sigma: float,
    levels: Mapping[str, float],
    metric: str,
) -> str | None:
    """The same between two generations, from the complete ones and the next step size. `levels` are
    the tasks' by the references.
    """
    if s.min_sigma is not None and sigma < s.min_sigma:
        return f"converged: the step size is {sigma:.3g}, below {s.min_sigma:g}"
    if (
        s.patience is not None
        and len(generations) > s.patience
        and not _gained(generations, s.patience, levels, metric)
    ):
        return f"converged: no gain beyond noise in {s.patience} generations"
    return None


def _gained(
    generations: Sequence[Sequence[TrialRecord]],
    patience: int,
    levels: Mapping[str, float],
    metric: str,
) -> bool:
    """Whether one of the last generations stands above the best before them by more than NOISE
    standard errors.

    A generation's variance is that of its candidates' scores over their number, and where it
    answered n of the N tasks that of the tasks it happened to get, s_d² (1/n - 1/N), s_d² the
    variance of grade - level: tasks that all answer are no noise.
    """
    means = [float(np.mean([r.score for r in generation])) for generation in generations]
    errors = [_error(generation, levels, metric) for generation in generations]
    before = int(np.argmax(means[:-patience]))
    return any(
        mean - means[before] > NOISE * float(np.hypot(error, errors[before]))
        for mean, error in zip(means[-patience:], errors[-patience:], strict=True)
    )


def _error(generation: Sequence[TrialRecord], levels: Mapping[str, float], metric: str) -> float:
    scores = np.array([r.score for r in generation], dtype=float)
    scatter = float(scores.var(ddof=1)) / len(scores) if len(scores) > 1 else 0.0
    drawn = []
    for r in generation:
        above = np.array(
            [
                value - levels[task]
                for task, value in metric_values(r.grades, metric).items()
                if task in levels
            ]
        )
        drawn.append(
            float(above.var(ddof=1)) * (1 / len(above) - 1 / len(levels)) if len(above) > 1 else 0.0
        )
    return float(np.sqrt(scatter + np.mean(drawn)))
