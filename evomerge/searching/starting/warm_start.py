"""The warm start: gradient steps give CMA-ES its first mean and scales.

The steps are taken in the genome's numbers (walk.py). What is climbed is the mean log-likelihood of
the references, on search tasks only: each reference's mean per token, and the mean of that over
tasks. Without references it is minus the divergence from the parents (lessons.py). AdaMerging (Yang
et al. 2024, arXiv 2310.02575) climbs the entropy of unlabelled answers in the same way.

Nothing is kept between steps except what is stored: a step is a function of the study's seed, its
number, and the gradients before it. A run that was killed therefore resumes as if it had not been.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.answering.engine import Engine, LikelihoodGradient, items_at, without_thoughts
from evomerge.answering.hf.gradient import check_gradient
from evomerge.answering.prompts import Prompter
from evomerge.console import Console, duration
from evomerge.errors import EngineError, StudyFileError
from evomerge.genome.genome import Genome
from evomerge.searching.generation.stopping import StudyClock
from evomerge.searching.ledger import Ledger
from evomerge.searching.prepare import Problem
from evomerge.searching.records.study_facts import GradientStep, Start
from evomerge.searching.samplers.cmaes_adapter import Distribution
from evomerge.searching.starting.lessons import Answering, Lessons
from evomerge.searching.starting.source_study import as_start
from evomerge.searching.starting.walk import (
    adam_trajectory,
    average,
    minibatch_indices,
    step_scales,
)
from evomerge.study import Study
from evomerge.tasks import Task

BATCH = 16  # tasks of a step
GRADIENT = 3  # a task's gradient in answers: a forward pass, and a backward one at twice its cost
MOSTLY = 0.5  # share of the search tasks that must have references for `auto`
CLIMBED = {
    "likelihood": "the references' likelihood",
    "parents": "the divergence from each task's better parent",
}


@dataclass(frozen=True)
class WarmStart:
    """Where CMA-ES begins: a mean (d,) within bounds, and factors (d,) of the first step size."""

    mean: tuple[float, ...]
    scales: tuple[float, ...]  # geometric mean NARROWED
    steps: tuple[GradientStep, ...]
    seconds: float  # of all steps, those of earlier runs included


# a vector (d,), and which tasks: the value to climb there
GradientAt = Callable[[list[float], list[int]], LikelihoodGradient]


@dataclass(frozen=True)
class GradientStart:
    """The warm start of one study, on a key of CLIMBED."""

    problem: Problem
    engine: Engine
    prompter: Prompter
    kind: str
    answers: Answering  # of a parent

    def run(self, ledger: Ledger, console: Console, clock: StudyClock) -> None:
        """Climb, each step recorded, and remember where the first generation is drawn; once.

        Raises as `warm_start`.
        """
        if ledger.facts.start is not None or ledger.history().candidates:
            return
        try:
            start = self._climb(ledger, console, clock)
        except EngineError as error:
            if self.problem.study.search.warm_start != "auto":
                raise
            console.say(f"note: the search starts without gradient steps: {error}")
            start = as_start(self.problem.sampler.default)
        ledger.remember("start", start)

    def _climb(self, ledger: Ledger, console: Console, clock: StudyClock) -> Start:
        """Where the first generation is drawn."""
        facts = ledger.facts
        done = list(facts.warm_start)

        def record(step: GradientStep) -> None:
            done.append(step)
            ledger.remember("warm_start", done)
            clock.remember()

        def report(line: str) -> None:
            console.status(f"warm start  {line}")

        study, genome, tasks = self.problem.study, self.problem.genome, self.problem.split.search
        if self.kind == "likelihood":
            found = warm_start(
                self.engine, genome, tasks, self.prompter, study, facts.warm_start, record, report
            )
        else:
            check_warm_start(genome, tasks, self.engine, self.kind)
            parents = tuple(ledger.history().parents.values())
            lessons = Lessons(
                self.engine, genome, tasks, self.prompter, parents, study.metric, self.answers
            )
            found = climb(genome, study, len(tasks), lessons, facts.warm_start, record, report)
        # the scales' size is that of the first steps, and the rest is their form
        size = float(np.exp(np.log(found.scales).mean()))
        default = self.problem.sampler.default
        cov = default.cov * np.outer(found.scales, found.scales) / size**2
        start = Distribution(np.array(found.mean), default.sigma * size, cov)
        console.say(
            f"{len(found.steps)} gradient steps on {CLIMBED[self.kind]}, "
            f"{duration(found.seconds)}: the first generation is drawn around their end"
        )
        return as_start(start, mean_is_first=True)


def find_warm_start(
    problem: Problem, engine: Engine, prompter: Prompter, answers: Answering
) -> GradientStart | None:
    """The study's warm start; None where it has none, or `auto` finds that it cannot have one."""
    study, split = problem.study, problem.split
    if study.search.warm_start is None:
        return None
    obstacle = warm_start_obstacle(study, problem.genome, split.search, engine)
    kind = study.search.demanded_start
    if kind is None:
        if obstacle is not None:
            return None
        kind = climbed_by_default(problem.genome, split.search)
    return GradientStart(problem, engine, prompter, kind, answers)


