"""Studies of real models for the benchmarks: their settings, opening them, and unseen tasks."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from evomerge.console import Console
from evomerge.searching.loop import Search
from evomerge.searching.open_search import open_search
from evomerge.study import Study, read_study
from evomerge.tasks import Task


def winner(search: Search) -> tuple[float, ...]:
    """The vector that the verdict was about."""
    found = search.ledger.history().trial(search.ledger.facts.compared["winner"])
    assert found is not None
    return found.vector


def unseen(search: Search, vector: Sequence[float]) -> dict[str, float]:
    """task_id -> 1 or 0 on the held-out tasks."""
    return values_of(search, vector, search.split.held_out, "unseen")


def values_of(
    search: Search, vector: Sequence[float], tasks: Sequence[Task], label: str
) -> dict[str, float]:
    found = search.evaluator.evaluate(search.genome.decode(vector), [tasks], label)
    return {
        str(task.task_id): float(bool(grade.correct))
        for task, grade in zip(found.tasks, found.grades, strict=True)
    }


def mean(values: dict[str, float]) -> float:
    return statistics.mean(values.values())


def study_settings(
    base: Path, sibling: Path, tasks: Path, layers: int, tokens: int, seed: int
) -> dict[str, Any]:
    return {
        "genome": {
            "base_model": str(base),
            "models": [str(sibling)],
            "merge_method": "task_arithmetic",
            "layer_granularity": layers,
        },
        "tasks": [{"file": str(tasks)}],
        "generation": {"max_new_tokens": tokens},
        "judge": {"kind": "rules", "metric": "correct"},
        "search": {"seed": seed, "warm_start": None},
        "engine": {"batch_size": 64, "threads": 1},
    }


def two_sibling_settings(pair: Path, seed: int) -> dict[str, Any]:
    """Of a pair as make_two_siblings.py makes it; every seed has another split."""
    settings = study_settings(
        pair / "parent", pair / "a", pair / "tasks.jsonl", layers=2, tokens=24, seed=seed
    )
    settings["genome"]["models"].append(str(pair / "b"))
    settings["split"] = {"seed": seed}
    settings["prompt"] = {"format": "chat"}
    return settings


@contextmanager
def search_of(settings: dict[str, Any], kept: Path) -> Iterator[Search]:
    """A search with its own study file in `kept`."""
    kept.mkdir(parents=True, exist_ok=True)
    file = kept / "study.yaml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    study: Study = read_study(file)
    with open_search(study, f"sqlite:///{kept.resolve()}/study.db", Console()) as search:
        yield search


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
