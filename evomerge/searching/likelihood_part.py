"""The references' likelihood as a part of the objective; kept in the answer cache, task by task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evomerge.answering.cache import AnswerCache
from evomerge.answering.engine import Answer
from evomerge.answering.hf.engine import TransformersEngine
from evomerge.answering.hf.likelihood import loglikelihood, spoken
from evomerge.answering.prompts import Prompter
from evomerge.recipe import Recipe
from evomerge.tasks import Task

MODE = "likelihood"  # of the cache's keys


@dataclass(frozen=True)
class LikelihoodPart:
    """log P(reference | prompt) in nats per token; None for a task without a reference."""

    engine: TransformersEngine
    prompter: Prompter
    cache: AnswerCache

    def of(self, recipe: Recipe, tasks: Sequence[Task]) -> list[float | None]:
        """One number a task. Merges the recipe when one of them is not in the cache. Raises
        EngineError.
        """
        pairs = [(self.prompter.render(task.input), task.output) for task in tasks]
        keys = [self.cache.key(recipe.digest(), pair, MODE) for pair in pairs]
        kept = [self.cache.get(key, 1) for key in keys]
        missing = [i for i, found in enumerate(kept) if found is None]
        values = [0.0 if found is None else float(found[0].text) for found in kept]
        if missing:
            self.engine.apply(recipe)
            asked = [pairs[i] for i in missing]
            model, tokenizer = self.engine.model, self.engine.tokenizer
            sums, lengths = (
                loglikelihood(model, tokenizer, asked),
                [len(said) for _, said in spoken(tokenizer, asked)],
            )
            for i, total, length in zip(missing, sums, lengths, strict=True):
                values[i] = total / max(1, length)
                self.cache.put(keys[i], [Answer(repr(values[i]), False, 0)])
        return [value if task.output else None for task, value in zip(tasks, values, strict=True)]


def make_likelihood_part(engine: Any, prompter: Prompter, cache: AnswerCache) -> LikelihoodPart:
    """For an engine whose kind the study file's check has allowed."""
    assert isinstance(engine, TransformersEngine)
    return LikelihoodPart(engine, prompter, cache)
