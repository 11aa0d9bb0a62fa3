"""Choosing the winner under noise. Pure functions of grades; what each rule is worth:
docs/SEARCH.md.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from evomerge.searching.racing import t_quantile

# that an equal trial beats the mean: three standard errors of many tasks, more of few (Student
# 1908)
CHANCE = 0.00135


def finalists(scores: Mapping[int, float], count: int) -> list[int]:
    """The trials with the best scores, best first; the earlier one where two are equal."""
    return sorted(scores, key=lambda number: (-scores[number], number))[:count]


def lead(first: Mapping[str, float], second: Mapping[str, float]) -> tuple[float, float]:
    """By how much `first` stands above `second` over the tasks that both saw, and the paired
    standard error.
    """
    values = np.array([first[task] - second[task] for task in first if task in second], dtype=float)
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.inf
    return float(values.mean()) if len(values) else 0.0, float(error)


def choose(
    grades: Mapping[str, Mapping[str, float]], default: str = "mean", chance: float = CHANCE
) -> str:
    """The winner's name. `grades` are name -> task -> grade on the validation tasks, finalists best
    first.

    The default stands unless another beats it in a one-sided paired t test at the level `chance`;
    among several the one with the largest lead. A pair's variance is at least twice that within
    tasks among all finalists: a few rounded grades often differ by chance not at all. Without a
    default among the names the best mean grade wins.
    """
    if default not in grades:
        return max(grades, key=lambda name: float(np.mean(list(grades[name].values()))))
    tasks = [task for task in grades[default] if all(task in found for found in grades.values())]
    if len(tasks) < 2 or len(grades) < 2:
        return default
    values = np.array([[grades[name][task] for task in tasks] for name in grades], dtype=float)
    floor = 2 * float(values.var(axis=0, ddof=1).mean())
    needed, leads = t_quantile(chance, len(tasks) - 1), {}
    for name, row in zip(grades, values, strict=True):
        difference = row - values[list(grades).index(default)]
        error = np.sqrt(max(float(difference.var(ddof=1)), floor) / len(tasks))
        if name != default and difference.mean() > needed * error:
            leads[name] = float(difference.mean())
    return max(leads, key=lambda name: leads[name], default=default)
