"""Cheaper rankings: which tasks a generation answers, and which of its candidates may stop early.

Pure functions of grades; docs/SEARCH.md reports what each contributes.
"""

from __future__ import annotations

import hashlib
import math
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.searching.estimates import t_quantile

BLOCK = 8  # tasks between two looks of a race


def task_order(seed: int, generation: int, n: int) -> list[int]:
    """The generation's random order of n tasks: a function of seed and generation alone."""
    digest = hashlib.sha256(f"{seed}/{generation}/tasks".encode()).digest()
    order: list[int] = (
        np.random.default_rng(int.from_bytes(digest[:8], "big")).permutation(n).tolist()
    )
    return order


def draw_offset(seed: int, generation: int) -> float:
    """The generation's random number of systematic sampling, 0 to below 1."""
    digest = hashlib.sha256(f"{seed}/{generation}/offset".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def subset_size(n_tasks: int, first: int, sigma_ratio: float) -> int:
    """How many of the n_tasks a generation answers: first / sigma_ratio², from `first` to n_tasks.

    sigma_ratio is the step size over the first one. Differences between candidates shrink with the
    step size and a mean's variance with the number of answers, so that the square keeps signal over
    noise as it was at the start.
    """
    wanted = first / max(sigma_ratio, 1e-6) ** 2
    return min(n_tasks, max(first, math.ceil(min(wanted, n_tasks))))


def blocks(size: int, block: int = BLOCK) -> list[range]:
    """The positions 0 to size - 1 in blocks; a rest below half a block joins the one before it."""
    count = max(1, round(size / block))
    edges = [round(i * size / count) for i in range(count + 1)]
    return [range(low, high) for low, high in pairwise(edges)]


def hopeless(grades: NDArray[Any], keep: int, error: float, looks: int = 1) -> set[int]:
    """Candidates that cannot enter the better `keep` any more.

    Grades are (candidates, tasks), nan where unseen.
    Candidate i is out when at least `keep` others are better than it by a one-sided paired t test
    over the tasks that both saw. Where i does belong to the better `keep`, one of these others does
    not, and that test alone erred: of such pairs there are keep * (candidates - keep), each tested
    at `looks` looks, so each test has the level error / (looks * keep * (candidates - keep)) and
    all of them together err with at most `error` per generation (Bonferroni; racing as in
    Heidrich-Meisner and Igel 2009, https://doi.org/10.1145/1553374.1553426). The variance is the
    pair's own or that of the average pair, whichever is larger: by chance, few grades often do not
    differ at all. Bounds that assume nothing beyond the grades' range (Hoeffding, empirical
    Bernstein) never decide here.
    """
    count = len(grades)
    if count <= keep:
        return set()
    level = error / (looks * keep * (count - keep))
    n, mean, variance = paired_moments(grades)
    pairs = (n > 1) & ~np.eye(count, dtype=bool)
    if not pairs.any():
        return set()
    variance = np.maximum(variance, variance[pairs].mean())
    needed = np.full(n.shape, np.inf)
    for count_seen in np.unique(n[n > 1]):
        needed[n == count_seen] = t_quantile(level, int(count_seen) - 1)
    better = pairs & (mean > needed * np.sqrt(variance / np.maximum(n, 1)))
    return {i for i in range(count) if better[i].sum() >= keep}


def paired_moments(grades: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """[i, j]: tasks that both saw, and mean and variance there of what j has more than i."""
    differences = grades[None, :, :] - grades[:, None, :]  # [i, j, t]
    seen = ~np.isnan(differences)
    n = seen.sum(axis=2)
    filled = np.where(seen, differences, 0.0)
    mean = filled.sum(axis=2) / np.maximum(n, 1)
    squares = (np.where(seen, differences - mean[:, :, None], 0.0) ** 2).sum(axis=2)
    return n, mean, squares / np.maximum(n - 1, 1)
