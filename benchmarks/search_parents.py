"""Gradient steps without references, against those with them and the start, on a real pair.

    python benchmarks/search_parents.py PAIR KEPT [SEEDS]  # PAIR as make_two_siblings.py makes it

Share right of the tasks that the search never saw, at the vector to which the steps lead: `start`
is the uniform weight where they begin, `likelihood` follows the references, `parents` the better
parent of each task, whose references it is not shown. KEPT is a folder for the answers. The
intervals are over tasks, each the mean of its seeds; every seed has another split. The last line is
one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from search_studies import mean, say, search_of, two_sibling_settings, unseen, values_of

from evomerge.searching.estimates import paired_interval
from evomerge.searching.evaluate import JudgedEvaluator
from evomerge.searching.loop import Search
from evomerge.searching.starting.lessons import Lessons
from evomerge.searching.starting.warm_start import WarmStart, climb, warm_start
from evomerge.tasks import Task

ARMS = ("start", "likelihood", "parents")


def walked(search: Search, arm: str) -> WarmStart:
    """Where the steps of an arm lead."""
    evaluator, study, genome = search.evaluator, search.study, search.genome
    assert isinstance(evaluator, JudgedEvaluator)
    engine, prompter, tasks = evaluator.engine, evaluator.prompter, search.split.search

    def report(line: str) -> None:
        say(f"{arm} {line}")

    if arm == "likelihood":
        return warm_start(engine, genome, tasks, prompter, study, report=report)
    parents = tuple(search.ledger.history().parents.values())
    hidden = [Task(task.task_id, task.input) for task in tasks]
    lessons = Lessons(engine, genome, hidden, prompter, parents, "correct", evaluator.answers)
    return climb(genome, study, len(hidden), lessons, (), lambda step: None, report)


def measure(pair: Path, kept: Path, seed: int) -> dict[str, dict[str, float]]:
    """Arm -> task -> 1 or 0 on the held-out tasks."""
    settings = two_sibling_settings(pair, seed)
    settings["search"] |= {"uniform": [0.5], "dtype": "float32"}
    found = {}
    with search_of(settings, kept / f"parents-{seed}") as search:
        search._evaluate_references()
        for arm in ARMS:
            began, vector = time.perf_counter(), search.sampler.default.mean.tolist()
            if arm != "start":
                vector = list(walked(search, arm).mean)
            spent = time.perf_counter() - began
            found[arm] = unseen(search, vector)
            say(f"seed {seed} {arm}: {mean(found[arm]):.3f} after {spent:.0f} s, {spread(vector)}")
            seen = mean(values_of(search, vector, search.split.search, arm))
            say(f"  on the search tasks {seen:.3f}")
    return found


def spread(vector: Sequence[float]) -> str:
    """The numbers, rounded."""
    return " ".join(f"{x:.2f}" for x in vector)


def main() -> None:
    pair, kept = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    seeds = range(int(sys.argv[3]) if len(sys.argv) > 3 else 1)
    rows = [measure(pair, kept, seed) for seed in seeds]
    result: dict[str, Any] = {arm: [round(mean(row[arm]), 4) for row in rows] for arm in ARMS}
    for other in ("start", "likelihood"):
        gains: dict[str, list[float]] = {}
        for row in rows:
            for task, value in row["parents"].items():
                gains.setdefault(task, []).append(value - row[other][task])
        each = [float(np.mean(values)) for values in gains.values()]
        low, high = paired_interval(each)
        result[f"parents_over_{other}"] = [round(x, 4) for x in (float(np.mean(each)), low, high)]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
