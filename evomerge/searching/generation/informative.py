"""Which tasks a generation answers: those on which models differ, more often than the others.

A task on which all models so far have the same grade says little about a candidate. A task's chance
of being drawn grows with how much the grades on it differ, and its grade counts with the inverse of
that chance, so that the expected score remains that of all tasks (Horvitz and Thompson 1952).
docs/SEARCH.md reports what it contributes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
Grades: TypeAlias = Mapping[str, float]  # of one model, by task
FLOOR = 0.2  # the least chance of a task, as a share of the mean chance
PRIOR = 0.3  # a task's variance counts the mean variance as so many observations


def spreads(groups: Iterable[Sequence[Grades]], tasks: Sequence[str]) -> Array:
    """The standard deviation of the grades on each task, (n,), pooled over groups of models.

    A group's models were graded on the same tasks; what lies between groups does not count. Tasks
    with few grades are drawn towards the mean variance. 0 everywhere where nothing differs.
    """
    place = {task: i for i, task in enumerate(tasks)}
    squares, freedom = np.zeros(len(tasks)), np.zeros(len(tasks))
    for group in groups:
        table = np.full((len(group), len(tasks)), np.nan)
        for row, grades in zip(table, group, strict=True):
            for task in grades.keys() & place.keys():
                row[place[task]] = grades[task]
        seen = ~np.isnan(table)
        count = seen.sum(axis=0)
        filled = np.where(seen, table, 0.0)
        mean = filled.sum(axis=0) / np.maximum(count, 1)
        squares += (np.where(seen, table - mean, 0.0) ** 2).sum(axis=0)
        freedom += np.maximum(count - 1, 0)
    return pooled_spread(squares, freedom)


def pooled_spread(squares: Array, freedom: Array) -> Array:
    """The standard deviations, (n,), of sums of squares with these degrees of freedom."""
    mean = squares.sum() / max(freedom.sum(), 1.0)
    found: Array = np.sqrt((squares + PRIOR * mean) / (freedom + PRIOR))
    return found


def inclusion_chances(spread: Array, size: int) -> Array:
    """Each task's chance, (n,), to be among the `size` < n that are drawn; they add up to `size`.

    They grow linearly with `spread`, (n,), from FLOOR of the mean chance on, and end at 1.
    """
    n = len(spread)
    least = FLOOR * size / n
    found, free = np.full(n, least), np.full(n, True)
    while free.any():
        left = size - found[~free].sum()
        rest = spread * free
        if rest.any():
            wanted = least + (left - least * free.sum()) * rest / rest.sum()
        else:
            wanted = np.full(n, left / free.sum())
        found[free] = wanted[free]
        over = free & (wanted > 1)
        if not over.any():
            break
        found[over] = 1.0
        free &= ~over
    return found


def systematic_sample(chances: Array, order: Sequence[int], offset: float) -> list[int]:
    """Indices of the drawn tasks, in that order (Madow 1949).

    The chances lie end to end along `order`, and offset, offset + 1, ... mark the tasks to draw.
    """
    places = np.array(order)
    ends = np.cumsum(chances[places])
    ends[-1] = np.rint(ends[-1])  # their sum, which rounding may have missed
    marks = np.floor(ends - offset)
    taken = np.diff(marks, prepend=np.floor(-offset)) > 0
    return [int(i) for i in places[taken]]
