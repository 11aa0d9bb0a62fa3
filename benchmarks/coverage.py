"""Whether a verdict's 95 % interval holds the true difference in 95 % of simulated studies.

    python benchmarks/coverage.py [STUDIES]  # 400 of each row by default

A study is a search of search_simulator.py as it ships, with 1,920 answers, then the verdict of
`make_verdict` on held-out tasks: the winner against the base, the sibling and the best uniform
weight. The winner is chosen with references as finalists; one that is a reference is not compared
with itself. Held-out tasks are drawn from those that the search did not see, and the true
difference is that of the expected grades over all of these.

`something to find`: the landscapes of search_landscapes.py. `nothing to find`: weights make no
difference but on single tasks, so that gains are luck. `verdict` is the product's interval, and the
others are computed from the same differences. `holds`: the share of intervals with the true
difference in them; `above`: of those that lie above it; `better`: of the studies without a true
gain over the best uniform weight, the share that calls the winner better than it.

The last line is one JSON object: the product's `holds` and `better`.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats
from search import SHIPPED
from search_landscapes import BOUNDS, LANDSCAPES, Array, World, make_world
from search_simulator import ours

from evomerge.searching.final_test import make_verdict
from evomerge.searching.records.trial_record import TaskGrade

STUDIES = 400
ANSWERS = 1_920
HELD_OUT = (50, 120)
RESAMPLES = 2_000  # of the other intervals, which are only compared
Interval = Callable[[Array], tuple[float, float]]


def percentile(x: Array) -> tuple[float, float]:
    """Of the means of resamples (Efron and Tibshirani 1993, 13.3)."""
    means = resampled(x).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def bias_corrected(x: Array) -> tuple[float, float]:
    """BCa (the same, 14.3); where scipy has none, without a spread, the mean."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = stats.bootstrap(
            (x,), np.mean, n_resamples=RESAMPLES, method="BCa", rng=np.random.default_rng(0)
        ).confidence_interval
    if np.isnan(found.low):
        return float(x.mean()), float(x.mean())
    return float(found.low), float(found.high)


def bootstrap_t(x: Array) -> tuple[float, float]:
    """Of the resamples' t statistics (the same, 12.5)."""
    drawn, n = resampled(x), len(x)
    error = x.std(ddof=1) / np.sqrt(n)
    spread = np.maximum(drawn.std(axis=1, ddof=1) / np.sqrt(n), 0.1 * error + 1e-12)
    high, low = np.quantile((drawn.mean(axis=1) - x.mean()) / spread, [0.025, 0.975])
    return float(x.mean() - low * error), float(x.mean() - high * error)


def resampled(x: Array) -> Array:
    drawn: Array = x[np.random.default_rng(0).integers(0, len(x), (RESAMPLES, len(x)))]
    return drawn


OTHERS: dict[str, Interval] = {
    "percentile bootstrap": percentile,
    "BCa": bias_corrected,
    "bootstrap-t": bootstrap_t,
}


@dataclass
class Tally:
    """Of one kind of interval on the studies of one row."""

    intervals: int = 0
    held: int = 0
    above: int = 0
    width: float = 0.0
    wrongly_better: int = 0

    def add(self, low: float, high: float, true: float, best: bool) -> None:
        """Count an interval; `best`: over the best reference."""
        self.intervals += 1
        self.held += low <= true <= high
        self.above += low > true
        self.width += high - low
        self.wrongly_better += best and true <= 0 < low

    def figures(self, without_gain: int) -> list[float]:
        """holds, above, width, better. `without_gain`: so many studies have no true gain."""
        counts = (self.held, self.above, self.width)
        return [
            *(count / self.intervals for count in counts),
            self.wrongly_better / max(1, without_gain),
        ]


def nothing(world: World) -> World:
    """The world without a landscape: what is left are single tasks' gains and losses."""
    return replace(world, scale=0.0)


