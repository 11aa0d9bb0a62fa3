"""Simulated searches: ours with its options, and two peers. Each is an iterator of what its winner
would be by then.

A step is (graded answers so far, those of choosing the winner included; the winner's weights).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from statistics import NormalDist

import numpy as np
import optuna
from search_landscapes import BOUNDS, Array, World

from evomerge.searching.choosing import MEAN, choose, incumbent
from evomerge.searching.generation.informative import (
    inclusion_chances,
    pooled_spread,
    systematic_sample,
)
from evomerge.searching.generation.racing import (
    blocks,
    draw_offset,
    hopeless,
    subset_size,
    task_order,
)
from evomerge.searching.samplers.cmaes_adapter import (
    Distribution,
    default_population,
    make_cma,
    state,
)

Step = tuple[int, Array]


@dataclass(frozen=True)
class Options:
    """Of our search: keys of the study file, and what was tried and does not ship (growth, average,
    start).
    """

    ranking: str = "all"
    subset: int = 16
    growth: float = 2.0  # the subset is subset / sigma_ratio ** growth
    sigma: float = 0.25
    population: int | None = None
    lr_adapt: bool = False
    validation: float = 0.0  # share of the search tasks
    finalists: int = 0  # trials that validation compares with the mean
    lead: float = 3.0  # standard errors of many tasks by which one must beat it
    # standard errors by which a reference must lead the mean to stand in its place; None: it cannot
    reference_lead: float | None = None
    average: float = 0.0  # the winner is the mean over this share of the last generations' means
    references: bool = True  # they are graded first, on every search task
    # 1 over the number of siblings; or "one", or the best "reference", or the best "sibling" alone
    start: str = "share"
    race_error: float = 0.05
    sampling: str = "uniform"


@dataclass
class TaskGrades:
    """What is known of n tasks: their levels by the references, and how much grades differ."""

    levels: Array  # (n,)
    squares: Array  # (n,) sums of squares within groups of candidates
    freedom: Array  # (n,) their degrees of freedom

    def draw(self, seed: int, generation: int, size: int, sampling: str) -> tuple[Array, Array]:
        """A generation's tasks, (size,) places, and their chances."""
        n = len(self.levels)
        order = task_order(seed, generation, n)
        chances, places = np.full(n, size / n), order[:size]
        if sampling == "informative" and size < n:
            chances = inclusion_chances(pooled_spread(self.squares, self.freedom), size)
            places = systematic_sample(chances, order, draw_offset(seed, generation))
        return np.array(places), chances[places]

    def saw(self, places: Array, grades: Array) -> None:
        """Count (candidates, tasks) grades of one group."""
        self.squares[places] += np.square(grades - grades.mean(axis=0)).sum(axis=0)
        self.freedom[places] += len(grades) - 1


Finalist = tuple[float, Array, Array]  # score, weights, grades on the validation tasks


def ours(world: World, seed: int, o: Options) -> Iterator[Step]:
    """CMA-ES as the loop runs it, with the winner it would choose after each generation."""
    rng = np.random.default_rng([seed, 1])
    d, n = world.tilt.shape[1], len(world.search)
    kept = round(n * o.validation)
    search, validation = np.arange(kept, n), np.arange(kept)
    spent, start = 0, np.ones(d)
    tasks = TaskGrades(*np.zeros((3, len(search))))
    if o.start == "share":
        start = start / world.siblings
    aside = np.random.default_rng([seed, 7])  # of answers that no search without them would get
    if o.references:
        references = world.references()
        graded = world.grades(references, search, rng)
        spent, tasks.levels = graded.size, graded.mean(axis=0)
        tasks.saw(np.arange(len(search)), graded)
        if o.start in ("reference", "sibling"):
            few = slice(1, 1 + world.siblings) if o.start == "sibling" else slice(None)
            start = references[few][int(graded[few].mean(axis=1).argmax())]
    known: dict[str, tuple[Array, Array]] = {}  # the references that can win
    if o.reference_lead is not None:
        known = _reference_grades(world, references, graded, validation, aside, o.finalists)
    optimizer = make_cma(
        Distribution(start, o.sigma, np.eye(d)),
        np.tile(BOUNDS, (d, 1)),
        o.population or default_population(d),
        seed,
        o.lr_adapt,
    )
    means: list[Array] = []
    best: list[Finalist] = []
    for generation in count():
        size = len(search)
        if o.ranking != "all":
            size = subset_size(size, o.subset, (state(optimizer).sigma / o.sigma) ** (o.growth / 2))
        places, chances = tasks.draw(seed, generation, size, o.sampling)
        drawn = np.array([optimizer.ask() for _ in range(optimizer.population_size)])
        grades = world.grades(drawn, search[places], rng)
        tasks.saw(places, grades)
        if o.ranking == "race":
            _race(grades, o.race_error)
        spent += int((~np.isnan(grades)).sum())
        above = (grades - tasks.levels[places]) / chances * size / len(search)
        scores = np.nanmean(above, axis=1)
        optimizer.tell([(x, -float(score)) for x, score in zip(drawn, scores, strict=True)])
        means.append(optimizer.mean.copy())
        mean = np.mean(means[-max(1, round(o.average * len(means))) :], axis=0)
        if not o.finalists:
            yield spent + len(search), mean
            continue
        best = _best(world, best, zip(drawn, scores, strict=True), validation, rng, o.finalists)
        stands = world.grades(mean[None], validation, rng)[0]
        own = np.concatenate([world.grades(mean[None], search, aside)[0], stands])
        # the loop also grades the mean on every search task
        spent_on_choice = len(search) + (1 + len(best) + len(known)) * kept
        yield spent + spent_on_choice, _winner(mean, own, best, known, len(search), o)


