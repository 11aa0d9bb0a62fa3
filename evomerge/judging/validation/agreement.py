"""How far two tables of grades agree, with bootstrap intervals over the models.

A table is [models, tasks] of grades, NaN where there is none. Everything is computed with integer
weights on the models: all one for the value itself, and how often each model was drawn for the
resamples, so that a resample needs no separate table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]
GAPS = {"0.05-0.15": (0.05, 0.15), "0.15-0.3": (0.15, 0.3), "0.3-0.6": (0.3, 0.6)}
RESAMPLES, SEED = 1000, 0
# models for a task's Spearman, tasks for a model's: two points always agree or disagree completely
FEWEST = 3


@dataclass(frozen=True)
class Agreement:
    """A figure with its 95 % interval, and the `n` tasks, models or pairs behind it.

    `value`, `low` and `high` are None where they cannot be computed.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int

    def as_json(self) -> dict[str, float | None]:
        """value, low and high."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Agreements:
    """The result of `compare`; `within_task` is the figure to judge by."""

    within_task: Agreement
    model_level: Agreement
    within_model: Agreement
    difficulty_baseline: Agreement
    pairs: dict[str, Agreement]


def compare(judge: Table, reference: Table, resamples: int = RESAMPLES) -> Agreements:
    """Agreement of two tables [models, tasks]; only cells that both have count.

    Intervals are percentiles 2.5 and 97.5 over resamples of the models, drawn with replacement; the
    tasks stay, since a search keeps its tasks and meets other models. The difficulty baseline is
    the agreement within a model that is reached without reading its answers, by giving each task
    the mean of the other models' reference grades.
    """
    both = ~(np.isnan(judge) | np.isnan(reference))
    judge = np.where(both, judge, np.nan)
    reference = np.where(both, reference, np.nan)
    n = len(judge)
    rng = np.random.default_rng(SEED)
    draws = rng.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
    weights = np.vstack([np.ones(n), draws])  # [1 + resamples, models]

    by_task = [_task_spearman(judge[:, t], reference[:, t], weights) for t in range(judge.shape[1])]
    told = [row for row in by_task if not np.isnan(row[0])]
    means = _row_means(judge)
    expected = _row_means(reference)
    own = [spearman(judge[m], reference[m]) for m in range(n)]
    difficulty = _others_mean(reference)
    baseline = [spearman(difficulty[m], reference[m]) for m in range(n)]
    pairs = {}
    for name, (low, high) in GAPS.items():
        pairs[name] = _agreement(*_ordered(means, expected, low, high, weights))
    return Agreements(
        within_task=_agreement(_mean(told), len(told)),
        model_level=_agreement(_task_spearman(means, expected, weights), n),
        within_model=_agreement(*_weighted(own, weights)),
        difficulty_baseline=_agreement(*_weighted(baseline, weights)),
        pairs=pairs,
    )


def spearman(a: Table, b: Table) -> float:
    """Spearman's rank correlation over the places that both have.

    NaN for under three places, or where one side is constant.
    """
    return float(_task_spearman(a, b, np.ones((1, len(a))))[0])


def _task_spearman(a: Table, b: Table, weights: Table) -> Table:
    """[resamples] Spearman's correlations of a and b [n], weighted by `weights` [resamples, n].

    A value's rank is the weight below it plus half of the weight at it (mid-ranks); Spearman's
    correlation is Pearson's of the ranks.
    """
    have = ~(np.isnan(a) | np.isnan(b))
    if have.sum() < FEWEST:
        return np.full(len(weights), np.nan)
    a, b, weights = a[have], b[have], weights[:, have]
    total = weights.sum(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        ranks = []
        for values in (a, b):
            # [n, n]
            below = (values[None] < values[:, None]) + 0.5 * (values[None] == values[:, None])
            rank = weights @ below.T
            ranks.append(rank - (weights * rank).sum(1, keepdims=True) / total)
        x, y = ranks
        spread = (weights * x * x).sum(1) * (weights * y * y).sum(1)
        varies = spread > 1e-12
        product = (weights * x * y).sum(1) / np.sqrt(np.where(varies, spread, 1))
        return np.where(varies, product, np.nan)


def _ordered(
    means: Table, expected: Table, low: float, high: float, weights: Table
) -> tuple[Table, int]:
    """([resamples] shares of the model pairs that are ordered as expected, number of pairs).

    The pairs are those with low <= gap of the expected means < high; a tie counts half.
    """
    gaps = np.round(expected[:, None] - expected[None], 9)
    pair = (gaps >= low) & (gaps < high)
    ahead = means[:, None] - means[None]
    right = pair * ((ahead > 1e-9) + 0.5 * (np.abs(ahead) <= 1e-9))
    with np.errstate(invalid="ignore", divide="ignore"):
        shares: Table = _of_pairs(right.astype(np.float64), weights) / _of_pairs(
            pair.astype(np.float64), weights
        )
    return shares, int(pair.sum())


def _of_pairs(values: Table, weights: Table) -> Table:
    """[resamples] sums over the pairs of `values` [models, models] with both models' weights."""
    sums: Table = np.einsum("ri,ij,rj->r", weights, values, weights, optimize=True)
    return sums


def _others_mean(reference: Table) -> Table:
    """[models, tasks]: the mean of the other models' grades."""
    n = (~np.isnan(reference)).sum(0)
    total = np.nansum(reference, 0)
    own = np.nan_to_num(reference)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((total - own) / (n - ~np.isnan(reference)))


def _row_means(table: Table) -> Table:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.nansum(table, 1) / (~np.isnan(table)).sum(1))


def _weighted(values: list[float], weights: Table) -> tuple[Table, int]:
    """([resamples] weighted means of the values that are not NaN, their number)."""
    have = ~np.isnan(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = weights[:, have] @ np.asarray(values)[have] / weights[:, have].sum(1)
    return means, int(have.sum())


def _mean(rows: list[Table]) -> Table:
    """[resamples] means over the tasks that have a figure in the resample."""
    if not rows:
        return np.full(1, np.nan)
    table = np.stack(rows)
    return np.asarray(np.nansum(table, 0) / np.maximum(1, (~np.isnan(table)).sum(0)))


def _agreement(figures: Table, n: int) -> Agreement:
    """The first figure, with percentiles of the rest as its interval."""
    drawn = figures[1:][~np.isnan(figures[1:])]

    def percentile(q: float) -> float | None:
        if len(drawn):
            return round(float(np.percentile(drawn, q)), 4)
        return None

    if np.isnan(figures[0]):
        return Agreement(None, None, None, n)
    return Agreement(round(float(figures[0]), 4), percentile(2.5), percentile(97.5), n)
