"""One recipe on some tasks: merge, answer, judge.

Answers and grades come from their caches where they exist. There are two evaluators:
one for tasks with a judge, one for the tasks of lm-eval, which bring metrics of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Protocol, TypeAlias

from evomerge.answering.answer_all import answer_all
from evomerge.answering.cache import LIKELIHOOD, MERGED, AnswerCache
from evomerge.answering.engine import Answer, Engine, LikelihoodCapability, without_thoughts
from evomerge.answering.lm_eval.harness import LmEvalRunner
from evomerge.answering.pace import Pace
from evomerge.answering.prompts import Prompter
from evomerge.console import Console
from evomerge.judging.grade import Grade, Judge
from evomerge.recipe import Recipe
from evomerge.searching.judge_answers import PendingEvaluation
from evomerge.searching.prefetch import Item, Prefetcher
from evomerge.tasks import Task

Blocks: TypeAlias = Sequence[Sequence[Task]]  # each is answered in batches of its own


@dataclass(frozen=True)
class Evaluation:
    """Answers and grades, in the tasks' order."""

    tasks: tuple[Task, ...]
    answers: list[Answer]
    grades: list[Grade]
    seconds: dict[str, float]
    tokens_per_second: float | None = None  # None: every answer came from the cache
    # the name of a grade's value: a judge's grade, or a document's share of lm-eval's score
    figure: str = "grade"
    # if the objective needs them: nats per token, None for a task without a reference
    likelihoods: list[float | None] | None = None
    # of the tasks to be drawn, by key; None: they were all as likely as each other
    chances: Mapping[str, float] | None = None


class Evaluator(Protocol):
    """Answers and grades."""

    @property
    def judge(self) -> Judge | None:
        """The judge; None where the tasks bring metrics of their own."""

    def evaluate(
        self,
        recipe: Recipe,
        blocks: Blocks,
        label: str = "",
        mode: str = MERGED,
        upcoming: Iterable[Item] = (),
    ) -> Evaluation:
        """Blocks of tasks, each answered in batches of its own. Raises EngineError, JudgeError.

        While the judge works, the `upcoming` items are started.
        """


@dataclass
class TimedMerge:
    """Merges a recipe into the live model if `run` is called, and keeps the seconds."""

    engine: Engine
    recipe: Recipe
    seconds: float = 0.0

    def run(self) -> None:
        """Have the engine apply the recipe. Raises EngineError."""
        began = time.perf_counter()
        self.engine.apply(self.recipe)
        self.seconds = time.perf_counter() - began


@dataclass
class JudgedEvaluator:
    """The evaluator of tasks that a judge grades."""

    engine: Engine
    prompter: Prompter
    judge: Judge
    cache: AnswerCache
    console: Console
    # is told the engine's limits when memory forces smaller batches
    remember_limits: Callable[[Mapping[str, int]], None]
    # a recipe's seconds of a pass that it shared with others
    shared_seconds: Callable[[Recipe], float] = lambda recipe: 0.0
    likelihood: LikelihoodPart | None = None
    prefetcher: Prefetcher = field(default_factory=Prefetcher)

    def evaluate(
        self,
        recipe: Recipe,
        blocks: Blocks,
        label: str = "",
        mode: str = MERGED,
        upcoming: Iterable[Item] = (),
    ) -> Evaluation:
        """See `Evaluator.evaluate`."""
        begun = [self.take_or_begin((recipe, block, mode), label) for block in blocks]
        self.prefetcher.while_waiting(begun, upcoming, lambda i: self.begin(i, f"{label}, ahead"))
        grades = list(chain.from_iterable(pending.wait() for pending in begun))
        return self._evaluation(recipe, begun, grades)

    def evaluate_with_grades(
        self, recipe: Recipe, blocks: Blocks, grades: Mapping[str, Grade], label: str, mode: str
    ) -> Evaluation:
        """As `evaluate`, but with grades that are known, by task key. Raises EngineError."""
        begun = [self.take_or_begin((recipe, block, mode), label, False) for block in blocks]
        return self._evaluation(recipe, begun, [grades[task.key] for task in chain(*blocks)])

    def _evaluation(
        self, recipe: Recipe, begun: Sequence[PendingEvaluation], grades: list[Grade]
    ) -> Evaluation:
        """The blocks put together."""
        tasks = tuple(chain.from_iterable(pending.tasks for pending in begun))
        answers: list[Answer] = []
        seconds = dict.fromkeys(("merge", "answer", "judge"), 0.0)
        rates = []
        for pending in begun:
            answers += pending.answers
            if pending.tokens_per_second is not None:
                rates.append(pending.tokens_per_second)
            for phase, spent in pending.seconds.items():
                seconds[phase] += spent
        return Evaluation(
            tasks=tasks,
            answers=answers,
            grades=grades,
            seconds={phase: round(spent, 4) for phase, spent in seconds.items()},
            tokens_per_second=sum(rates) / len(rates) if rates else None,
            likelihoods=self.likelihoods(recipe, tasks),
        )

    def likelihoods(self, recipe: Recipe, tasks: Sequence[Task]) -> list[float | None] | None:
        """The references' likelihoods where the objective needs them. Raises EngineError."""
        if self.likelihood is None:
            return None
        return self.likelihood.of(recipe, tasks)

    def answers(self, recipe: Recipe, tasks: Sequence[Task]) -> list[Answer]:
        """The answers alone, from the cache where these tasks were answered. Raises EngineError."""
        return self.begin((recipe, tasks, MERGED), "answers", graded=False).answers

    def take_or_begin(self, item: Item, label: str, graded: bool = True) -> PendingEvaluation:
        """The evaluation that was started ahead, or starts now. Raises EngineError."""
        return self.prefetcher.take(item) or self.begin(item, label, graded)

    def begin(self, item: Item, label: str, graded: bool = True) -> PendingEvaluation:
        """Merge and answer; each batch goes to the judge as soon as it is answered.

        Raises EngineError.
        """
        recipe, tasks, mode = item
        pending = PendingEvaluation(self.judge if graded else None, tasks)
        merge = TimedMerge(self.engine, recipe)
        began = time.perf_counter()
        prompts = self.prompter.prepare([task.input for task in tasks])
        pace = Pace(len(tasks), lambda line: self.console.status(f"{label}  {line}", detail=True))
        pending.answers = answer_all(
            self.engine,
            self.cache,
            recipe=self.cache.digest(recipe),
            prompts=[prompt.text for prompt in prompts],
            settings=self.prompter.settings(prompts),
            mode=mode,
            apply=merge.run,
            pace=pace,
            remember=self.remember_limits,
            on_batch=pending.batch_answered,
        )
        elsewhere = merge.seconds + pending.seconds["judge"]
        shared = self.shared_seconds(recipe)
        pending.seconds["merge"] = merge.seconds
        pending.seconds["answer"] = time.perf_counter() - began - elsewhere + shared
        pending.tokens_per_second = pace.rate
        if shared:
            tokens = sum(answer.tokens for answer in pending.answers)
            pending.tokens_per_second = tokens / shared
        return pending


