"""How good a front a search of two objectives finds, against Optuna's NSGA-II and GPSampler.

    python benchmarks/pareto.py                 # 100 and 300 candidates; GPSampler on few seeds
    python benchmarks/pareto.py --gp-seeds 20   # GPSampler on every seed: about an hour

The worlds are those of search_landscapes.py, 20 weights, every candidate on 50 tasks:

- groups: two groups of 25 tasks, each with an optimum of its own; the mean grade of each.
- length: the mean grade, and the tokens of an answer, which grow with the weights: the sibling's
  answers are three times as long as the base's, single ones differ by a factor of 1.65.

All begin with what is known anyway, the parents and the uniform weights. The front is what no other
candidate beats by its observed values; ours, as the shipped search does, takes the means of its
distributions and the references, and the means count as candidates. What is compared is the
hypervolume of the front's true values, in units in which the better parent is at 0 and the best
value at 1 (of tokens: the base's), over the point one gain below the better parent, and of tokens
over the sibling. The last line is one JSON object: ratios of mean hypervolumes at 100 candidates
with 95 % bootstrap intervals over worlds and seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import optuna
from search_landscapes import BOUNDS, LANDSCAPES, Array, World, make_world

from evomerge.searching.front.pareto_front import hypervolume, non_dominated
from evomerge.searching.history import History
from evomerge.searching.records.trial_record import TrialRecord
from evomerge.searching.samplers.pareto import ParetoSampler

DIMENSIONS, TASKS, SEEDS = 20, 50, 20
CANDIDATES = (100, 300)
LONGER = 3.0  # the sibling's answers in the base's
SPREAD = 0.5  # standard deviation of the logarithm of an answer's length
SIGNS = {"first": 1.0, "second": 1.0}
Seen = tuple[list[Array], list[Array]]  # vectors, and their observed values


@dataclass(frozen=True)
class Groups:
    """Two groups of tasks."""

    worlds: tuple[World, World]
    worst = np.array([-1.0, -1.0])

    def observe(self, w: Array, rng: np.random.Generator) -> Array:
        tasks = np.arange(TASKS // 2)
        return np.array([world.grades(w[None], tasks, rng).mean() for world in self.worlds])

    def true(self, w: Array) -> Array:
        return np.array([world.true(w) for world in self.worlds])

    @property
    def references(self) -> Array:
        return self.worlds[0].references()


@dataclass(frozen=True)
class Length:
    """Grades against tokens."""

    world: World
    growth: Array  # (d,) of the logarithm of an answer's length
    worst = np.array([-1.0, 0.0])

    def observe(self, w: Array, rng: np.random.Generator) -> Array:
        grade = float(self.world.grades(w[None], np.arange(TASKS), rng).mean())
        noise = np.exp(SPREAD * rng.standard_normal(TASKS) - SPREAD**2 / 2)
        return np.array([grade, -float((self.length(w) * noise).mean())])

    def length(self, w: Array) -> float:
        return math.exp(float(np.abs(w) @ self.growth))

    def true(self, w: Array) -> Array:
        saved = (LONGER - self.length(w)) / (LONGER - 1)
        return np.array([self.world.true(w), saved])

    @property
    def references(self) -> Array:
        return self.world.references()


Problem = Groups | Length


def make_problem(kind: str, landscape: str, seed: int) -> Problem:
    if kind == "groups":
        first, second = (
            make_world(landscape, number, DIMENSIONS, TASKS // 2)
            for number in (seed, seed + 50_000)
        )
        return Groups((first, second))
    share = np.random.default_rng([seed, 9]).exponential(size=DIMENSIONS)
    world = make_world(landscape, seed, DIMENSIONS, TASKS)
    return Length(world, math.log(LONGER) * share / share.sum())


def known(problem: Problem, rng: np.random.Generator) -> Seen:
    """The references, graded on every task."""
    vectors = list(problem.references)
    return vectors, [problem.observe(w, rng) for w in vectors]


def ours(problem: Problem, seed: int, candidates: Sequence[int]) -> Iterator[tuple[Seen, Seen]]:
    """After each number of candidates: the front's contenders as shipped, and every trial."""
    rng = np.random.default_rng([seed, 1])
    references, sampler = known(problem, rng), make_sampler(seed)
    history, seen = History(), (list(references[0]), list(references[1]))
    for limit in candidates:
        while len(history.trials) + sampler.population + sampler.distributions <= limit:
            made: list[TrialRecord] = []
            for _ in range(sampler.population):
                slot = replace(sampler.next_slot(history), index=len(made))
                w = sampler.draw(history, slot)
                value = problem.observe(w, rng)
                made.append(trial(len(history.trials) + len(made), slot.generation, w, value))
                seen[0].append(w)
                seen[1].append(value)
            history = history.extended(made)
        means = sampler.means(history)[1]
        values = [problem.observe(w, rng) for w in means]
        shipped = [*references[0], *means], [*references[1], *values]
        yield shipped, ([*seen[0], *means], [*seen[1], *values])


