"""The likelihood warm start: gradient steps give CMA-ES its first mean and scales.

The steps are taken in the genome's numbers. What is climbed is the mean log-likelihood of the
references, on search tasks only: each reference's mean per token, and the mean of that over tasks.
AdaMerging (Yang et al. 2024, arXiv 2310.02575) climbs the entropy of unlabelled answers in the same
way; here there are references.

Nothing is kept between steps except what is stored: a step is a function of the study's seed, its
number, and the gradients before it. A run that was killed therefore resumes as if it had not been.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.answering.engine import Engine
from evomerge.answering.hf.gradient import check_gradient
from evomerge.answering.prompts import Prompter
from evomerge.console import Console, duration
from evomerge.errors import EngineError, StudyFileError
from evomerge.genome.weights import Genome
from evomerge.searching.generation.stopping import StudyClock
from evomerge.searching.ledger import Ledger
from evomerge.searching.prepare import Problem
from evomerge.searching.records.study_facts import GradientStep, Start
from evomerge.searching.samplers.cmaes_adapter import Distribution
from evomerge.searching.starting.source_study import as_start
from evomerge.study import Study
from evomerge.tasks import Task

BATCH = 16  # tasks of a step
GRADIENT = 3  # a task's gradient in answers: a forward pass, and a backward one at twice its cost
MOSTLY = 0.5  # share of the search tasks that must have references for `auto`
# a number's first step, in units of the weight: 16 steps can cross the whole range
RATE = 0.25
BETAS = (0.9, 0.98)  # memory of Adam's two moments (Kingma & Ba 2015, arXiv 1412.6980, algorithm 1)
# share of the steps, the last ones, whose vectors are averaged (Polyak & Juditsky 1992)
AVERAGED = 0.25
WIDEST = 3.0  # a scale lies in 1 / WIDEST to WIDEST of their geometric mean
# that mean: at a good place the steps of a search from nowhere only lead away (docs/SEARCH.md)
NARROWED = 1 / 3


@dataclass(frozen=True)
class WarmStart:
    """Where CMA-ES begins: a mean (d,) within bounds, and factors (d,) of the first step size."""

    mean: tuple[float, ...]
    scales: tuple[float, ...]  # geometric mean NARROWED
    steps: tuple[GradientStep, ...]
    seconds: float  # of all steps, those of earlier runs included


@dataclass(frozen=True)
class LikelihoodStart:
    """The warm start of one study."""

    problem: Problem
    engine: Engine
    prompter: Prompter

    def run(self, ledger: Ledger, console: Console, clock: StudyClock) -> None:
        """Climb, each step recorded, and remember where the first generation is drawn; once.

        Raises as `warm_start`.
        """
        if ledger.facts.start is not None:
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

        found = warm_start(
            self.engine,
            self.problem.genome,
            self.problem.split.search,
            self.prompter,
            self.problem.study,
            facts.warm_start,
            record,
            report,
        )
        # the scales' size is that of the first steps, and the rest is their form
        size = float(np.exp(np.log(found.scales).mean()))
        default = self.problem.sampler.default
        cov = default.cov * np.outer(found.scales, found.scales) / size**2
        start = Distribution(np.array(found.mean), default.sigma * size, cov)
        console.say(
            f"{len(found.steps)} gradient steps on the references' likelihood, "
            f"{duration(found.seconds)}: the first generation is drawn around their end"
        )
        return as_start(start, mean_is_first=True)


def find_warm_start(problem: Problem, engine: Engine, prompter: Prompter) -> LikelihoodStart | None:
    """The study's warm start; None where it has none, or `auto` finds that it cannot have one."""
    study, split = problem.study, problem.split
    if study.search.warm_start is None:
        return None
    obstacle = warm_start_obstacle(study, problem.genome, split.search, engine)
    if study.search.warm_start == "auto" and obstacle is not None:
        return None
    return LikelihoodStart(problem, engine, prompter)


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
    with_reference = [task for task in tasks if task.output]
    if len(with_reference) < MOSTLY * len(tasks):
        return f"only {len(with_reference)} of {len(tasks)} search tasks have a reference"
    try:
        check_warm_start(genome, with_reference, engine)
    except StudyFileError as error:
        return error.what
    return None


