"""How far two tables of grades agree, with bootstrap intervals over the models.

A table is [models, tasks] of grades, NaN where there is none. Everything is computed with
whole-number weights on the models: all one for the value itself, and how often each model was drawn
for the resamples, so that a resample needs no table of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]
GAPS = {"0.05-0.15": (0.05, 0.15), "0.15-0.3": (0.15, 0.3), "0.3-0.6": (0.3, 0.6)}
RESAMPLES, SEED = 1000, 0
# models for a task's Spearman, tasks for a model's: two points always agree or disagree wholly
FEWEST = 3


@dataclass(frozen=True)
class Agreement:
    """A figure with its 95 % interval, each None where it cannot be told, and `n` tasks, models or
    pairs behind it.
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
    """What `compare` finds; `within_task` is the honest one."""

    within_task: Agreement
    model_level: Agreement
    within_model: Agreement
    difficulty_baseline: Agreement
    pairs: dict[str, Agreement]


def compare(judge: Table, reference: Table, resamples: int = RESAMPLES) -> Agreements:
    """Agreement of two tables [models, tasks]; only cells that both have count.

    Intervals are percentiles 2.5 and 97.5 over resamples of the models, drawn with replacement; the
    tasks stay, since a search keeps its tasks and meets other models. The difficulty baseline is
    what agreement within a model comes to for somebody who has not read its answers and says for
    each task the mean of the other models' reference grades.
    """
    both = ~(np.isnan(judge) | np.isnan(reference))
    judge, reference = np.where(both, judge, np.nan), np.where(both, reference, np.nan)
    n = len(judge)
    draws = (
        np.random.default_rng(SEED)
        .multinomial(n, np.full(n, 1 / n), size=resamples)
        .astype(np.float64)
    )
    weights = np.vstack([np.ones(n), draws])  # [1 + resamples, models]

    by_task = [_task_spearman(judge[:, t], reference[:, t], weights) for t in range(judge.shape[1])]
    told = [row for row in by_task if not np.isnan(row[0])]
    means, expected = _row_means(judge), _row_means(reference)
    own = [spearman(judge[m], reference[m]) for m in range(n)]
    difficulty = _others_mean(reference)
    baseline = [spearman(difficulty[m], reference[m]) for m in range(n)]
    return Agreements(
        _agreement(_mean(told), len(told)),
        _agreement(_task_spearman(means, expected, weights), n),
        _agreement(*_weighted(own, weights)),
        _agreement(*_weighted(baseline, weights)),
        {
            name: _agreement(*_ordered(means, expected, low, high, weights))
            for name, (low, high) in GAPS.items()
        },
    )


def spearman(a: Table, b: Table) -> float:
    """Spearman's rank correlation over the places that both have; NaN with under three, or where
    one is constant.
    """
    return float(_task_spearman(a, b, np.ones((1, len(a))))[0])


def _task_spearman(a: Table, b: Table, weights: Table) -> Table:
    """[resamples] of Spearman's correlation of a and b [n], each place as often as weights
    [resamples, n] say.

    A value's rank is the weight below it and half of that at it (mid-ranks), and Spearman's is
    Pearson's of the ranks.
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
        return np.where(
            spread > 1e-12,
            (weights * x * y).sum(1) / np.sqrt(np.where(spread > 1e-12, spread, 1)),
            np.nan,
        )


def _ordered(
    means: Table, expected: Table, low: float, high: float, weights: Table
) -> tuple[Table, int]:
    """[resamples] shares of the model pairs with low <= gap < high that are ordered as expected (a
    tie is half), and their number.
    """
    gaps = np.round(expected[:, None] - expected[None], 9)
    pair = (gaps >= low) & (gaps < high)
    ahead = means[:, None] - means[None]
    right = pair * ((ahead > 1e-9) + 0.5 * (np.abs(ahead) <= 1e-9))
    with np.errstate(invalid="ignore", divide="ignore"):
        shares: Table = np.einsum(
            "ri,ij,rj->r", weights, right, weights, optimize=True
        ) / np.einsum("ri,ij,rj->r", weights, pair.astype(np.float64), weights, optimize=True)
    return shares, int(pair.sum())


def _others_mean(reference: Table) -> Table:
    """[models, tasks]: the mean of the other models' grades."""
    n, total = (~np.isnan(reference)).sum(0), np.nansum(reference, 0)
    own = np.nan_to_num(reference)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((total - own) / (n - ~np.isnan(reference)))


def _row_means(table: Table) -> Table:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.nansum(table, 1) / (~np.isnan(table)).sum(1))


def _weighted(values: list[float], weights: Table) -> tuple[Table, int]:
    have = ~np.isnan(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return weights[:, have] @ np.asarray(values)[have] / weights[:, have].sum(1), int(
            have.sum()
        )


def _mean(rows: list[Table]) -> Table:
    """Mean over tasks, in each resample over those that can be told there."""
    if not rows:
        return np.full(1, np.nan)
    table = np.stack(rows)
    return np.asarray(np.nansum(table, 0) / np.maximum(1, (~np.isnan(table)).sum(0)))


def _agreement(figures: Table, n: int) -> Agreement:
    """The first figure, and percentiles of the rest."""
    drawn = figures[1:][~np.isnan(figures[1:])]

    def percentile(q: float) -> float | None:
        return round(float(np.percentile(drawn, q)), 4) if len(drawn) else None

    if np.isnan(figures[0]):
        return Agreement(None, None, None, n)
    return Agreement(round(float(figures[0]), 4), percentile(2.5), percentile(97.5), n)
