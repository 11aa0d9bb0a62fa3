"""Answers of real merges at many vectors, kept so that searches can be replayed without a model.

    python benchmarks/make_surrogate.py PAIR KEPT OUT    # PAIR as make_two_siblings.py makes it

Every task is answered and its reference's likelihood computed at COUNT vectors of the pair's
numbers: a third drawn at random, a third on lines between two known points, a third as CMA-ES draws
them. KEPT is a folder for what is done; an interrupted run goes on where it stopped. OUT can be
written from any part of the vectors, and a run without KEPT goes on after those that are in OUT.

OUT is an .npz file: `vectors` (n, d) float32, `kinds` (n,) of KINDS, `task_ids` (t,), and per
vector and task `correct` (n, t) bool, `tokens` (n, t) uint8 (of the answer) and `nats` (n, t)
uint8, minus the mean log-likelihood of a reference's tokens, its end token among them, in steps of
STEP nats, at most 255 of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from read_once import read_tasks
from search_studies import say, search_of, study_settings, two_sibling_settings

from evomerge.answering.hf.engine import TransformersEngine
from evomerge.searching.evaluate import JudgedEvaluator
from evomerge.searching.loop import Search
from evomerge.searching.samplers.cmaes_adapter import Distribution, make_cma
from evomerge.tasks import Task

Array = NDArray[Any]
COUNT = 2000
KINDS = ("random", "line", "search")
STEP = 0.04
POPULATION = 14
GENERATIONS = 12  # of one search; then another begins


def random_vector(rng: np.random.Generator, numbers: int, siblings: int, high: float) -> Array:
    """A level for each sibling, and about it weights that vary smoothly or freely by layer."""
    slices = numbers // siblings
    levels = rng.uniform(0, 1.2 if siblings > 1 else 1.6, siblings)
    spread = rng.uniform(0, 0.6)
    free = rng.standard_normal((slices, siblings))
    if rng.random() < 0.5:
        free = np.cumsum(free, axis=0) / np.sqrt(slices)
    drawn: Array = np.clip((levels + spread * free).ravel(), 0, high)
    return drawn


def line_vector(rng: np.random.Generator, known: list[Array], high: float) -> Array:
    """A point on the line through two of the known ones, at most a fifth beyond either."""
    one, other = rng.choice(len(known), 2, replace=False)
    at = rng.uniform(-0.2, 1.2)
    point: Array = np.clip(known[one] + at * (known[other] - known[one]), 0, high)
    return point


def plan(
    scores: list[float], numbers: int, siblings: int, high: float
) -> Iterator[tuple[str, Array]]:
    """The vectors with their kinds, in order. `scores` holds those of all yielded before."""
    ends = [np.zeros(siblings), *np.eye(siblings), np.full(siblings, 0.5), np.full(siblings, 0.8)]
    known = [np.tile(end, numbers // siblings) for end in ends]
    for vector in known:
        yield "line", vector
    searched = 0
    while True:
        rng = np.random.default_rng([5, searched])
        start = known[rng.integers(len(known))] if searched % 2 else known[-2]
        start = np.clip(start, 0.1, high - 0.1)
        optimizer = make_cma(
            Distribution(start, float(rng.choice([0.15, 0.25])), np.eye(numbers)),
            np.tile((0.0, high), (numbers, 1)),
            POPULATION,
            searched,
        )
        for _ in range(GENERATIONS):
            told = []
            for _ in range(POPULATION):
                yield "random", random_vector(rng, numbers, siblings, high)
                yield "line", line_vector(rng, known, high)
                drawn = optimizer.ask()
                yield "search", drawn
                told.append((drawn, -scores[-1]))
            optimizer.tell(told)
        known.append(np.clip(optimizer.mean, 0, high))
        searched += 1


def all_tasks(search: Search) -> list[Task]:
    """Those of every part of the split, in the order of their ids."""
    split = search.split
    return sorted([*split.search, *split.validation, *split.held_out], key=lambda t: str(t.task_id))


def measure(search: Search, kind: str, vector: Array) -> dict[str, Any]:
    """What is kept of one vector."""
    evaluator, tasks = search.evaluator, all_tasks(search)
    assert isinstance(evaluator, JudgedEvaluator)
    engine = evaluator.engine
    assert isinstance(engine, TransformersEngine)
    engine.apply(search.genome.decode(vector.tolist()))
    found = read_tasks(engine, evaluator.prompter, tasks, search.study.generation.max_new_tokens)
    grades = [
        evaluator.judge.grade(task, one.answer) for task, one in zip(tasks, found, strict=True)
    ]
    return {
        "kind": KINDS.index(kind),
        "vector": vector.tolist(),
        "correct": [int(bool(grade.correct)) for grade in grades],
        "tokens": [one.answer.tokens for one in found],
        "nats": [round(one.nats, 3) for one in found],
    }


def read(path: Path, out: Path, task_ids: list[str]) -> list[dict[str, Any]]:
    """The vectors that are done: those of `path`, or, where it has fewer, of `out`.

    A line that a kill cut short is dropped. The program ends where `out` is of other tasks.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
    rows = [json.loads(line) for line in text.splitlines()]
    if out.exists():
        known = read_out(out, task_ids)
        if len(known) > len(rows):
            rows = known
            text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return rows


