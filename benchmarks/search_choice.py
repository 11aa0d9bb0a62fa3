"""Two choices in simulated searches: whether a reference may win, and where several siblings start.

    python benchmarks/search_choice.py references [SEEDS]
    python benchmarks/search_choice.py starts [SEEDS]

Every figure is after 1,500 / 2,500 / 5,000 answers, as the mean of the three landscapes and the
seeds, 20 by default.

references: the winner's true value minus the best reference's, in grade points. `something to
find`: the landscapes of search_landscapes.py. `nothing`: the optimum is that uniform weight itself.
A row is the lead, in standard errors, with which a reference takes the mean's place.

starts: the share of the gain that the distribution's mean has. A column is the number of siblings
and what the best weights of a slice add up to.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
from search import SHIPPED
from search_landscapes import (
    BOUNDS,
    LANDSCAPES,
    Array,
    World,
    make_sibling_world,
    make_uniform_world,
    make_world,
)
from search_simulator import Options, ours

AFTER = (1_500, 2_500, 5_000)
MakeWorld = Callable[[str, int], World]
WORLDS: dict[str, MakeWorld] = {
    "something to find": make_world,
    "nothing, 0.5 is best": partial(make_uniform_world, weight=0.5, fall=0.6),
    "nothing, 0.25 is best": partial(make_uniform_world, weight=0.25, fall=0.2),
}
RULES = {
    "never": replace(SHIPPED, reference_lead=None),
    **{f"{lead:g}": replace(SHIPPED, reference_lead=lead) for lead in (0.0, 0.5, 1.0, 2.0, 3.0)},
}
SIBLINGS: dict[str, MakeWorld] = {
    f"{m}, {share:g}": partial(make_sibling_world, siblings=m, share=share)
    for m in (2, 3)
    for share in (0.67, 1.0, 1.5, 2.0)
}
PLAIN = replace(SHIPPED, finalists=0, reference_lead=None)
STARTS = {
    "1 each": replace(PLAIN, start="one"),
    "an equal share of 1": PLAIN,
    "the best reference": replace(PLAIN, start="reference"),
    "the best sibling": replace(PLAIN, start="sibling"),
}
Job = tuple[bool, Options, MakeWorld, str, int]


def measure(job: Job) -> list[float]:
    """What the search has after each of AFTER answers: grade points or a share of the gain."""
    points, options, make, landscape, seed = job
    world = make(landscape, seed)
    best = max(map(world.value, world.references()))
    found: list[float] = []
    for spent, winner in ours(world, seed, options):
        at = np.clip(winner, *BOUNDS)
        value = world.value(at) - best if points else world.true(at)
        while len(found) < len(AFTER) and spent > AFTER[len(found)]:
            found.append(value)
        if len(found) == len(AFTER):
            break
    return found


def table(
    points: bool, rows: dict[str, Options], columns: dict[str, MakeWorld], seeds: Iterable[int]
) -> None:
    """Print a table."""
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    with ProcessPoolExecutor(2) as pool:
        for name, options in rows.items():
            cells = []
            for make in columns.values():
                jobs: list[Job] = []
                for landscape in LANDSCAPES:
                    jobs += [(points, options, make, landscape, seed) for seed in seeds]
                found: Array = np.array(list(pool.map(measure, jobs, chunksize=5))).mean(axis=0)
                cells.append(
                    " / ".join(f"{value:{'+.3f' if points else '.2f'}}" for value in found)
                )
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    what, *count = sys.argv[1:] or [""]
    if what not in ("references", "starts"):
        sys.exit("Write references or starts.")
    seeds = range(int(count[0]) if count else 20)
    if what == "references":
        table(True, RULES, WORLDS, seeds)
    else:
        table(False, STARTS, SIBLINGS, seeds)


if __name__ == "__main__":
    main()
