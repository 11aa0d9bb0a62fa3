"""Coordinates of the report's charts, in pixels; the markup is in templates/report.html."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING

from evomerge.reporting.sentences import number
from evomerge.searching.estimates import Z95

if TYPE_CHECKING:
    from evomerge.searching.records.trial_record import TrialRecord
    from evomerge.searching.records.verdict_record import PairedDifference, Verdict

Axis = Callable[[float], float]  # a value -> its place in pixels

LABEL_GAP = 14.0  # smallest distance between two labels next to the progress chart
CELL_WIDTH = 130.0  # of an interval bar in the verdict table
STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5, 1.0, 2.0)  # between an axis's ticks


@dataclass(frozen=True)
class PlotArea:
    """The position of the progress chart's plot in its picture."""

    left: float = 46.0
    right: float = 610.0
    top: float = 14.0
    bottom: float = 236.0
    width: float = 760.0
    height: float = 274.0


PLOT = PlotArea()


@dataclass(frozen=True)
class VerdictRow:
    """A candidate's figures, and its interval bars as (low, middle, high)."""

    name: str
    mean: float
    stderr: float | None
    truncated: float
    bar: list[float]
    pair: PairedDifference | None
    pair_bar: list[float] | None
    zero: float


@dataclass(frozen=True)
class TrialPoint:
    """A complete trial: its score, and one standard error to each side of it."""

    x: float
    y: float
    low: float
    high: float
    trial: TrialRecord
    best: bool


@dataclass(frozen=True)
class FailedMark:
    """A failed trial."""

    x: float
    trial: TrialRecord


@dataclass(frozen=True)
class LevelLine:
    """A parent or the best uniform weight; `kind` is base, sibling or uniform."""

    kind: str
    label: str
    y: float
    label_y: float = 0.0


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class ProgressChart:
    """Scores by trial, the running best as an SVG path, and level lines for the references."""

    running: str
    lines: list[LevelLine]
    ticks: list[Tick]
    xticks: list[Tick]
    points: list[TrialPoint] = field(default_factory=list)
    crosses: list[FailedMark] = field(default_factory=list)
    area: PlotArea = PLOT


@dataclass(frozen=True)
class WeightBar:
    """One weight as a horizontal bar; `end` is where its value is written."""

    x: float
    y: float
    width: float
    end: float
    label: str
    value: str


@dataclass(frozen=True)
class WeightChart:
    """A bar per weight, with lines at 0 and at 1."""

    bars: list[WeightBar]
    left: float
    zero: float
    one: float
    height: float


def verdict_rows(verdict: Verdict | None) -> list[VerdictRow]:
    """A row per candidate with its figures and the geometry of its two interval bars."""
    if verdict is None:
        return []
    candidates, leads = verdict.candidates, verdict.leads
    means: dict[str, tuple[float, float, float]] = {}
    for name, c in candidates.items():
        error = Z95 * (c.stderr or 0.0)
        means[name] = (c.mean - error, c.mean, c.mean + error)
    x_mean = scale(flattened(means.values()), 6, CELL_WIDTH - 6)
    pairs = {}
    for name, p in leads.items():
        low, high = p.low, p.high
        pairs[name] = (p.diff if low is None else low, p.diff, p.diff if high is None else high)
    x_pair = scale([0.0, *flattened(pairs.values())], 6, CELL_WIDTH - 6)
    rows = []
    for name, c in candidates.items():
        pair_bar = None
        if name in pairs:
            pair_bar = [x_pair(value) for value in pairs[name]]
        row = VerdictRow(
            name=name,
            mean=c.mean,
            stderr=c.stderr,
            truncated=c.truncated,
            bar=[x_mean(value) for value in means[name]],
            pair=leads.get(name),
            pair_bar=pair_bar,
            zero=x_pair(0.0),
        )
        rows.append(row)
    return rows


