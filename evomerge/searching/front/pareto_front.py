"""Pareto fronts as pure functions of (n, m) values, of which more is better."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# how far below the worst point a volume begins, in ranges of an objective: the ends count for much
MARGIN = 1.0


def non_dominated(values: np.ndarray) -> list[int]:
    """The rows that no other is at least as good as in all objectives; of equal rows the first."""
    found = []
    for i, row in enumerate(values):
        as_good = (values >= row).all(axis=1)
        better = as_good & (values > row).any(axis=1)
        if not better.any() and not as_good[:i].any():
            found.append(i)
    return found


def hypervolume(values: np.ndarray, worst: np.ndarray) -> float:
    """The volume between `worst` (m,) and what the rows dominate; 0 for rows that are not above it.

    Slice by slice of the last objective (While et al. 2006, HSO), which is quick for a few points.
    """
    values = values[(values > worst).all(axis=1)]
    if not len(values):
        return 0.0
    if values.shape[1] == 1:
        return float(values.max() - worst[0])
    values = values[np.argsort(-values[:, -1], kind="stable")]
    lower = [*values[1:, -1].tolist(), float(worst[-1])]
    volume = 0.0
    for i, end in enumerate(lower):
        depth = float(values[i, -1]) - end
        if depth > 0:
            volume += depth * hypervolume(values[: i + 1, :-1], worst[:-1])
    return volume


def thinned(values: np.ndarray, most: int) -> list[int]:
    """At most `most` of the rows: the one that contributes least volume goes, again and again."""
    kept = list(range(len(values)))
    scaled = _scaled(values)
    worst = np.full(values.shape[1], -MARGIN)
    while len(kept) > most:
        left = []
        for i in kept:
            left.append(hypervolume(scaled[[j for j in kept if j != i]], worst))
        del kept[int(np.argmax(left))]
    return kept


def knee(values: np.ndarray, among: Sequence[int]) -> int:
    """The row, `among` these, that lies furthest beyond the plane through the front's ends.

    In units of the front's ranges that is the largest sum (Das 1999, normal boundary
    intersection).
    """
    sums = _scaled(values).sum(axis=1)
    return max(among, key=lambda i: float(sums[i]))


def _scaled(values: np.ndarray) -> np.ndarray:
    """Each objective from 0, its lowest value, to 1; 0 where it has one value."""
    low, high = values.min(axis=0), values.max(axis=0)
    scaled: np.ndarray = (values - low) / np.where(high > low, high - low, 1.0)
    return scaled
