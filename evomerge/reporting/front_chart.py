"""Coordinates of the report's picture of a front; the markup is in templates/front.html."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evomerge.reporting.charts import PLOT, Axis, PlotArea, Tick, scale

if TYPE_CHECKING:
    from evomerge.searching.records.front_record import Front, FrontPoint, FrontValue

TICKS = 5  # about how many an axis has
LABEL_ABOVE, LABEL_BELOW = -7.0, 16.0  # pixels from a point to its label


@dataclass(frozen=True)
class FrontMark:
    """A point with its two intervals; `label` is its number on the front, or a model's name."""

    x: float
    y: float
    left: float
    right: float
    low: float
    high: float
    kind: str  # point, knee, or base, sibling or uniform beside the front
    label: str
    label_y: float
    title: str


@dataclass(frozen=True)
class FrontChart:
    """One objective against another; `path` joins the front's points."""

    x_name: str
    y_name: str
    path: str
    marks: list[FrontMark]
    xticks: list[Tick]
    yticks: list[Tick]
    area: PlotArea = PLOT


def front_charts(front: Front | None) -> list[FrontChart]:
    """The first objective against each of the others; [] for a front of a single point."""
    if front is None or len(front.points) < 2:
        return []
    first, *others = front.objectives
    return [_chart(front, other, first) for other in others]


def _chart(front: Front, x_name: str, y_name: str) -> FrontChart:
    on_front = {point.trial for point in front.points}
    beside = [point for point in front.compared if point.trial not in on_front]
    shown = []
    for point in (*front.points, *beside):
        if x_name in point.values and y_name in point.values:
            shown.append(point)
    x_ends: list[float] = []
    y_ends: list[float] = []
    for point in shown:
        x_ends += _ends(point.values[x_name])
        y_ends += _ends(point.values[y_name])
    x, xticks = _axis(x_ends, PLOT.left, PLOT.right)
    y, yticks = _axis(y_ends, PLOT.bottom, PLOT.top)
    marks: list[FrontMark] = []
    corners = []
    for point in shown:
        x_value, y_value = point.values[x_name], point.values[y_name]
        left, _, right = map(x, _ends(x_value))
        low, _, high = map(y, _ends(y_value))
        at = x(x_value.mean), y(y_value.mean)
        label, kind = point.name, _kind(point)
        if point.trial in on_front:
            number = front.points.index(point) + 1
            label = str(number) if kind == "point" else f"{number} {point.name}"
            kind = "knee" if number == front.knee else kind
            corners.append(at)
        title = (
            f"trial {point.trial} ({point.name}): {y_name} {y_value.mean:.4g}, "
            f"{x_name} {x_value.mean:.4g}"
        )
        label_y = at[1] + (LABEL_ABOVE, LABEL_BELOW)[len(marks) % 2]  # neighbours apart
        marks.append(FrontMark(*at, left, right, low, high, kind, label, label_y, title))
    path = " ".join(f"{px},{py}" for px, py in sorted(corners))
    return FrontChart(x_name, y_name, path, marks, xticks, yticks)


def _ends(value: FrontValue) -> tuple[float, float, float]:
    """Low, middle and high; the value itself where it has no interval."""
    if value.low is None or value.high is None:
        return value.mean, value.mean, value.mean
    return value.low, value.mean, value.high


def _kind(point: FrontPoint) -> str:
    if point.name in ("candidate", "mean"):
        return "point"
    if point.name.startswith("uniform"):
        return "uniform"
    return "base" if point.name == "base" else "sibling"


def _axis(values: Sequence[float], start: float, end: float) -> tuple[Axis, list[Tick]]:
    """A map to pixels over round ticks that enclose the values."""
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    size = 10.0 ** math.floor(math.log10(span / TICKS))
    step = next(size * factor for factor in (1, 2, 5, 10) if span / (size * factor) <= TICKS)
    first, last = math.floor(low / step), math.ceil(high / step)
    if first == last:
        last += 1
    axis = scale([first * step, last * step], start, end, pad=0)
    return axis, [Tick(axis(i * step), f"{i * step:.6g}") for i in range(first, last + 1)]