def progress_chart(
    trials: Sequence[TrialRecord], best: int | None, labels: Mapping[int, str]
) -> ProgressChart | None:
    """Scores by trial, the running best, and a line per parent and for the best uniform weight.

    `best` is the winner's number; `labels` name parents and uniform weights by their numbers. None
    where nothing has a score yet.
    """
    shown = [t for t in trials if t.role in ("candidate", "mean")]
    scored = [t for t in trials if t.state == "complete" and t.score is not None]
    if not shown or not scored:
        return None
    edges = []
    for t in scored:
        score, error = t.score or 0.0, t.stderr or 0.0
        edges += [score - error, score + error]
    y, ticks = y_axis(edges)
    x = scale([0.5, len(shown) + 0.5], PLOT.left, PLOT.right, pad=0)
    every = max(1, -(-len(shown) // 12))
    chart = ProgressChart(
        running=running_best(shown, x, y),
        lines=reference_lines(scored, y, labels),
        ticks=[Tick(y(value), number(value, 2)) for value in ticks],
        xticks=[Tick(x(i + 1), str(shown[i].number)) for i in range(0, len(shown), every)],
    )
    for place, t in enumerate(shown, start=1):
        if t.state == "failed":
            chart.crosses.append(FailedMark(x(place), t))
        elif t.state == "complete" and t.score is not None:
            error = t.stderr or 0.0
            low, high = y(t.score - error), y(t.score + error)
            chart.points.append(TrialPoint(x(place), y(t.score), low, high, t, t.number == best))
    return chart


def running_best(shown: Sequence[TrialRecord], x: Axis, y: Axis) -> str:
    """The best candidate's score so far, as an SVG path that is level, then steps up."""
    path = ""
    top: float | None = None
    for place, t in enumerate(shown, start=1):
        if t.state != "complete" or t.score is None:
            continue
        if t.role == "candidate" and (top is None or t.score > top):
            top = t.score
        if top is None:
            continue
        if path:
            path += f"H{x(place)}V{y(top)}"
        else:
            path = f"M{x(place)} {y(top)}"
    return path


def reference_lines(
    scored: Sequence[TrialRecord], y: Axis, labels: Mapping[int, str]
) -> list[LevelLine]:
    """The parents and the best uniform weight as level lines, their labels kept apart."""
    shown = [t for t in scored if t.role == "parent"]
    uniform = [t for t in scored if t.role == "uniform"]
    if uniform:
        shown.append(max(uniform, key=lambda t: t.score or 0.0))
    lines = []
    for t in shown:
        name = labels.get(t.number, t.role)
        kind = "sibling"
        if t.role == "uniform":
            kind = "uniform"
        elif name == "base":
            kind = "base"
        lines.append(LevelLine(kind, f"{name}: {number(t.score)}", y(t.score or 0.0)))
    lines.sort(key=lambda line: line.y)
    lowest = PLOT.bottom - LABEL_GAP * (len(lines) - 1)
    at = PLOT.top - LABEL_GAP
    spaced = []
    for i, line in enumerate(lines):
        at = max(at + LABEL_GAP, min(line.y, lowest + LABEL_GAP * i))
        spaced.append(replace(line, label_y=at))
    return spaced


def weight_chart(winner: TrialRecord | None, slices: Sequence[str]) -> WeightChart | None:
    """Horizontal bars, one row per slice from the first layers to the last; lines at 0 and 1."""
    if winner is None:
        return None
    weights = winner.vector
    labels = [*slices, *map(str, range(len(slices), len(weights)))]
    left = 54 + 7.0 * max(map(len, labels[: len(weights)]), default=0)
    x = scale([0.0, 1.0, *weights], left, 560, pad=0.02)
    bars = []
    for i, weight in enumerate(weights):
        start, end = sorted((x(0), x(weight)))
        bars.append(
            WeightBar(
                x=start,
                y=26 + 20 * i,
                width=abs(x(weight) - x(0)),
                end=end,
                label=labels[i],
                value=number(weight),
            )
        )
    return WeightChart(bars, left, x(0), x(1), 34 + 20 * len(weights))


def scale(values: Sequence[float], start: float, end: float, pad: float = 0.04) -> Axis:
    """A linear map from the values' range, widened by `pad` of it at both ends, to start..end."""
    low, high = min(values), max(values)
    room = pad * (high - low)
    if high == low:
        room = 0.5
    low, high = low - room, high + room
    return lambda value: round(start + (value - low) / (high - low) * (end - start), 2)


def y_axis(values: Sequence[float]) -> tuple[Axis, list[float]]:
    """A map to pixels, upwards, and about five round tick values."""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    step = next(step for step in (*STEPS, span) if span / step <= 6)
    ticks = [round(step * int(low // step), 6)]
    while ticks[-1] < high:
        ticks.append(round(step * (int(low // step) + len(ticks)), 6))
    return scale([ticks[0], ticks[-1]], PLOT.bottom, PLOT.top, pad=0), ticks


def flattened(triples: Iterable[tuple[float, float, float]]) -> list[float]:
    """All numbers of the triples."""
    return list(chain.from_iterable(triples))