def make_sampler(seed: int) -> ParetoSampler:
    names = [f"w{i}" for i in range(DIMENSIONS)]
    bounds = [BOUNDS] * DIMENSIONS
    return ParetoSampler(
        SIGNS,
        names=names,
        bounds=bounds,
        declared=bounds,
        starts=[1.0] * DIMENSIONS,
        sigma=0.3,
        population=None,
        seed=seed,
        lr_adapt=True,
    )


def trial(number: int, generation: int, w: Array, value: Array) -> TrialRecord:
    return TrialRecord(
        number=number,
        generation=generation,
        index=number - generation * make_sampler(0).population,
        role="candidate",
        state="complete",
        vector=tuple(w.tolist()),
        score=float(value[0]),
        stderr=None,
        n=TASKS,
        truncated=0.0,
        seconds={},
        reason=None,
        grades={},
        parts=dict(zip(SIGNS, value.tolist(), strict=True)),
    )


def peer(
    problem: Problem, seed: int, candidates: Sequence[int], sampler: optuna.samplers.BaseSampler
) -> Iterator[Seen]:
    """One of Optuna's samplers on the same bounds."""
    rng = np.random.default_rng([seed, 2])
    vectors, values = known(problem, rng)
    study = optuna.create_study(directions=["maximize", "maximize"], sampler=sampler)
    for number in range(1, max(candidates) + 1):
        asked = study.ask()
        w = np.array([asked.suggest_float(f"w{i}", *BOUNDS) for i in range(DIMENSIONS)])
        vectors.append(w)
        values.append(problem.observe(w, rng))
        study.tell(asked, values[-1].tolist())
        if number in candidates:
            yield vectors, values


def volume(problem: Problem, seen: Seen) -> float:
    """The true hypervolume of the front by observed values."""
    front = non_dominated(np.array(seen[1]))
    return hypervolume(np.array([problem.true(seen[0][i]) for i in front]), problem.worst)


PEERS: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed),
}


def measure(seeds: int, gp_seeds: int) -> dict[str, Array]:
    """Who -> (worlds, seeds, 2) hypervolumes at the numbers of candidates; GP only at the first."""
    found: dict[str, Any] = {name: [] for name in ("references", "ours", "ours, all", *PEERS)}
    for kind in ("groups", "length"):
        for landscape in LANDSCAPES:
            rows: dict[str, list[list[float]]] = {name: [] for name in found}
            for seed in range(seeds):
                problem = make_problem(kind, landscape, seed)
                start = known(problem, np.random.default_rng([seed, 2]))
                rows["references"].append([volume(problem, start)] * 2)
                both = list(ours(problem, seed, CANDIDATES))
                rows["ours"].append([volume(problem, shipped) for shipped, _ in both])
                rows["ours, all"].append([volume(problem, every) for _, every in both])
                for name, make in PEERS.items():
                    if name == "gp" and seed >= gp_seeds:
                        continue
                    limits = CANDIDATES[:1] if name == "gp" else CANDIDATES
                    results = peer(problem, seed, limits, make(seed))
                    rows[name].append([volume(problem, seen) for seen in results])
            for name, row in rows.items():
                found[name].append(row)
            figures = {
                name: round(float(np.mean(row, axis=0)[0]), 2) for name, row in rows.items() if row
            }
            print(f"{kind}, {landscape}: {figures}", flush=True)
    return {name: np.array(rows) for name, rows in found.items() if rows[0]}


def ratio(a: Array, b: Array) -> dict[str, Any]:
    """The ratio of the means of (worlds, seeds) hypervolumes, worlds and seeds paired."""
    a, b = a[:, : b.shape[1]].ravel(), b.ravel()
    drawn = np.random.default_rng(0).integers(0, len(a), (10_000, len(a)))
    low, high = np.quantile(a[drawn].mean(axis=1) / b[drawn].mean(axis=1), [0.025, 0.975])
    interval = [round(float(low), 2), round(float(high), 2)]
    return {"ratio": round(float(a.mean() / b.mean()), 2), "interval": interval, "runs": len(a)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--gp-seeds", type=int, default=2)
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    began = time.perf_counter()
    found = measure(arguments.seeds, arguments.gp_seeds)
    print(f"\n| front of | {' | '.join(f'{n} candidates' for n in CANDIDATES)} |\n|---|---|---|")
    for name, values in found.items():
        cells = [f"{mean:.2f}" for mean in values.mean(axis=(0, 1))]
        print(f"| {' | '.join([name, *cells, '–'][: 1 + len(CANDIDATES)])} |")
    out: dict[str, Any] = {"seconds": round(time.perf_counter() - began)}
    for name in PEERS:
        if name in found:
            out[f"vs_{name}"] = ratio(found["ours"][:, :, 0], found[name][:, :, 0])
    out["vs_nsga2_at_300"] = ratio(found["ours"][:, :, 1], found["nsga2"][:, :, 1])
    out["vs_references"] = ratio(found["ours"][:, :, 0], found["references"][:, :, 0])
    print(json.dumps(out))


if __name__ == "__main__":
    main()
