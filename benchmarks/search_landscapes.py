"""What the simulated searches climb: real tasks' difficulties, noisy grades from 1 to 5, and
landscapes over weights.

A merge with weights w answers task t at the latent level
    difficulty[t] + scale * f(w) + (w - 1) @ tilt[t]
to which each answer adds normal noise of 0.9; the grade is that, rounded and kept within 1 to 5
(or, where tasks are right or wrong, whether it is above 0). f is the landscape; tilt makes a better
merge gain more on some tasks than on others and lose on a few: at the optimum the gain's spread
over tasks equals the gain. The true value of w is the expected grade over a population of tasks, of
which a search sees some.

The difficulties are those of the 100 tasks of ELYZA-tasks-100 (`../shared/elyza/grades.jsonl`,
gpt-4-turbo's grades of the models whose mean grade is 3 to 4): the level whose expected grade is
the task's mean grade. The noise: grades of two models as good as each other differ on a task with a
standard deviation of 1.55, or 1.09 a grade; 0.9 of it is taken for the answer's, the rest (0.6) for
what these models are differently good at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
GRADES = Path(__file__).resolve().parents[2] / "shared" / "elyza" / "grades.jsonl"
NOISE = 0.9  # of an answer, on the scale of grades
GAIN = 0.4  # of the optimum over the better parent, in grade points
SHARE = 0.12  # the same for tasks that are right or wrong
# of the 100 tasks, those on which all judges give two models of one family the same grade: .22 to
# .68 in seven families of `../shared/elyza/grades.jsonl`
IDLE = 0.37
BOUNDS = (0.0, 2.0)
UNIFORM = (0.25, 0.5, 0.75, 1.25)
# The result of fit_difficulties(GRADES), for when the grades are not available.
# fmt: off
FITTED = [
    4.03, 3.73, 4.63, 4.24, 3.64, 4.08, 1.97, 4.45, 3.66, 3.59, 3.8, 3.61, 2.56, 4.34, 6.06, 3.91,
    3.52, 1.94, 3.7, 4.4, 3.77, 3.39, 4.63, 3.79, 3.94, 3.96, 2.23, 2.36, 3.13, 3.2, 4.01, 3.94,
    5.0, 4.21, 4.08, 3.13, 4.18, 2.11, 4.48, 4.29, 3.02, 3.09, 4.63, 4.57, 1.04, 4.77, 3.82, 3.22,
    3.35, 3.91, 1.58, 2.44, 4.79, 3.58, 3.91, 3.64, 6.07, 3.27, 2.04, 3.86, 2.76, 3.41, 1.2, 2.65,
    3.3, 3.11, 4.29, 3.7, 3.3, 4.29, 3.7, 3.52, 3.02, 3.93, 3.84, 3.47, 5.35, 5.19, 2.59, 2.43,
    1.97, 2.7, 2.41, 3.73, 3.91, 3.49, 4.68, 5.57, 4.31, 2.67, 1.37, 5.49, 4.19, 4.73, 3.46, 4.96,
    4.48, 3.96, 4.51, 3.8,
]
# fmt: on


def cdf(x: Array) -> Array:
    """The normal distribution function, within 1.5e-7 (Abramowitz and Stegun 1964, 7.1.26)."""
    z = np.abs(x) / math.sqrt(2)
    t = 1 / (1 + 0.3275911 * z)
    poly = t * (
        0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    )
    erf = 1 - poly * np.exp(-z * z)
    return 0.5 * (1 + np.sign(x) * erf)


def expected_grade(level: Array) -> Array:
    """Of a rounded grade within 1 to 5: 1 + the chances of passing 1.5, 2.5, 3.5 and 4.5."""
    passed: Array = cdf((level[..., None] - np.array([1.5, 2.5, 3.5, 4.5])) / NOISE).sum(axis=-1)
    return 1 + passed


def fit_difficulties(path: Path, judge: str = "gpt-4-turbo") -> list[float]:
    """The tasks' levels, in the order of their ids."""
    by_model: dict[str, dict[int, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        g = json.loads(line)
        if g["judge"] == judge:
            by_model.setdefault(g["model"], {})[g["task_id"]] = g["grade"]
    middling = [grades for grades in by_model.values() if 3 <= np.mean(list(grades.values())) <= 4]
    means = [
        np.mean([grades[task] for grades in middling if task in grades]) for task in range(100)
    ]
    levels = np.linspace(-2, 8, 2001)
    return [round(float(x), 2) for x in np.interp(means, expected_grade(levels), levels)]


@lru_cache(maxsize=1)
def difficulties() -> tuple[float, ...]:
    return tuple(fit_difficulties(GRADES) if GRADES.exists() else FITTED)


@dataclass(frozen=True)
class World:
    """One landscape with its tasks. `search` are the tasks that a search may ask, as rows of the
    population; -1 is an idle task, whose grade (`constant`, by place) no weights change.
    """

    shape: Callable[[Array], Array]  # (m, d) -> (m,)
    scale: float
    levels: Array  # (p,)
    tilt: Array  # (p, d)
    search: Array
    zero_one: bool
    parent: float  # true value of the better parent
    gain: float  # true value of the optimum above it
    siblings: int = 1  # a vector holds their weights, slice by slice
    constant: Array | None = None

    def level(self, w: Array, tasks: Array) -> Array:
        """(m, tasks) latent levels."""
        levels: Array = (
            self.levels[tasks] + self.scale * self.shape(w)[:, None] + (w - 1) @ self.tilt[tasks].T
        )
        return levels

    def grades(self, w: Array, tasks: Array, rng: np.random.Generator) -> Array:
        """(m, tasks) grades; `tasks` are places among the search tasks. A weight's sign is dropped,
        as mergekit-evolve does.
        """
        answered = self.level(np.abs(w), self.search[tasks]) + NOISE * rng.standard_normal(
            (len(w), len(tasks))
        )
        found = (answered > 0).astype(float) if self.zero_one else np.clip(np.rint(answered), 1, 5)
        if self.constant is not None:
            found = np.where(self.search[tasks] < 0, self.constant[tasks], found)
        return found

    def references(self) -> Array:
        """The base, each sibling and the uniform weights, as a study has them."""
        d, m = self.tilt.shape[1], self.siblings
        parents = [np.zeros(d), *(np.tile(one, d // m) for one in np.eye(m))]
        weights = UNIFORM if m == 1 else (*UNIFORM, 1.0)
        return np.array([*parents, *(np.full(d, weight) for weight in weights)])

    def true(self, w: Array) -> float:
        """The share of the gain at w: 0 at the better parent, 1 at the optimum."""
        return (self.value(w) - self.parent) / self.gain

    def value(self, w: Array) -> float:
        """The expected grade of w over all tasks."""
        level = self.level(np.abs(w)[None], np.arange(len(self.levels)))[0]
        return float((cdf(level / NOISE) if self.zero_one else expected_grade(level)).mean())


def bowl(best: Array, rng: np.random.Generator) -> Callable[[Array], Array]:
    """Falls equally in all directions."""
    return lambda w: -((w - best) ** 2).sum(axis=-1)


def ridge(best: Array, rng: np.random.Generator) -> Callable[[Array], Array]:
    """Falls five times as fast in a fifth of the directions, which are rotated."""
    basis = np.linalg.qr(rng.standard_normal((len(best), len(best))))[0]
    curvature = np.where(np.arange(len(best)) < max(1, len(best) // 5), 5.0, 1.0)
    return lambda w: -(((w - best) @ basis) ** 2 @ curvature)


def rugged(best: Array, rng: np.random.Generator) -> Callable[[Array], Array]:
    """A bowl whose sides are rippled, with a period of half a weight; ripples are 15 % of the fall
    at weight 1.
    """
    fall = ((best - 1) ** 2).sum()

    def shape(w: Array) -> Array:
        ripples = (1 - np.cos(2 * np.pi * (w - best) / 0.5)).mean(axis=-1)
        value: Array = -0.85 * ((w - best) ** 2).sum(axis=-1) / fall - 0.15 * ripples
        return value

    return shape


LANDSCAPES = {"bowl": bowl, "ridge": ridge, "rugged": rugged}


def make_world(
    landscape: str, seed: int, dimensions: int = 20, tasks: int = 50, zero_one: bool = False
) -> World:
    """The world of a seed. Parents lie at weight 0 and 1; the best weights are unequal, around
    0.85.
    """
    rng = np.random.default_rng([seed, sorted(LANDSCAPES).index(landscape), dimensions])
    best = np.clip(0.85 + 0.35 * rng.standard_normal(dimensions), 0.1, 1.9)
    return _scaled(landscape, best, rng, tasks, zero_one)


def with_idle_tasks(world: World, seed: int, share: float = IDLE) -> World:
    """The same world with idle tasks among the others: so many that they are `share` of all."""
    rng = np.random.default_rng([seed, 11])
    live = len(world.search)
    more = round(live * share / (1 - share))
    order = rng.permutation(live + more)
    levels = world.levels[rng.integers(0, len(world.levels), more)]
    fixed = (levels > 0).astype(float) if world.zero_one else np.clip(np.rint(levels), 1, 5)
    search = np.concatenate([world.search, np.full(more, -1)])[order]
    constant = np.concatenate([np.zeros(live), fixed])[order]
    return replace(world, search=search, constant=constant)


def make_sibling_world(landscape: str, seed: int, siblings: int, share: float) -> World:
    """A world of several siblings, whose best weights add up to about `share` in each slice."""
    dimensions = 20 // siblings * siblings
    key = [seed, sorted(LANDSCAPES).index(landscape), dimensions, siblings, int(100 * share)]
    rng = np.random.default_rng(key)
    best = np.clip(share / siblings + 0.25 * rng.standard_normal(dimensions), 0.02, 1.9)
    return _scaled(landscape, best, rng, siblings=siblings)


def make_uniform_world(landscape: str, seed: int, weight: float, fall: float) -> World:
    """A world whose optimum is a uniform weight, `fall` grade points above the better parent."""
    key = [seed, sorted(LANDSCAPES).index(landscape), int(100 * weight)]
    return _scaled(landscape, np.full(20, weight), np.random.default_rng(key), gain=fall)


def _scaled(
    landscape: str,
    best: Array,
    rng: np.random.Generator,
    tasks: int = 50,
    zero_one: bool = False,
    siblings: int = 1,
    gain: float | None = None,
) -> World:
    """The world whose optimum lies the gain above the better parent."""
    dimensions = len(best)
    shape = LANDSCAPES[landscape](best, rng)
    population = 8 * tasks
    levels = (
        rng.normal(0, 1.5, population) if zero_one else np.tile(difficulties(), population // 100)
    )
    tilt = rng.standard_normal((population, dimensions))
    parents = [np.tile(one, dimensions // siblings) for one in np.eye(siblings)]
    nearest = min(float(np.linalg.norm(best - parent)) for parent in parents)
    tilt = (tilt - tilt.mean(axis=0)) * GAIN / nearest
    search = rng.permutation(population)[:tasks]
    if gain is None:
        gain = SHARE if zero_one else GAIN

    def world(scale: float) -> World:
        raw = World(shape, scale, levels, tilt, search, zero_one, 0.0, 1.0)
        parent = max(map(raw.true, (np.zeros(dimensions), *parents)))
        gained = raw.true(best) - parent
        return World(shape, scale, levels, tilt, search, zero_one, parent, gained, siblings)

    low, high = 0.0, 50.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if world(middle).gain < gain else (low, middle)
    return world(high)
