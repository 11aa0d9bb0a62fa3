"""A whole search without models: an engine whose answers tell how far its weights are from the best
ones, and a judge of that.
"""

import re
import zlib
from io import StringIO

import numpy as np

from evomerge.answering.cache import AnswerCache
from evomerge.answering.engine import Answer
from evomerge.answering.prompts import Prompter
from evomerge.console import Console
from evomerge.errors import EngineError
from evomerge.genome.genome import make_genome
from evomerge.judging.grade import Grade
from evomerge.searching.assemble import judged_search
from evomerge.searching.ledger import open_ledger
from evomerge.searching.prepare import Problem
from evomerge.searching.samplers.make_sampler import make_sampler
from evomerge.study import (
    GenomeSection,
    JudgeSection,
    ObjectiveSection,
    PromptSection,
    SearchSection,
    SplitSection,
    Study,
    TaskSource,
)
from evomerge.tasks import Split, Task

BEST = np.array([0.4, 1.6, 0.9, 1.2])  # of four slices
LAYERS = 4


class TaskEngine:
    """An answer names the distance of the weights from BEST and a fixed luck of weights and task;
    it counts what it answered.
    """

    batched_candidates = gradient = likelihood = marks = None

    def __init__(self, noise=0.3, fails=()):
        self.noise, self.fails = noise, fails
        self.limits, self.watch, self.tokenizer = {}, None, None
        self.answered, self.merged = [], 0

    def apply(self, recipe):
        self.merged += 1
        weights = [s["sources"][0]["parameters"]["weight"] for s in recipe.to_dict()["slices"]]
        self.vector = np.array([weights[i] for i in range(LAYERS)], float)
        self.name = recipe.digest()
        if any(np.allclose(self.vector, v, atol=1e-3) for v in self.fails):
            raise EngineError("this one always fails")

    def batches(self, prompts, settings=None):
        return [list(range(i, min(i + 8, len(prompts)))) for i in range(0, len(prompts), 8)]

    def answer(self, prompts, settings=None, on_answer=None, deadline=None):
        self.answered += [(self.name, prompt) for prompt in prompts]
        distance = float(np.abs(self.vector - BEST).mean())
        luck = [zlib.crc32(f"{self.name}/{prompt}".encode()) / 2**32 - 0.5 for prompt in prompts]
        return [
            Answer(f"quality {4.5 - 2 * distance + self.noise * x:.6f}", False, 4) for x in luck
        ]


class Cut(Exception):
    """The process ends here."""


class Cutting(TaskEngine):
    """Answers `left` more batches, over all engines, and is cut then."""

    left = 0

    def answer(self, prompts, settings=None, on_answer=None, deadline=None):
        if Cutting.left <= 0:
            raise Cut
        Cutting.left -= 1
        return super().answer(prompts)


class QualityJudge:
    """Reads the quality and takes off what the task is hard; counts its grades."""

    name, version = "quality", "1"

    def __init__(self):
        self.graded = 0

    def grade(self, task, answer):
        self.graded += 1
        value = float(re.search(r"quality (\S+)", answer.text)[1]) - int(task.task_id) % 4 * 0.3
        return Grade(float(np.clip(value, 1, 5)), None, "as it says")


def make_study(name="fake", n=None, validation=0.0, objective=None, sources=None, **search):
    settings = {
        "trials": 24,
        "population": 8,
        "uniform": (0.5,),
        "ranking": "all",
        "dtype": "float32",
        "warm_start": None,
    } | search
    return Study(
        genome=GenomeSection(models=("sibling",), base_model="base", layer_granularity=1),
        tasks=sources or (TaskSource(file="none"),),
        study=name,
        split=SplitSection(validation=validation),
        judge=JudgeSection(kind="rules", metric="grade"),
        search=SearchSection(**settings),
        objective=objective or ObjectiveSection(),
    )


def make_search(
    folder, study, engine=None, judge=None, tasks=(32, 16, 0), console=None, references_win=True
):
    """(search, engine, judge) over a study in `folder`, begun or new; tasks: how many to search on,
    held out, for the choice.
    """
    engine, judge = engine or TaskEngine(), judge or QualityJudge()
    genome = make_genome(study, LAYERS)
    every = [Task(i, f"task {i}", "reference") for i in range(sum(tasks))]
    if len(study.tasks) > 1:
        every = [
            Task(i, f"task {i}", "reference", source=i % len(study.tasks))
            for i in range(sum(tasks))
        ]
    a, b, _ = tasks
    split = Split(tuple(every[:a]), tuple(every[a : a + b]), tuple(every[a + b :]))
    sampler = make_sampler(study, genome)
    url = f"sqlite:///{folder}/{study.study}.db"
    ledger = open_ledger(url, study.study, sampler.space, create=True)
    ledger.remember("names", list(genome.names))
    ledger.remember("n_layers", LAYERS)
    if not ledger.facts.begun:
        ledger.remember("references_win", references_win)
    ledger.remember("study_file", study.to_dict())
    cache = AnswerCache(folder / f"{study.study}.answers.sqlite", "scope")
    prompter = Prompter(None, PromptSection(format="template", template="{input}"))
    problem = Problem(study, genome, split, sampler)
    console = console or Console(StringIO())
    search = judged_search(
        problem, ledger, console, engine, prompter=prompter, judge=judge, cache=cache
    )
    return search, engine, judge


def trials(search):
    """What must be equal between a run that was cut and one that was not."""
    done = [r for r in search.ledger.records() if r.state == "complete"]
    return [
        (r.role, r.generation, r.index, r.vector, r.score, r.stderr, r.n, r.grades) for r in done
    ]