def _best(
    world: World,
    best: list[Finalist],
    trials: Iterable[tuple[Array, float]],
    validation: Array,
    rng: np.random.Generator,
    most: int,
) -> list[Finalist]:
    """The `most` best of the finalists so far and these trials."""
    for x, score in trials:
        if len(best) < most or score > best[-1][0]:
            fresh = world.grades(x[None], validation, rng)[0]
            best = sorted([*best, (float(score), x, fresh)], key=lambda b: -b[0])[:most]
    return best


def _winner(
    mean: Array,
    own: Array,
    best: list[Finalist],
    known: dict[str, tuple[Array, Array]],
    searched: int,
    o: Options,
) -> Array:
    """The winner's weights. Grades of the mean, `own`, and of references are on search tasks, so
    many of them, and then on validation tasks.
    """
    stands = {MEAN: own[searched:]} | {str(i): b[2] for i, b in enumerate(best)}
    vectors = {MEAN: mean} | {str(i): b[1] for i, b in enumerate(best)}
    vectors |= {name: reference[0] for name, reference in known.items()}
    references_known = {name: _named(grades) for name, (_, grades) in known.items()}
    chance = NormalDist().cdf(-(o.reference_lead or 0.0))
    standing = incumbent(_named(own), references_known, chance)
    if standing != MEAN:
        del stands[MEAN]
        stands[standing] = known[standing][1][searched:]
    named = {name: _named(values) for name, values in stands.items()}
    return vectors[choose(named, standing, NormalDist().cdf(-o.lead))]


def _reference_grades(
    world: World,
    references: Array,
    graded: Array,
    validation: Array,
    rng: np.random.Generator,
    most: int,
) -> dict[str, tuple[Array, Array]]:
    """The best references' weights, and their grades on search tasks and then validation tasks."""
    found = {}
    for i in graded.mean(axis=1).argsort()[::-1][:most]:
        fresh = world.grades(references[i][None], validation, rng)[0]
        found[f"reference {i}"] = references[i], np.concatenate([graded[i], fresh])
    return found


def _named(grades: Array) -> dict[str, float]:
    return {str(i): float(grade) for i, grade in enumerate(grades)}


def _race(grades: Array, error: float) -> None:
    """Set to nan what a race would not have asked for."""
    parts, out = blocks(grades.shape[1]), set[int]()
    for part in parts[:-1]:
        seen = grades.copy()
        seen[:, part.stop :] = np.nan
        out |= hopeless(seen, len(grades) // 2, error, len(parts) - 1)
        for i in out:
            grades[i, part.stop :] = np.nan


def optuna_cmaes(world: World, seed: int) -> Iterator[Step]:
    """Optuna's stock sampler on the same bounds; every task each time; the best trial wins."""
    rng = np.random.default_rng([seed, 2])
    d, tasks = world.tilt.shape[1], np.arange(len(world.search))
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study = optuna.create_study(
            sampler=optuna.samplers.CmaEsSampler(seed=seed), direction="maximize"
        )
    best = -np.inf
    spent = 0
    winner = np.ones(d)
    while True:
        trial = study.ask()
        x = np.array([trial.suggest_float(f"w{i}", *BOUNDS) for i in range(d)])
        score = float(world.grades(x[None], tasks, rng).mean())
        study.tell(trial, score)
        spent += len(tasks)
        if score > best:
            best, winner = score, x
        yield spent, winner


def mergekit_evolve(world: World, seed: int) -> Iterator[Step]:
    """The `cma` package as mergekit-evolve calls it: weights from 1, sigma 1/6, its population, no
    bounds; `xbest` wins.
    """
    rng = np.random.default_rng([seed, 3])
    d, tasks = world.tilt.shape[1], np.arange(len(world.search))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import cma  # installed for this benchmark alone; it warns where there is no matplotlib

        strategy = cma.CMAEvolutionStrategy(np.ones(d), 1 / 6, {"seed": seed + 1, "verbose": -9})
    spent = 0
    while True:
        drawn = strategy.ask()
        scores = world.grades(np.array(drawn), tasks, rng).mean(axis=1)
        strategy.tell(drawn, (-scores).tolist())
        spent += len(drawn) * len(tasks)
        yield spent, strategy.result.xbest
