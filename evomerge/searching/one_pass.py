"""A generation whose candidates answer together, in one pass: their answers are in the cache before
the trials begin.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from evomerge.answering.cache import AnswerCache, watched
from evomerge.answering.engine import Engine, Settings
from evomerge.answering.pace import Pace
from evomerge.errors import StudyFileError
from evomerge.genome.weights import Genome
from evomerge.recipe import Recipe
from evomerge.searching.ledger import Ledger
from evomerge.searching.sampler import ReplayedCmaEs
from evomerge.study import Study

WHEN = "It is for plain task_arithmetic with the models on one device, not in 4 bits; remove it."
MODE = "population"  # of the cache's keys: a weight that is not merged is not rounded


@dataclass
class OnePass:
    """`ahead` answers for a whole generation. Which candidates share a pass is a function of the
    study alone.
    """

    study: Study
    genome: Genome
    engine: Engine
    cache: AnswerCache
    ledger: Ledger
    sampler: ReplayedCmaEs
    # recipe digest -> its share of a pass, until it is fetched
    seconds: dict[str, float] = field(default_factory=dict)

    def wanted(self, prompts: int) -> bool:
        """As `engine.population` says; unsaid, in fp32, where the tokens are the merged model's,
        and where it surely pays.
        """
        population = self.engine.population
        if population is None or self.study.engine.population is False:
            return False
        sure = self.study.search.dtype == "float32" and population.pays(
            self.sampler.population, prompts
        )
        suits = (self.study.engine.population or sure) and population.suits(
            [self.genome.decode(self.genome.parent(0))]
        )
        if self.study.engine.population and not suits:
            raise StudyFileError(
                "these candidates cannot share a pass",
                where="engine.population",
                found=True,
                remedy=WHEN,
            )
        return suits

    def ahead(
        self,
        generation: int,
        prompts: Sequence[str],
        report: Callable[[str], None],
        settings: Settings = None,
    ) -> None:
        """Answer for every candidate of the generation, batch of prompts by batch, what is not kept
        yet. Raises EngineError.
        """
        population = self.engine.population
        assert population is not None
        recipes = [self.genome.decode(vector) for vector in self.vectors(generation)]
        pace = Pace(len(recipes) * len(prompts), report)
        for batch in self.engine.batches(prompts, settings):
            texts = [prompts[i] for i in batch]
            own = None if settings is None else [settings[i] for i in batch]
            keys = [self.cache.key(recipe.digest(), texts, MODE, own) for recipe in recipes]
            if all(self.cache.get(key, len(batch)) is not None for key in keys):
                pace.found(len(recipes) * len(batch))
                continue
            began = time.perf_counter()
            with watched(
                self.engine, pace, lambda limits: self.ledger.remember("limits", dict(limits))
            ):
                answers = population(recipes, texts, own)
            share = (time.perf_counter() - began) / len(recipes)
            pace.end(
                len(recipes) * len(batch),
                sum(answer.tokens for found in answers for answer in found),
            )
            for recipe, key, found in zip(recipes, keys, answers, strict=True):
                self.seconds[recipe.digest()] = self.seconds.get(recipe.digest(), 0.0) + share
                self.cache.put(key, found)

    def spent(self, recipe: Recipe) -> float:
        """Seconds of a pass that were this candidate's; once."""
        return self.seconds.pop(recipe.digest(), 0.0)

    def vectors(self, generation: int) -> list[tuple[float, ...]]:
        """The generation's candidates: those that are finished, and those that will be drawn, up to
        the last trial.
        """
        trials = self.ledger.trials()
        finished = {
            (r.generation, r.index): r.weights
            for r in self.ledger.records()
            if r.role == "candidate" and r.state == "complete"
        }
        places = [
            i
            for i in range(self.sampler.population)
            if generation * self.sampler.population + i < self.study.search.trials
        ]
        drawn = {
            i: self.sampler.draw(trials, self.sampler.slot(trials, generation, i))
            for i in places
            if (generation, i) not in finished
        }
        return [finished.get((generation, i)) or tuple(float(x) for x in drawn[i]) for i in places]
