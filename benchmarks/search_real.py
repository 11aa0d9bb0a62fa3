"""The search on real models: the gain of the likelihood warm start, and the stock sampler's cost.

    python benchmarks/search_real.py gain PAIR KEPT  # PAIR as make_real_pair.py makes it; hours
    python benchmarks/search_real.py demo DEMO KEPT  # DEMO as `evomerge demo` makes it; an hour
    python benchmarks/search_real.py two PAIR KEPT  # PAIR as make_two_siblings.py makes it; an hour

KEPT is a folder for the studies: an interrupted run continues where it stopped. The last line is
one JSON object.

two: the winner against the better parent and the best uniform weight, on tasks that the search
never saw, in 3 seeds (each another split), with the defaults, and with `warm_start: null` at the
same price: BUDGET answers, of which a task's gradient is GRADIENT.

gain: the score on tasks that the search never saw, of the winner after 24 candidates, with the warm
start and without, in 3 seeds. The difference and its 95 % interval by bootstrap over tasks, each
the mean of its seeds.

demo: Optuna's own CmaEsSampler answers every task for 100 candidates, and its best trial wins. How
many answers until the mean of our distribution is as good on the unseen tasks? A gradient of one
task counts as GRADIENT answers. Ratio of the medians over 5 seeds; a seed that never gets there
counts as all its answers.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from search_studies import (
    mean,
    say,
    search_of,
    study_settings,
    two_sibling_settings,
    unseen,
    values_of,
    winner,
)

from evomerge.searching.estimates import paired_interval
from evomerge.searching.evaluate import JudgedEvaluator
from evomerge.searching.loop import Search
from evomerge.searching.records.study_facts import GradientStep
from evomerge.searching.samplers.cmaes_adapter import Distribution, make_cma
from evomerge.searching.starting.warm_start import BATCH, GRADIENT, warm_start
from evomerge.study import SUBSET
from evomerge.study.search_keys import SearchSection

BUDGET = 120 * 16  # answers of candidates, gradients included
STOCK = 100  # candidates of the stock sampler
GENERATIONS = 8  # of ours, at most


def gain(
    pair: Path,
    kept: Path,
    trials: int = 24,
    seeds: int = 3,
    steps: int = 24,
    dtype: str = "bfloat16",
) -> dict[str, Any]:
    """Likelihood warm start against none, on a real pair with 15 slices."""
    scores: dict[str, list[dict[str, float]]] = {"none": [], "likelihood": []}
    for seed in range(seeds):
        for arm, found in scores.items():
            settings = study_settings(
                pair / "parent",
                pair / "sibling",
                pair / "tasks.jsonl",
                layers=2,
                tokens=24,
                seed=seed,
            )
            settings["search"] |= {
                "trials": trials,
                "population": 8,
                "start": 0.8,
                "uniform": [0.8],
                "dtype": dtype,
            }
            if arm == "likelihood":
                settings["search"] |= {"warm_start": arm, "warm_start_steps": steps}
            with search_of(settings, kept / f"gain-{arm}-{seed}") as search:
                search.run()
                found.append(unseen(search, winner(search)))
                say(
                    f"seed {seed}, warm start {arm}: {mean(found[-1]):.3f} on {len(found[-1])} "
                    "unseen tasks"
                )
    tasks = list(scores["none"][0])
    each = [
        statistics.mean(
            a[task] - b[task] for a, b in zip(scores["likelihood"], scores["none"], strict=True)
        )
        for task in tasks
    ]
    low, high = paired_interval(each)
    return {
        "warm_start_gain": round(statistics.mean(each), 4),
        "interval": [round(low, 4), round(high, 4)],
        "with": [round(mean(s), 4) for s in scores["likelihood"]],
        "without": [round(mean(s), 4) for s in scores["none"]],
        "tasks": len(tasks),
        "dtype": dtype,
    }


def demo(folder: Path, kept: Path, seeds: int = 5, steps: int = 16) -> dict[str, Any]:
    """Answers until we are as good on unseen tasks as the stock sampler is after STOCK candidates,
    with the warm start and without.
    """
    rows = []
    for seed in range(seeds):
        settings = study_settings(
            folder / "base",
            folder / "instruct",
            folder / "tasks.jsonl",
            layers=2,
            tokens=16,
            seed=seed,
        )
        settings["search"] |= {"population": 8, "sigma": 0.33}
        with search_of(settings, kept / f"demo-{seed}") as search:
            tasks = len(search.split.search)
            goal = mean(unseen(search, stock(search, seed)))
            plain = reached(search, search.sampler.default, goal)
            warm, spent = warmed(search, steps, kept / f"demo-{seed}" / "warm_start.jsonl")
            rows.append(
                {
                    "seed": seed,
                    "goal": round(goal, 4),
                    "stock": STOCK * tasks,
                    "plain": plain,
                    "warm": spent + reached(search, warm, goal),
                }
            )
        say(json.dumps(rows[-1]))
    middle = {
        arm: statistics.median(row[arm] for row in rows) for arm in ("stock", "plain", "warm")
    }
    share = {arm: round(middle[arm] / middle["stock"], 3) for arm in ("plain", "warm")}
    return {"demo_answers": middle, "share_of_stock": share, "seeds": rows}


def two(pair: Path, kept: Path, seeds: int = 3, dtype: str = "bfloat16") -> dict[str, Any]:
    """Two siblings with skills of their own: defaults, and no gradient steps, at one price."""
    rows = []
    for seed in range(seeds):
        for arm in ("auto", None):
            settings = two_sibling_settings(pair, seed)
            defaults = SearchSection()
            spent = defaults.warm_start_steps * BATCH * GRADIENT if arm else 0
            trials = (BUDGET - spent) // SUBSET
            settings["search"] |= {"trials": trials, "warm_start": arm, "dtype": dtype}
            with search_of(settings, kept / f"two-{arm}-{seed}") as search:
                verdict = search.run()
            parent = max(
                (name for name in verdict.candidates if name.startswith("sibling:")),
                key=lambda name: verdict.candidates[name].mean,
            )
            row: dict[str, Any] = {"seed": seed, "warm_start": arm, "trials": trials}
            row |= {name: round(found.mean, 3) for name, found in verdict.candidates.items()}
            for over, name in (("parent", parent), ("uniform", "uniform")):
                lead = verdict.leads.get(name)  # None: the winner itself
                row[f"over_{over}"] = None if lead is None else [lead.diff, lead.low, lead.high]
            rows.append(row)
            say(json.dumps(row))
    return {"two_siblings": rows, "answers": BUDGET}


def warmed(search: Search, steps: int, file: Path) -> tuple[Distribution, int]:
    """Where the warm start lets CMA-ES begin, and what it cost in answers; its steps are kept in a
    file.
    """
    done = (
        [
            GradientStep.from_dict(json.loads(line))
            for line in file.read_text(encoding="utf-8").splitlines()
        ]
        if file.exists()
        else []
    )

    def record(step: GradientStep) -> None:
        with file.open("a", encoding="utf-8") as kept:
            kept.write(json.dumps(asdict(step)) + "\n")

    study = search.study.replace(search=search.study.search.replace(warm_start_steps=steps))
    evaluator = search.evaluator
    assert isinstance(evaluator, JudgedEvaluator)
    found = warm_start(
        evaluator.engine,
        search.genome,
        search.split.search,
        evaluator.prompter,
        study,
        done,
        record,
        lambda line: say(f"warm start {line}"),
    )
    start = search.sampler.default
    cov = start.cov * np.outer(found.scales, found.scales)
    return Distribution(np.array(found.mean), start.sigma, cov), GRADIENT * sum(
        step.tasks for step in found.steps
    )


def stock(search: Search, seed: int) -> tuple[float, ...]:
    """The best trial of Optuna's CmaEsSampler with its defaults, scored on all search tasks."""
    genes = search.genome.genes

    def objective(trial: optuna.Trial) -> float:
        vector = [trial.suggest_float(gene.name, gene.low, gene.high) for gene in genes]
        return mean(
            values_of(search, vector, search.split.search, f"stock {trial.number + 1}/{STOCK}")
        )

    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.CmaEsSampler(seed=seed)
    )
    study.optimize(objective, n_trials=STOCK)
    return tuple(study.best_params[gene.name] for gene in genes)


