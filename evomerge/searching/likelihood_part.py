"""The references' likelihood as a part of the objective; kept in the answer cache, task by task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evomerge.answering.cache import AnswerCache
from evomerge.answering.engine import Answer, Engine, LikelihoodCapability
from evomerge.answering.prompts import Prompter
from evomerge.recipe import Recipe
from evomerge.tasks import Task

MODE = "likelihood"  # of the cache's keys


@dataclass(frozen=True)
class LikelihoodPart:
    """log P(reference | prompt) in nats per token; None for a task without a reference."""

    engine: Engine
    likelihood: LikelihoodCapability
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
            sums, lengths = self.likelihood(asked), self.likelihood.count_tokens(asked)
            for i, total, length in zip(missing, sums, lengths, strict=True):
                values[i] = total / max(1, length)
                self.cache.put(keys[i], [Answer(repr(values[i]), False, 0)])
        return [value if task.output else None for task, value in zip(tasks, values, strict=True)]


def make_likelihood_part(engine: Engine, prompter: Prompter, cache: AnswerCache) -> LikelihoodPart:
    """For an engine whose kind the study file's check has allowed."""
    assert engine.likelihood is not None
    return LikelihoodPart(engine, engine.likelihood, prompter, cache)
