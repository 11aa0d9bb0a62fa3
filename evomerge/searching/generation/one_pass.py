"""A generation whose candidates answer together, in one pass, before their trials begin.

The answers are in the cache, where each candidate finds them in its own turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain

from evomerge.answering.answer_all import watched
from evomerge.answering.cache import ONE_PASS, AnswerCache
from evomerge.answering.engine import Engine, PromptSettings
from evomerge.answering.pace import Pace
from evomerge.errors import StudyFileError
from evomerge.recipe import Recipe
from evomerge.searching.ledger import Ledger
from evomerge.searching.prepare import Problem

REMEDY = "It is for plain task_arithmetic with the models on one device, not in 4 bits; remove it."


@dataclass
class OnePass:
    """Which candidates share a pass is a function of the study alone."""

    problem: Problem
    engine: Engine
    cache: AnswerCache
    ledger: Ledger
    # recipe digest -> its share of a pass, until it is fetched
    seconds: dict[str, float] = field(default_factory=dict)

    def wanted(self, prompts: int) -> bool:
        """Whether generations answer in one pass. Raises StudyFileError where they cannot.

        As `engine.population` says. By default they do in fp32, where the tokens are the merged
        model's, and only where one pass is certain to be faster.
        """
        study, population = self.problem.study, self.engine.batched_candidates
        asked_for = study.engine.population
        if population is None or asked_for is False:
            return False
        exact = study.search.dtype == "float32"
        sure = exact and population.is_faster(self.problem.sampler.population, prompts)
        if not asked_for and not sure:
            return False
        genome = self.problem.genome
        suits = population.suits([genome.decode(genome.parent(0))])
        if asked_for and not suits:
            raise StudyFileError(
                "these candidates cannot share a pass",
                where="engine.population",
                found=True,
                remedy=REMEDY,
            )
        return suits

    def ahead(
        self,
        generation: int,
        prompts: Sequence[str],
        report: Callable[[str], None],
        settings: PromptSettings = None,
    ) -> None:
        """Compute the answers of every candidate of the generation that are not in the cache yet.

        Batches of prompts follow one another. Raises EngineError.
        """
        engine, population = self.engine, self.engine.batched_candidates
        assert population is not None
        history, trials = self.ledger.history(), self.problem.study.search.trials
        vectors = self.problem.sampler.vectors(history, generation, trials)
        recipes = [self.problem.genome.decode(vector) for vector in vectors]
        pace = Pace(len(recipes) * len(prompts), report)
        for batch in engine.batches(prompts, settings):
            texts = [prompts[i] for i in batch]
            own = None
            if settings is not None:
                own = [settings[i] for i in batch]
            keys = []
            for recipe in recipes:
                keys.append(self.cache.key(self.cache.digest(recipe), texts, ONE_PASS, own))
            if None not in [self.cache.get(key, len(batch)) for key in keys]:
                pace.found(len(recipes) * len(batch))
                continue
            began = time.perf_counter()
            with watched(engine, pace, lambda limits: self.ledger.remember("limits", dict(limits))):
                answers = population(recipes, texts, own)
            share = (time.perf_counter() - began) / len(recipes)
            tokens = sum(answer.tokens for answer in chain(*answers))
            pace.end(len(recipes) * len(batch), tokens)
            for recipe, key, found in zip(recipes, keys, answers, strict=True):
                self.seconds[recipe.digest()] = self.seconds.get(recipe.digest(), 0.0) + share
                self.cache.put(key, found)

    def take_seconds(self, recipe: Recipe) -> float:
        """The candidate's share of a pass in seconds; it is given out once."""
        return self.seconds.pop(recipe.digest(), 0.0)