def check_warm_start(genome: Genome, tasks: Sequence[Task], engine: Engine | None = None) -> None:
    """Raise StudyFileError where there can be no warm start.

    This is the case with another method or engine, or without references.
    """
    check_gradient(genome)
    if not any(task.output for task in tasks):
        raise StudyFileError(
            "no search task has a reference",
            where="search.warm_start",
            remedy="Leave it out, or add `output` to tasks.",
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
    assert engine.gradient is not None
    pairs = [(prompter.render(task.input), task.output) for task in tasks if task.output]
    count, steps = study.search.warm_start_steps, list(done)
    for number in range(len(steps), count):
        vector = adam_trajectory(genome, [step.gradient for step in steps], count)[-1]
        chosen = minibatch_indices(study.search.seed, number, len(pairs), BATCH)
        began = time.perf_counter()
        found = engine.gradient(genome, vector.tolist(), [pairs[i] for i in chosen])
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


def adam_trajectory(
    genome: Genome, gradients: Sequence[Sequence[float]], count: int
) -> list[np.ndarray]:
    """Every vector (d,) of a walk of `count` Adam steps: the start, and one for each gradient.

    The rate falls along a line to 0 after the last step. Numbers stay within their bounds.
    """
    low = np.array([gene.low for gene in genome.genes])
    high = np.array([gene.high for gene in genome.genes])
    x = np.clip(np.array([gene.start for gene in genome.genes], dtype=float), low, high)
    first, second = np.zeros_like(x), np.zeros_like(x)
    vectors = [x]
    for t, gradient in enumerate(np.array(gradients, dtype=float).reshape(-1, len(x)), start=1):
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
        step = first / (1 - BETAS[0] ** t) / (np.sqrt(second / (1 - BETAS[1] ** t)) + 1e-12)
        x = np.clip(x - RATE * (1 - (t - 1) / count) * step, low, high)
        vectors.append(x)
    return vectors


def average(vectors: Sequence[np.ndarray]) -> np.ndarray:
    """The mean of a walk's last vectors, (d,)."""
    late = max(1, round(AVERAGED * (len(vectors) - 1)))
    mean: np.ndarray = np.mean(vectors[-late:], axis=0)
    return mean


def step_scales(gradients: Sequence[Sequence[float]]) -> np.ndarray:
    """(d,) factors of the first step size, large where the likelihood is flat.

    Their geometric mean is NARROWED. A log-likelihood's curvature is the mean square of its
    gradient (Fisher's information), and the width of a bowl is the root of its inverse.
    """
    # the first steps say little about where the walk ends
    late = np.array(gradients, dtype=float)[len(gradients) // 2 :]
    square = np.mean(np.square(late), axis=0)
    width = -0.5 * np.log(np.maximum(square, max(square.max(), 1e-300) * 1e-12))
    for _ in range(20):  # cutting off values moves the mean of the rest
        width = np.clip(width - width.mean(), -np.log(WIDEST), np.log(WIDEST))
    factors: np.ndarray = np.exp(width - width.mean()) * NARROWED
    return factors


def minibatch_indices(seed: int, step: int, count: int, size: int) -> list[int]:
    """Which of `count` tasks a step sees.

    It is a part of an endless row of shuffled decks, so that all come equally often.
    """
    size = min(size, count)
    positions = range(step * size, (step + 1) * size)
    decks: dict[int, list[int]] = {}
    for deck in {position // count for position in positions}:
        decks[deck] = random.Random(f"warm start/{seed}/{deck}").sample(range(count), count)
    return [decks[position // count][position % count] for position in positions]