def reached(search: Search, start: Distribution, goal: float) -> int:
    """Answers until the distribution's mean has the goal on unseen tasks, drawn and told as in a
    search.
    """
    sampler, tasks = search.sampler, search.split.search
    optimizer = make_cma(start, sampler.bounds, sampler.population, sampler.seed)
    for generation in range(GENERATIONS):
        at = np.clip(optimizer.mean, *sampler.bounds.T).tolist()
        score = mean(unseen(search, at))
        say(
            f"generation {generation}: the mean has {score:.3f} on unseen tasks, the goal is "
            f"{goal:.3f}"
        )
        if score >= goal:
            return generation * sampler.population * len(tasks)
        drawn = [optimizer.ask() for _ in range(sampler.population)]
        optimizer.tell(
            [
                (x, -mean(values_of(search, x.tolist(), tasks, f"generation {generation + 1}")))
                for x in drawn
            ]
        )
    return GENERATIONS * sampler.population * len(tasks)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="The search on real answers; see the file's first lines."
    )
    parser.add_argument("what", choices=["gain", "demo", "two"])
    parser.add_argument("folder", type=Path, metavar="PAIR")
    parser.add_argument("kept", type=Path, metavar="KEPT")
    parser.add_argument("--seeds", type=int, default=None)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument(
        "--dtype", default=None, help="with gain: float32 is faster on CPUs without bf16 products"
    )
    given = {key: value for key, value in vars(parser.parse_args()).items() if value is not None}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    what, folder, kept = given.pop("what"), given.pop("folder").resolve(), given.pop("kept")
    measures: dict[str, Callable[..., dict[str, Any]]] = {"gain": gain, "demo": demo, "two": two}
    print(json.dumps(measures[what](folder, kept, **given)))


if __name__ == "__main__":
    main()
