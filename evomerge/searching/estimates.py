"""Means over tasks, their standard errors and intervals: pure functions of grades."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import numpy as np

Z95 = 1.96  # standard errors on either side of a mean in a 95 % interval


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error, s / sqrt(n) with n - 1 in s; one value has no error: None."""
    array = np.asarray(values, dtype=float)
    if len(array) < 2:
        return float(array.mean()), None
    return float(array.mean()), float(array.std(ddof=1) / np.sqrt(len(array)))


def stratified_error(values: Mapping[str, float], group: Mapping[str, int]) -> float | None:
    """Standard error of the mean of values by task, whose tasks come from groups of fixed sizes.

    √Σ (n_g/N)² s_g² / n_g (Cochran 1977, chapter 5). A single value in a group has no variance:
    that of all values is used instead.
    """
    if len(values) < 2:
        return None
    return _error_and_freedom(list(values.values()), [group[task] for task in values])[0]


def paired_interval(
    differences: Sequence[float], groups: Sequence[int] = ()
) -> tuple[float, float]:
    """95 % interval of the mean of two or more paired differences, by Student's t (Student 1908).

    With `groups`, one for each difference, the error is that of `stratified_error`, with the
    degrees of freedom of Satterthwaite (1946). On 50 tasks the percentile bootstrap holds the true
    difference in 92 % of right-or-wrong studies and this in 94 % (docs/SEARCH.md).
    """
    error, freedom = _error_and_freedom(differences, groups or [0] * len(differences))
    mean, away = float(np.mean(differences)), t_quantile(0.025, freedom) * error
    return mean - away, mean + away


def _error_and_freedom(values: Sequence[float], groups: Sequence[int]) -> tuple[float, float]:
    """The stratified error of a mean, and its degrees of freedom: (Σ e_g²)² / Σ e_g⁴ / (n_g - 1).

    `values` are two or more. One that is alone in its group has the variance of all.
    """
    parts: dict[int, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        parts.setdefault(group, []).append(value)
    total, fourth = 0.0, 0.0
    for part in parts.values():
        error, known = mean_and_error(part)[1], len(part)
        if error is None:
            error, known = float(np.std(values, ddof=1)), len(values)
        share = (len(part) / len(values)) ** 2 * error**2
        total += share
        fourth += share**2 / (known - 1)
    freedom = total**2 / fourth if fourth else len(values) - 1
    return float(np.sqrt(total)), freedom


def task_means(graded: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Task key -> its mean over the models that have a value for it."""
    values: dict[str, list[float]] = {}
    for grades in graded:
        for task, value in grades.items():
            values.setdefault(task, []).append(value)
    return {task: float(np.mean(known)) for task, known in values.items()}


def estimate(
    grades: Mapping[str, float],
    task_baselines: Mapping[str, float],
    chances: Mapping[str, float] | None = None,
) -> tuple[float, float | None, float | None]:
    """A mean over all tasks that have a baseline, its standard error, and the variance of the draw.

    That of `two_phase_mean`, or with the `chances` of the tasks that were drawn, by key, of
    `difference_estimate`. Where the grades are of all tasks it is the plain mean, and there was no
    draw: None.
    """
    if len(grades) >= len(task_baselines) or not grades.keys() <= task_baselines.keys():
        return *mean_and_error(list(grades.values())), None
    if chances is None:
        return two_phase_mean(grades, task_baselines)
    drawn = {}
    for task, chance in chances.items():
        if task in task_baselines:
            drawn[task] = chance
    return difference_estimate(grades, task_baselines, drawn)


def two_phase_mean(
    grades: Mapping[str, float], task_baselines: Mapping[str, float]
) -> tuple[float, float | None, float]:
    """A candidate's score over all search tasks, its standard error, and `draw_variance`.

    `task_baselines` are the tasks' mean grades by the references, which answered all: easy tasks
    must not flatter a candidate that drew them. score = mean(grade - baseline over the n tasks
    seen) + mean(baseline over all N); the error, of tasks like these, is that of two-phase
    sampling, s_d² (1/n - 1/N) + s_g² / N, with s_d² the variance of grade - baseline and s_g² that
    of the grade (Cochran 1977, chapter 12). With every task seen this is s_g / √N, the error of a
    plain mean.
    """
    values, above, known = _beside_baselines(grades, task_baselines)
    total = len(known)
    score, drawn = float(above.mean() + np.mean(known)), draw_variance(above, total)
    if len(values) > 1:
        return score, math.sqrt(drawn + values.var(ddof=1) / total), drawn
    # a single grade has no spread: that of the baselines is used instead
    return score, float(np.std(known, ddof=1)) if total > 1 else None, drawn


def draw_variance(above: np.ndarray, total: int) -> float:
    """s_d² (1/n - 1/N): a mean's variance from drawing n of `total` tasks; 0 for a single one."""
    if len(above) < 2:
        return 0.0
    return float(above.var(ddof=1)) * (1 / len(above) - 1 / total)


def difference_estimate(
    grades: Mapping[str, float],
    task_baselines: Mapping[str, float],
    chances: Mapping[str, float],
) -> tuple[float, float | None, float]:
    """The same as `two_phase_mean` where each task had a chance of its own to be drawn.

    `chances` are those of all tasks that were drawn; of these a candidate may have seen only a
    random part, which divides them further.
    score = sum over the tasks seen of (grade - baseline) / chance, over N, + mean(baseline over
    all N): the difference estimator, whose expectation is the mean over all N (Särndal, Swensson
    and Wretman 1992, 6.3). Its variance is Hájek's (1964) for fixed sizes: with
    e = (grade - baseline) / chance and B the mean of e weighted by 1 - chance, n / (n - 1) times
    the sum of (1 - chance) (e - B)², over N². s_g² weighs the grades by the inverse of their
    chances.
    """
    values, above, known = _beside_baselines(grades, task_baselines)
    n, total = len(values), len(known)
    chance = np.array([chances[task] for task in grades]) * n / len(chances)
    expanded, left = above / chance, 1 - chance
    score = float(expanded.sum() / total + np.mean(known))
    if n < 2:
        return score, float(np.std(known, ddof=1)) if total > 1 else None, 0.0
    center = left @ expanded / left.sum() if left.any() else 0.0
    drawn = float(left @ np.square(expanded - center)) * n / (n - 1) / total**2
    share = 1 / chance / (1 / chance).sum()
    spread = float(share @ np.square(values - share @ values)) * n / (n - 1)
    return score, math.sqrt(drawn + spread / total), drawn


def _beside_baselines(
    grades: Mapping[str, float], task_baselines: Mapping[str, float]
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """The grades, what they have more than their tasks' baselines, and all baselines."""
    values = np.array(list(grades.values()), dtype=float)
    above = values - np.array([task_baselines[task] for task in grades], dtype=float)
    return values, above, list(task_baselines.values())


@lru_cache(maxsize=4096)
def t_quantile(level: float, freedom: float) -> float:
    """What Student's t exceeds with probability `level`."""
    from scipy.special import stdtrit  # scipy.stats calls it too, and takes longer to import

    return -float(stdtrit(freedom, level))  # symmetric about 0