@dataclass
class LmEvalEvaluator:
    """The evaluator of lm-eval's tasks: lm-eval builds the prompts and computes the metrics."""

    engine: Engine
    runner: LmEvalRunner
    cache: AnswerCache
    console: Console
    judge: Judge | None = None

    def evaluate(
        self,
        recipe: Recipe,
        blocks: Blocks,
        label: str = "",
        mode: str = MERGED,
        upcoming: Iterable[Item] = (),
    ) -> Evaluation:
        """See `Evaluator.evaluate`; nothing is done ahead."""
        tasks = tuple(chain(*blocks))
        merge = TimedMerge(self.engine, recipe)

        def progress(n: int) -> None:
            self.console.status(f"{label}  answered {n}/{len(tasks)}", detail=True)

        began = time.perf_counter()
        outcomes = self.runner.evaluate(
            self.cache.digest(recipe), tasks, self.cache, merge.run, progress
        )
        answering = time.perf_counter() - began - merge.seconds
        grades = []
        scores = self.runner.lm_eval.scores(tasks, outcomes)
        for score, outcome in zip(scores, outcomes, strict=True):
            grades.append(Grade(score, None, str(outcome.values)))
        seconds = {"merge": round(merge.seconds, 4), "answer": round(answering, 4), "judge": 0.0}
        answers = [outcome.answer for outcome in outcomes]
        return Evaluation(tasks, answers, grades, seconds, figure="score")


@dataclass(frozen=True)
class LikelihoodPart:
    """log P(reference | prompt) in nats per token, kept in the answer cache task by task."""

    engine: Engine
    likelihood: LikelihoodCapability
    prompter: Prompter
    cache: AnswerCache

    def of(self, recipe: Recipe, tasks: Sequence[Task]) -> list[float | None]:
        """One number a task; None for a task without a reference. Raises EngineError.

        The recipe is merged when one of the numbers is not in the cache.
        """
        values: dict[str, float | None] = {}  # by the cache's key
        missing: dict[str, tuple[str, str]] = {}
        keys = []
        for task in tasks:
            pair = (without_thoughts(self.prompter.render(task.input), self.engine), task.output)
            keys.append(self.cache.key(self.cache.digest(recipe), pair, LIKELIHOOD))
            kept = self.cache.get(keys[-1], 1)
            if kept is None:
                missing[keys[-1]] = pair
            else:
                values[keys[-1]] = float(kept[0].text)
        if missing:
            self.engine.apply(recipe)
            pairs = [*missing.values()]
            sums, counts = self.likelihood(pairs), self.likelihood.count_tokens(pairs)
            for key, total, count in zip(missing, sums, counts, strict=True):
                values[key] = total / max(1, count)
                self.cache.put(key, [Answer(repr(values[key]), False, 0)])
        found = []
        for key, task in zip(keys, tasks, strict=True):
            found.append(values[key] if task.output else None)
        return found
