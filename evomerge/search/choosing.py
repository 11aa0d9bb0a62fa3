"""Choosing the winner under noise. Pure functions of grades; what each rule is worth: docs/SEARCH.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

LEAD = 3.0  # standard errors by which a single trial must beat the mean on the validation tasks


def finalists(scores: Mapping[int, float], count: int) -> list[int]:
    """The trials with the best scores, best first; the earlier one where two are equal."""
    return sorted(scores, key=lambda number: (-scores[number], number))[:count]


def lead(first: Mapping[str, float], second: Mapping[str, float]) -> tuple[float, float]:
    """By how much `first` stands above `second` over the tasks that both saw, and the paired standard error."""
    values = np.array([first[task] - second[task] for task in first if task in second], dtype=float)
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.inf
    return float(values.mean()) if len(values) else 0.0, float(error)


def choose(grades: Mapping[str, Mapping[str, float]], default: str = "mean", k: float = LEAD) -> str:
    """The winner's name. `grades` are name -> task -> grade on the validation tasks, finalists best first.

    The default stands unless another beats it by more than k standard errors in a paired comparison; among several
    the one with the largest lead. Without a default among the names the best mean grade wins.
    """
    if default not in grades:
        return max(grades, key=lambda name: float(np.mean(list(grades[name].values()))))
    leads = {name: lead(grades[name], grades[default]) for name in grades if name != default}
    ahead: Sequence[str] = [name for name, (difference, error) in leads.items() if difference > k * error]
    return max(ahead, key=lambda name: leads[name][0], default=default)