def searched(world: World, seed: int) -> Array:
    """The winner of a search of ANSWERS."""
    winner = next(step[1] for step in ours(world, seed, SHIPPED) if step[0] >= ANSWERS)
    clipped: Array = np.clip(winner, *BOUNDS)
    return clipped


def compared(
    world: World, seed: int, n: int
) -> Iterator[tuple[bool, tuple[float, float], Array, float]]:
    """Whether it is the best reference, the verdict's interval, the differences, the true one."""
    rng = np.random.default_rng([seed, 11, n])
    references = world.references()
    winner = searched(world, seed)
    graded = world.grades(references, np.arange(len(world.search)), rng).mean(axis=1)
    vectors = {"winner": winner, "base": references[0], "sibling": references[1]}
    vectors["uniform"] = references[int(graded.argmax())]
    same = [name for name, vector in vectors.items() if np.array_equal(vector, winner)]
    rest = np.setdiff1d(np.arange(len(world.levels)), world.search)
    unseen = replace(world, levels=world.levels[rest], tilt=world.tilt[rest])
    held_out = replace(unseen, search=rng.integers(0, len(rest), n))
    grades = {}
    for name, vector in vectors.items():
        grades[name] = held_out.grades(vector[None], np.arange(n), rng)[0]
    by_task = {name: task_grades(world, values) for name, values in grades.items()}
    metric = "correct" if world.zero_one else "grade"
    verdict = make_verdict(by_task, metric, same=same)
    for name, lead in verdict.leads.items():
        true = unseen.value(winner) - unseen.value(vectors[name])
        assert lead.low is not None
        assert lead.high is not None
        yield name == "uniform", (lead.low, lead.high), grades["winner"] - grades[name], true


def task_grades(world: World, values: Array) -> dict[str, TaskGrade]:
    if world.zero_one:
        return {str(i): TaskGrade(bool(x), False, 1 + 4 * x) for i, x in enumerate(values)}
    return {str(i): TaskGrade(None, False, float(x)) for i, x in enumerate(values)}


def measure(
    studies: int, n: int, zero_one: bool, change: Callable[[World], World]
) -> tuple[dict[str, list[float]], int]:
    """The figures of every kind of interval on the same studies, a third on each landscape.

    Second, how many of the studies have no true gain.
    """
    tallies = {name: Tally() for name in ("verdict", *OTHERS)}
    without_gain = 0
    for i in range(studies):
        landscape = list(LANDSCAPES)[i % len(LANDSCAPES)]
        world = change(make_world(landscape, i, zero_one=zero_one))
        gained = False
        for best, interval, differences, true in compared(world, i, n):
            gained |= best and true > 0
            tallies["verdict"].add(*interval, true, best)
            for name, method in OTHERS.items():
                tallies[name].add(*method(differences), true, best)
        without_gain += not gained
    return {name: tally.figures(without_gain) for name, tally in tallies.items()}, without_gain


def main() -> None:
    studies = int(sys.argv[1]) if len(sys.argv) > 1 else STUDIES
    worlds = {"something to find": lambda world: world, "nothing to find": nothing}
    result: dict[str, Any] = {"studies": studies, "coverage": {}, "called_better": {}}
    calls, chances = 0.0, 0
    print("| studies | interval | holds | above | width | better |\n|---|---|---|---|---|---|")
    for zero_one, kind in ((False, "1 to 5"), (True, "right or wrong")):
        for n in HELD_OUT:
            for what, change in worlds.items():
                row = f"{n} tasks, {kind}, {what}"
                found, without_gain = measure(studies, n, zero_one, change)
                for name, figures in found.items():
                    cells = " | ".join(f"{x:.3f}" for x in figures)
                    print(f"| {row} | {name} | {cells} |", flush=True)
                result["coverage"][row] = round(found["verdict"][0], 4)
                result["called_better"][row] = round(found["verdict"][3], 4)
                calls += found["verdict"][3] * without_gain
                chances += without_gain
    result["called_better_in_all"] = round(calls / chances, 4)
    result["without_gain"] = chances
    print(json.dumps(result))


if __name__ == "__main__":
    main()
