"""What a search costs besides merging, answering and judging, by the number of its trials.

The real loop runs on an engine and a judge that take no time, and stores its trials in SQLite. A
study is filled to N complete candidates first; then the seconds from one candidate to the next are
measured. `python -m benchmarks.overhead` prints their median at 50, 500 and 2,000 trials and the
ratio of the last to the first, which should stay near 1.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from optuna.distributions import FloatDistribution
from optuna.trial import create_trial

from evomerge.answering.cache import AnswerCache
from evomerge.answering.engine import Answer
from evomerge.answering.prompts import Prompter
from evomerge.console import Console
from evomerge.genome.genome import Genome, make_genome
from evomerge.judging.grade import Grade
from evomerge.recipe import Recipe
from evomerge.searching.assemble import judged_search
from evomerge.searching.history import History
from evomerge.searching.ledger import Ledger, open_ledger
from evomerge.searching.loop import Search
from evomerge.searching.prepare import Problem
from evomerge.searching.records.study_facts import stored
from evomerge.searching.records.trial_record import Result, TaskGrade
from evomerge.searching.samplers.make_sampler import make_sampler
from evomerge.study import (
    GenomeSection,
    JudgeSection,
    PromptSection,
    SearchSection,
    Study,
    TaskSource,
)
from evomerge.tasks import Split, Task

COUNTS, MEASURED = (50, 500, 2000), 24
TASKS, LAYERS = 48, 16


class InstantEngine:
    """Answers at once, each recipe differently, and keeps when each candidate was merged."""

    batched_candidates = gradient = likelihood = None

    def __init__(self) -> None:
        self.limits: dict[str, int] = {}
        self.watch: Callable[[int, int], None] | None = None
        self.tokenizer: Any = None
        self.recipe = ""
        self.merged: list[tuple[float, float]] = []  # wall and CPU time

    def apply(self, recipe: Recipe) -> None:
        self.merged.append((time.perf_counter(), time.process_time()))
        self.recipe = recipe.digest()

    def batches(self, prompts: Sequence[str], settings: object = None) -> list[list[int]]:
        return [list(range(len(prompts)))]

    def answer(
        self,
        prompts: Sequence[str],
        settings: object = None,
        on_answer: object = None,
        deadline: float | None = None,
    ) -> list[Answer]:
        answers = []
        for prompt in prompts:
            quality = zlib.crc32(f"{prompt} {self.recipe}".encode()) / 2**32
            answers.append(Answer(f"quality {quality}", False, 8))
        return answers


class InstantJudge:
    """Reads the grade from the answer."""

    name, version = "instant", "1"

    def grade(self, task: Task, answer: Answer) -> Grade:
        quality = re.search(r"quality (\S+)", answer.text)
        assert quality is not None
        return Grade(1 + 4 * float(quality[1]), None, "as it says")


def fill(ledger: Ledger, problem: Problem, trials: int) -> None:
    """Give the study complete candidates, drawn as CMA-ES draws them, without answers."""
    optimizer = problem.sampler.replay(History(), 0)
    distributions: dict[str, Any] = {}
    for name, (low, high) in problem.sampler.space.items():
        distributions[name] = FloatDistribution(low, high)
    told = []
    for number in range(trials):
        generation, index = divmod(number, problem.sampler.population)
        x = optimizer.ask()
        score = 2 + zlib.crc32(x.tobytes()) / 2**32
        grades = {task.key: TaskGrade(None, False, score) for task in problem.split.search}
        result = Result(score, 0.1, len(grades), 0.0, {"answer": 1.0}, grades)
        attributes = {"role": "candidate", "generation": generation, "index": index}
        trial = create_trial(
            value=score,
            params=dict(zip(distributions, x.tolist(), strict=True)),
            distributions=distributions,
            user_attrs={**attributes, "result": stored(result)},
        )
        ledger.storage.study.add_trial(trial)
        told.append((x, -score))
        if len(told) == problem.sampler.population:
            optimizer.tell(told)
            told = []


def open_study(folder: Path, trials: int, ranking: str) -> tuple[Search, InstantEngine]:
    """A new study of `trials` candidates, and its engine."""
    search: Any = {"trials": trials, "ranking": ranking, "uniform": (0.5,), "dtype": "float32"}
    study = Study(
        genome=GenomeSection(models=("sibling",), base_model="base", layer_granularity=1),
        tasks=(TaskSource(file="none"),),
        study="overhead",
        judge=JudgeSection(kind="rules", metric="grade"),
        search=SearchSection(**search),
    )
    genome: Genome = make_genome(study, LAYERS)
    tasks = tuple(Task(i, f"task {i}", "reference") for i in range(TASKS + TASKS // 2))
    problem = Problem(
        study, genome, Split(tasks[:TASKS], tasks[TASKS:]), make_sampler(study, genome)
    )
    url = f"sqlite:///{folder}/overhead.db"
    ledger = open_ledger(url, "overhead", problem.sampler.space, create=True)
    ledger.remember("names", list(genome.names))
    ledger.remember("n_layers", LAYERS)
    ledger.remember("study_file", study.to_dict())
    engine: Any = InstantEngine()
    no_tokenizer: Any = None  # a template needs none
    prompter = Prompter(no_tokenizer, PromptSection(format="template", template="{input}"))
    cache = AnswerCache(folder / "answers.sqlite", "overhead")
    running = judged_search(
        problem,
        ledger,
        Console(StringIO()),
        engine,
        prompter=prompter,
        judge=InstantJudge(),
        cache=cache,
    )
    return running, engine


def seconds_per_candidate(trials: int, ranking: str = "subset") -> tuple[float, float]:
    """Medians of wall and CPU time between candidates of a study that has `trials` already."""
    with tempfile.TemporaryDirectory() as folder:
        search, engine = open_study(Path(folder), trials + MEASURED, ranking)
        fill(search.ledger, search.problem, trials)
        search.run()
        references = len(search.ledger.history().references)
        merged = engine.merged[references : references + MEASURED]
    passed = np.diff(np.array(merged), axis=0)
    wall, cpu = np.median(passed, axis=0).tolist()
    return wall, cpu


def main() -> None:
    """Print the seconds at each number of trials, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, nargs="+", default=list(COUNTS))
    parser.add_argument("--ranking", default="subset", choices=["all", "subset", "race"])
    args = parser.parse_args()
    figures: dict[str, float] = {}
    measured = []
    for trials in args.trials:
        wall, cpu = seconds_per_candidate(trials, args.ranking)
        print(f"{trials:>5} trials: {wall:.4f} s per candidate, {cpu:.4f} s of them CPU")
        figures[f"wall_{trials}"], figures[f"cpu_{trials}"] = round(wall, 4), round(cpu, 4)
        measured.append((wall, cpu))
    figures["wall_ratio"] = round(measured[-1][0] / measured[0][0], 2)
    figures["cpu_ratio"] = round(measured[-1][1] / measured[0][1], 2)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
