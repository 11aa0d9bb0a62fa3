"""How many graded answers a search needs for a better merge, and how good its winner is.

    python benchmarks/search.py                        # ours as shipped, and two peers
    python benchmarks/search.py --table                # also every option of docs/SEARCH.md
    python benchmarks/search.py --real PAIR DEMO KEPT  # on real models, hours: search_real.py

The last line is one JSON object. answers_to_half_gain: graded answers until the true value of the
chosen winner reaches half of the optimum's gain over the better parent; answers for the references,
the mean and the choice are included, and a search that never gets there within 40,000 counts as
40,000. true_gain_of_winner: the share of that gain at 5,000 answers. To the 50 tasks on which
candidates differ come others on which they never do, --idle of all tasks.

The peers continue past their own limits. Seeds 0 to 19 are reported; defaults were chosen on others
(1000 and 2000 on).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
from search_landscapes import IDLE, LANDSCAPES, Array, World, make_world, with_idle_tasks
from search_simulator import Options, Step, mergekit_evolve, optuna_cmaes, ours

from evomerge.searching.estimates import paired_interval

LIMIT = 40_000
BUDGET = 5_000
SEEDS = range(20)
FLIPS = 20_000
SHIPPED = Options(
    ranking="subset",
    subset=16,
    sampling="informative",
    sigma=0.3,
    lr_adapt=True,
    validation=0.2,
    finalists=3,
    reference_lead=1.0,
)
PEERS = {"optuna_cmaes": optuna_cmaes, "mergekit_evolve": mergekit_evolve}
PLAIN = Options()
OPTIONS = {
    "every task, no learning-rate adaptation": PLAIN,
    "the same, population 24": Options(population=24),
    "the same, sigma 0.35": Options(sigma=0.35),
    "the same, mean over the last half": Options(average=0.5),
    "subset 16": Options(ranking="subset"),
    "subset 16, of one size": Options(ranking="subset", growth=0),
    "subset 8": Options(ranking="subset", subset=8),
    "subset 4": Options(ranking="subset", subset=4),
    "subset 8, population 48": Options(ranking="subset", subset=8, population=48),
    "every task, lr_adapt": Options(lr_adapt=True),
    "race over every task, lr_adapt": Options(ranking="race", subset=50, lr_adapt=True),
    "subset 16, lr_adapt": Options(ranking="subset", lr_adapt=True),
    "subset 8, lr_adapt": Options(ranking="subset", subset=8, lr_adapt=True),
    "subset 4, lr_adapt": Options(ranking="subset", subset=4, lr_adapt=True),
    "race over 16, lr_adapt": Options(ranking="race", lr_adapt=True),
    "subset 16, lr_adapt, sigma 0.17": Options(ranking="subset", lr_adapt=True, sigma=1 / 6),
    "subset 16, lr_adapt, sigma 0.35": Options(ranking="subset", lr_adapt=True, sigma=0.35),
    "subset 16, lr_adapt, population 24": Options(ranking="subset", lr_adapt=True, population=24),
    "subset 16, lr_adapt, mean over the last half": Options(
        ranking="subset", lr_adapt=True, average=0.5
    ),
    "subset 16, lr_adapt, start at the best uniform weight": Options(
        ranking="subset", lr_adapt=True, start="reference"
    ),
    "the shipped one, references cannot win": replace(SHIPPED, reference_lead=None),
    "the shipped one, every task as likely": replace(SHIPPED, sampling="uniform"),
    "the shipped one, subset 8": replace(SHIPPED, subset=8),
    "the shipped one, subset 12": replace(SHIPPED, subset=12),
    "the shipped one, subset 24": replace(SHIPPED, subset=24),
    "the shipped one, start at the best uniform weight": replace(SHIPPED, start="reference"),
    "subset 16, lr_adapt, 3 finalists, best on validation": Options(
        "subset", lr_adapt=True, validation=0.2, finalists=3, lead=0
    ),
    "subset 16, lr_adapt, 3 finalists, lead of 1 error": Options(
        "subset", lr_adapt=True, validation=0.2, finalists=3, lead=1
    ),
    "subset 16, lr_adapt, 3 finalists, lead of 2 errors": Options(
        "subset", lr_adapt=True, validation=0.2, finalists=3, lead=2
    ),
}
# A study as small as the demo's: 4 numbers, 120 tasks that are right or wrong, 72 candidates.
SMALL_POPULATION = 12
SMALL: dict[str, str | Options] = {name: name for name in PEERS} | {
    name: replace(options, population=SMALL_POPULATION, sigma=0.33)
    for name, options in {
        "every task": PLAIN,
        "every task, lr_adapt": Options(lr_adapt=True),
        "every task, lr_adapt, validation": replace(SHIPPED, ranking="all"),
        "subset 30, lr_adapt, validation": replace(SHIPPED, subset=30),
        "subset 16, lr_adapt, validation": SHIPPED,
    }.items()
}
SMALL_CANDIDATES, SMALL_TASKS = 72, 120
SMALL_ANSWERS = SMALL_CANDIDATES * SMALL_TASKS  # of a peer
# candidates between two steps of a peer, in 4 dimensions
PEER_POPULATIONS = {"optuna_cmaes": 1, "mergekit_evolve": 8}


def start(who: str | Options, world: World, seed: int) -> Iterator[Step]:
    return PEERS[who](world, seed) if isinstance(who, str) else ours(world, seed, who)


def measure(job: tuple[str | Options, str, int, float]) -> tuple[int, float]:
    """(answers to half of the gain, share of the gain at the budget)."""
    who, landscape, seed, idle = job
    world = with_idle_tasks(make_world(landscape, seed), seed, idle)
    half, held, value = LIMIT, float("nan"), 0.0
    before: Array | None = None
    for spent, winner in start(who, world, seed):
        if spent > BUDGET and np.isnan(held):
            held = value
        if spent > LIMIT:
            break
        if winner is not before:
            before, value = winner, world.true(winner)
            half = min(half, spent) if value >= 0.5 else half
        if half < LIMIT and not np.isnan(held):
            break
    return half, held


def measure_small(job: tuple[str | Options, str, int]) -> tuple[float, float, float]:
    """After all candidates: the answers and the share of the gain; and the share at the answers of
    every task each time.
    """
    who, landscape, seed = job
    world = make_world(landscape, seed, 4, SMALL_TASKS, zero_one=True)
    last = SMALL_CANDIDATES // (PEER_POPULATIONS[who] if isinstance(who, str) else SMALL_POPULATION)
    cost, held, value = 0, float("nan"), 0.0
    for step, (spent, winner) in enumerate(start(who, world, seed), start=1):
        if spent <= SMALL_ANSWERS:
            value = world.true(winner)
        if step == last:
            cost, held = spent, world.true(winner)
        if step >= last and spent > SMALL_ANSWERS:
            break
    return cost, held, value


def small_row(name: str, found: Array) -> str:
    """A row of the second table from (jobs, 3) results of `measure_small`."""
    cost, held, value = found.mean(axis=0)
    return f"| {name} | {cost:,.0f} | {held:.2f} | {value:.2f} |"


def measure_all(pool: ProcessPoolExecutor, who: str | Options, idle: float) -> dict[str, Array]:
    """landscape -> (seeds, 2) of `measure`."""
    found = {}
    for landscape in LANDSCAPES:
        jobs = [(who, landscape, seed, idle) for seed in SEEDS]
        found[landscape] = np.array(list(pool.map(measure, jobs, chunksize=5)))
    return found


def row(name: str, found: dict[str, Array]) -> str:
    """One row of the table in docs/SEARCH.md."""
    cells = [name]
    for values in found.values():
        low, middle, high = np.quantile(values[:, 0], [0.25, 0.5, 0.75])
        cells.append(f"{middle:,.0f} ({low:,.0f} to {high:,.0f})")
    gains = " / ".join(f"{values[:, 1].mean():.2f}" for values in found.values())
    return f"| {' | '.join([*cells, gains])} |"


def compare(a: dict[str, Array], b: dict[str, Array]) -> dict[str, Any]:
    """Difference of the gains at the budget, paired by landscape and seed; p by flipping signs,
    two-sided.
    """
    pairs = np.concatenate([a[landscape][:, 1] - b[landscape][:, 1] for landscape in a])
    low, high = paired_interval(pairs.tolist())
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (FLIPS, len(pairs)))
    p = (1 + int((np.abs((signs * pairs).mean(axis=1)) >= abs(pairs.mean()) - 1e-12).sum())) / (
        FLIPS + 1
    )
    each = {
        landscape: round(float((a[landscape][:, 1] - b[landscape][:, 1]).mean()), 3)
        for landscape in a
    }
    return {
        "difference": round(float(pairs.mean()), 3),
        "interval": [round(low, 3), round(high, 3)],
        "p": round(p, 5),
        "by_landscape": each,
    }


def figures(found: dict[str, dict[str, Array]]) -> dict[str, Any]:
    """The figures of the last line."""
    medians = {
        name: {landscape: float(np.median(v[:, 0])) for landscape, v in f.items()}
        for name, f in found.items()
    }
    gains = {
        name: {landscape: round(float(v[:, 1].mean()), 3) for landscape, v in f.items()}
        for name, f in found.items()
    }
    against = {name: compare(found["ours"], found[name]) for name in PEERS if name in found}
    ratios = {
        f"vs_{name}": round(
            min(medians[name][land] / medians["ours"][land] for land in LANDSCAPES), 2
        )
        if name in found
        else None
        for name in ("optuna_cmaes", "mergekit_evolve")
    }
    return ratios | {
        "true_gain_of_winner": gains | {"ours_against": against},
        "answers_to_half_gain": medians,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", action="store_true", help="also every option of docs/SEARCH.md")
    parser.add_argument(
        "--real",
        nargs=3,
        metavar=("PAIR", "DEMO", "KEPT"),
        help="on real models: benchmarks/search_real.py",
    )
    parser.add_argument(
        "--idle", type=float, default=IDLE, help=f"share of idle tasks; default {IDLE}, or 0"
    )
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.real:
        from pathlib import Path

        import search_real

        pair, demo, kept = map(Path, arguments.real)
        print(
            json.dumps(
                search_real.gain(pair, kept / "gain") | search_real.demo(demo, kept / "demo")
            )
        )
        return
    contenders: dict[str, str | Options] = {"ours": SHIPPED} | {name: name for name in PEERS}
    if importlib.util.find_spec("cma") is None:
        del contenders["mergekit_evolve"]
        print(
            "mergekit_evolve is left out: the package `cma` is not installed (pip install "
            "'cma>=4,<5')"
        )
    with ProcessPoolExecutor(arguments.processes) as pool:
        print(
            f"| search | {' | '.join(LANDSCAPES)} | gain at {BUDGET:,} answers |\n"
            f"|---|{'---|' * (len(LANDSCAPES) + 1)}"
        )
        found = {}
        for name, who in contenders.items():
            found[name] = measure_all(pool, who, arguments.idle)
            print(row(name, found[name]), flush=True)
        for name, options in OPTIONS.items() if arguments.table else ():
            print(row(name, measure_all(pool, options, arguments.idle)), flush=True)
        if arguments.table:
            head = (
                f"{SMALL_CANDIDATES} candidates, 4 numbers | answers | gain | at "
                f"{SMALL_ANSWERS:,} answers"
            )
            print(f"\n| {head} |\n|---|---|---|---|")
            for name, small in SMALL.items():
                jobs = [(small, landscape, seed) for landscape in LANDSCAPES for seed in SEEDS]
                print(
                    small_row(name, np.array(list(pool.map(measure_small, jobs, chunksize=5)))),
                    flush=True,
                )
    print(json.dumps(figures(found)))


if __name__ == "__main__":
    main()