def read_out(out: Path, task_ids: list[str]) -> list[dict[str, Any]]:
    """The rows of a file that `write` has written."""
    with np.load(out) as file:
        if file["task_ids"].tolist() != task_ids:
            sys.exit(f"{out} is of other tasks: move it away")
        return [
            {
                "kind": int(file["kinds"][i]),
                "vector": file["vectors"][i].tolist(),
                "correct": file["correct"][i].astype(int).tolist(),
                "tokens": file["tokens"][i].tolist(),
                "nats": (file["nats"][i] * STEP).tolist(),
            }
            for i in range(len(file["kinds"]))
        ]


def write(rows: list[dict[str, Any]], task_ids: list[str], out: Path) -> None:
    """The file that the benchmarks read."""
    columns = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        out,
        vectors=columns["vector"].astype(np.float32),
        kinds=columns["kind"].astype(np.uint8),
        task_ids=np.array(task_ids),
        correct=columns["correct"].astype(bool),
        tokens=np.clip(columns["tokens"], 0, 255).astype(np.uint8),
        nats=np.clip(np.rint(columns["nats"] / STEP), 0, 255).astype(np.uint8),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("pair", type=Path, metavar="PAIR")
    parser.add_argument("kept", type=Path, metavar="KEPT")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--dtype", default="float32", help="float32 is faster on CPUs without bf16 products"
    )
    given = parser.parse_args()
    pair, kept = given.pair.resolve(), given.kept
    two = (pair / "b").exists()
    if two:
        settings = two_sibling_settings(pair, 0)
    else:
        settings = study_settings(
            pair / "parent", pair / "sibling", pair / "tasks.jsonl", layers=2, tokens=24, seed=0
        )
    settings["search"]["dtype"] = given.dtype
    settings["engine"]["threads"] = given.threads
    with search_of(settings, kept) as search:
        numbers, siblings = search.genome.dimensions, 2 if two else 1
        path = kept / "vectors.jsonl"
        task_ids = [str(task.task_id) for task in all_tasks(search)]
        rows = read(path, given.out, task_ids)
        scores = [float(np.mean(row["correct"])) for row in rows]
        began, first = time.monotonic(), len(rows)
        high = search.genome.genes[0].high
        # the plan is replayed: it asks for the scores of the vectors that are done
        told: list[float] = []
        for i, (kind, vector) in enumerate(plan(told, numbers, siblings, high)):
            if i >= given.count:
                break
            if i >= first:
                row = measure(search, kind, vector)
                rows.append(row)
                scores.append(float(np.mean(row["correct"])))
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                pace = (time.monotonic() - began) / (i + 1 - first)
                rest = pace * (given.count - i - 1) / 3600
                say(
                    f"{i + 1}/{given.count}  {scores[-1]:.3f}  {pace:.1f} s each  {rest:.1f} h left"
                )
            told.append(scores[i])
        write(rows, task_ids, given.out)


if __name__ == "__main__":
    main()