def climbed_by_default(genome: Genome, tasks: Sequence[Task]) -> str:
    """What `auto` climbs, a key of CLIMBED.

    The likelihood of a single sibling's merges where enough of the tasks have references; the
    better parent teaches the merges of several siblings, which are good at different tasks
    (docs/SEARCH.md has figures of both).
    """
    with_reference = [task for task in tasks if task.output]
    if len(genome.siblings) > 1 or len(with_reference) < MOSTLY * len(tasks):
        return "parents"
    return "likelihood"


def warm_start_obstacle(
    study: Study, genome: Genome, tasks: Sequence[Task], engine: Engine | None = None
) -> str | None:
    """Why `auto` takes no gradient steps; None where it does. `tasks`: those to search on."""
    if study.search.source_study or study.random_init:
        return "the study file sets another start"
    if study.engine.quantization:
        return "a 4-bit model has no gradient"
    if study.engine.kind != "transformers":
        return f"{study.engine.kind} has no gradient"
    try:
        check_warm_start(genome, tasks, engine, climbed_by_default(genome, tasks))
    except StudyFileError as error:
        return error.what
    return None


def check_demanded_start(
    study: Study, genome: Genome, tasks: Sequence[Task], engine: Engine | None = None
) -> None:
    """Raise StudyFileError for a warm start that the study file names and that cannot be."""
    kind, section = study.search.demanded_start, study.engine
    if kind is None:
        return
    if section.quantization:
        raise StudyFileError(
            "a 4-bit model has no gradient",
            where="search.warm_start",
            found=kind,
            remedy="Leave out engine.quantization.",
        )
    if section.kind != "transformers":
        raise StudyFileError(
            "needs an engine with gradients",
            where="search.warm_start",
            found=f"{kind}, engine.kind: {section.kind}",
            remedy="Use engine.kind: transformers.",
        )
    check_warm_start(genome, tasks, engine, kind)


def check_warm_start(
    genome: Genome,
    tasks: Sequence[Task],
    engine: Engine | None = None,
    kind: str | None = "likelihood",
) -> None:
    """Raise StudyFileError where there can be no warm start.

    This is the case with another method or engine, or without the references of a likelihood.
    """
    check_gradient(genome)
    if kind == "likelihood" and not any(task.output for task in tasks):
        raise StudyFileError(
            "no search task has a reference",
            where="search.warm_start",
            remedy="Write `parents`, or add `output` to tasks.",
        )
    if engine is not None and engine.gradient is None:
        raise StudyFileError(
            "needs an engine with gradients",
            where="search.warm_start",
            remedy="Use engine.kind: transformers.",
        )


def warm_start(
    engine: Engine,
    genome: Genome,
    tasks: Sequence[Task],
    prompter: Prompter,
    study: Study,
    done: Sequence[GradientStep] = (),
    record: Callable[[GradientStep], None] = lambda step: None,
    report: Callable[[str], None] = lambda line: None,
) -> WarmStart:
    """`search.warm_start_steps` steps on the search tasks that have references.

    The first of them are `done` already. `record` gets each new step before the next one begins,
    `report` a line on it. Raises StudyFileError as `check_warm_start` does, EngineError where
    memory does not suffice.
    """
    check_warm_start(genome, tasks, engine)
    gradient = engine.gradient
    assert gradient is not None
    pairs = []
    for task in tasks:
        if task.output:
            prompt = without_thoughts(prompter.render(task.input), engine)
            pairs.append((prompt, task.output))

    def gradient_at(vector: list[float], chosen: list[int]) -> LikelihoodGradient:
        return gradient(genome, vector, items_at(pairs, chosen))

    return climb(genome, study, len(pairs), gradient_at, done, record, report)


def climb(
    genome: Genome,
    study: Study,
    tasks: int,
    gradient_at: GradientAt,
    done: Sequence[GradientStep],
    record: Callable[[GradientStep], None],
    report: Callable[[str], None],
) -> WarmStart:
    """`search.warm_start_steps` steps on minibatches of so many tasks; the rest as `warm_start`."""
    count, steps = study.search.warm_start_steps, list(done)
    for number in range(len(steps), count):
        vector = adam_trajectory(genome, [step.gradient for step in steps], count)[-1]
        chosen = minibatch_indices(study.search.seed, number, tasks, BATCH)
        began = time.perf_counter()
        found = gradient_at(vector.tolist(), chosen)
        seconds = round(time.perf_counter() - began, 4)
        down = tuple(-g for g in found.gradient)
        steps.append(
            GradientStep(number, tuple(vector.tolist()), -found.mean, down, len(chosen), seconds)
        )
        record(steps[-1])
        left = (count - len(steps)) * sum(step.seconds for step in steps) / len(steps)
        report(f"{len(steps)}/{count}  loss {-found.mean:.3f} nats a token  ETA {duration(left)}")
    gradients = [step.gradient for step in steps[:count]]
    return WarmStart(
        tuple(average(adam_trajectory(genome, gradients, count)).tolist()),
        tuple(step_scales(gradients).tolist()),
        tuple(steps[:count]),
        round(sum(step.seconds for step in steps[:count]), 4),
    )
