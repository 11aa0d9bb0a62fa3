"""What one recipe does on some tasks: merge, answer, judge. Answers and grades come from their
caches where they are paid for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from evomerge.answering.cache import MERGED, AnswerCache, answer_all
from evomerge.answering.engine import Answer, Engine
from evomerge.answering.lm_eval.documents import LmEvalTasks
from evomerge.answering.pace import Pace
from evomerge.answering.prompts import Prompter
from evomerge.console import Console
from evomerge.judging.grade import Grade, Judge
from evomerge.recipe import Recipe
from evomerge.searching.ahead import Ahead, Begun, Item
from evomerge.searching.likelihood_part import LikelihoodPart
from evomerge.tasks import Task


@dataclass(frozen=True)
class Examined:
    """Answers and grades, in the tasks' order; `likelihoods` of the references where they are a
    part of the objective.
    """

    tasks: tuple[Task, ...]
    answers: list[Answer]
    grades: list[Grade]
    seconds: dict[str, float]
    tokens_per_second: float | None = None  # None: every answer was paid for before
    # what a grade's value is called: a judge's grade, or a document's part of lm-eval's score
    figure: str = "grade"
    # nats per token; None for a task without a reference
    likelihoods: list[float | None] | None = None


class Examiner:
    """Examines one recipe at a time. While a judge is waited for, what comes next is merged and
    answers.
    """

    def __init__(
        self,
        engine: Engine,
        prompter: Prompter,
        judge: Judge,
        cache: AnswerCache,
        console: Console,
        remember: Callable[[Mapping[str, int]], None],
        shared: Callable[[Recipe], float],
        lm_eval: LmEvalTasks | None = None,
        likelihood: LikelihoodPart | None = None,
    ) -> None:
        """`remember` is told when memory forces smaller batches; `shared` gives a recipe's seconds
        of a pass shared with others.

        With `lm_eval`, prompter and judge have nothing to do.
        """
        self.engine, self.prompter, self.judge = engine, prompter, judge
        self.cache, self.console, self.remember, self.shared = cache, console, remember, shared
        self.lm_eval, self.likelihood = lm_eval, likelihood
        self.ahead = Ahead()

    def examine(
        self,
        recipe: Recipe,
        blocks: Sequence[Sequence[Task]],
        label: str = "",
        mode: str = MERGED,
        upcoming: Iterable[Item] = (),
        grades: Mapping[str, Grade] | None = None,
    ) -> Examined:
        """Blocks of tasks, each answered in batches of its own. `grades` by task_id, where they are
        known, are not asked for.
        """
        if self.lm_eval is not None:
            return self._examine_lm_eval(
                self.lm_eval, recipe, [task for block in blocks for task in block], label
            )
        begun = [
            self.begun((recipe, block, mode), label, graded=grades is None) for block in blocks
        ]
        self.ahead.while_waiting(
            begun, iter(upcoming), lambda item: self.begin(item, f"{label}, ahead")
        )
        tasks = tuple(task for block in blocks for task in block)
        given = (
            [grade for b in begun for grade in b.wait()]
            if grades is None
            else [grades[str(task.task_id)] for task in tasks]
        )
        seconds = {
            phase: round(sum(b.seconds[phase] for b in begun), 4) for phase in begun[0].seconds
        }
        answers = [answer for b in begun for answer in b.answers]
        known = None if self.likelihood is None else self.likelihood.of(recipe, tasks)
        rates = [b.tokens_per_second for b in begun if b.tokens_per_second is not None]
        return Examined(
            tasks,
            answers,
            given,
            seconds,
            sum(rates) / len(rates) if rates else None,
            likelihoods=known,
        )

    def begun(self, item: Item, label: str, graded: bool = True) -> Begun:
        """What was begun before, or is begun now, and will be found by `examine`."""
        return self.ahead.take(item, lambda item: self.begin(item, label, graded))

    def begin(self, item: Item, label: str, graded: bool = True) -> Begun:
        """Merge and answer; each batch of answers goes to the judge when it is there. Raises
        EngineError.
        """
        recipe, tasks, mode = item
        begun = Begun(self.judge if graded else None, tasks)

        def apply() -> None:
            began = time.perf_counter()
            self.engine.apply(recipe)
            begun.seconds["merge"] = time.perf_counter() - began

        began = time.perf_counter()
        prompts = self.prompter.prepare([task.input for task in tasks])
        pace = Pace(len(tasks), lambda line: self.console.status(f"{label}  {line}", detail=True))
        texts, own = [prompt.text for prompt in prompts], self.prompter.settings(prompts)
        begun.answers = answer_all(
            self.engine,
            self.cache,
            recipe.digest(),
            texts,
            apply,
            pace,
            self.remember,
            mode,
            begun.got,
            own,
        )
        spent = time.perf_counter() - began - begun.seconds["merge"] - begun.seconds["judge"]
        shared = self.shared(recipe)
        begun.seconds["answer"] = spent + shared
        begun.tokens_per_second = (
            pace.rate if not shared else sum(answer.tokens for answer in begun.answers) / shared
        )
        return begun

    def _examine_lm_eval(
        self, lm_eval: LmEvalTasks, recipe: Recipe, tasks: Sequence[Task], label: str
    ) -> Examined:
        """Merge and let lm-eval ask and score."""
        merging = 0.0

        def apply() -> None:
            nonlocal merging
            began = time.perf_counter()
            self.engine.apply(recipe)
            merging = round(time.perf_counter() - began, 4)

        def progress(n: int) -> None:
            self.console.status(f"{label}  answered {n}/{len(tasks)}", detail=True)

        began = time.perf_counter()
        outcomes = lm_eval.examine(recipe.digest(), tasks, self.cache, apply, progress)
        seconds = {
            "merge": merging,
            "answer": round(time.perf_counter() - began - merging, 4),
            "judge": 0.0,
        }
        parts = [
            Grade(score, None, str(o.values))
            for score, o in zip(lm_eval.scores(tasks, outcomes), outcomes, strict=True)
        ]
        return Examined(tuple(tasks), [o.answer for o in outcomes], parts, seconds, figure="score")
