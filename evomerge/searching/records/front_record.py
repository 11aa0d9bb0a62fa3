"""A front as it is shown and stored with the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FrontValue:
    """The value of an objective, and its 95 % interval; None where there is no interval."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class FrontPoint:
    """One trial with its value of each objective that it has; `name` says what it is."""

    trial: int
    name: str
    values: Mapping[str, FrontValue]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FrontPoint:
        """The inverse of `asdict`."""
        values = {name: FrontValue(**value) for name, value in data["values"].items()}
        return cls(data["trial"], data["name"], values)


@dataclass(frozen=True)
class Front:
    """The trials that no other beats in every objective, best in the first objective first.

    `maximize` and `minimize` name the objectives. `knee` is the number of the compromise among
    the points, from 1. `compared` are the parents and uniform weights, on held-out tasks only
    the best of these. With `held_out` the values are of the held-out tasks, else of the search
    tasks.
    """

    maximize: tuple[str, ...]
    minimize: tuple[str, ...]
    points: tuple[FrontPoint, ...]
    compared: tuple[FrontPoint, ...]
    knee: int
    held_out: bool = False

    @property
    def objectives(self) -> tuple[str, ...]:
        """The names of all objectives."""
        return (*self.maximize, *self.minimize)

    @property
    def middle(self) -> FrontPoint:
        """The compromise."""
        return self.points[self.knee - 1]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Front:
        """The inverse of `asdict`."""
        points = tuple(map(FrontPoint.from_dict, data["points"]))
        compared = tuple(map(FrontPoint.from_dict, data["compared"]))
        lists = tuple(data["maximize"]), tuple(data["minimize"])
        return cls(*lists, points, compared, data["knee"], data["held_out"])
