"""CMA-ES as an Optuna sampler whose state is replayed from the study's finished trials.

Nothing is pickled and nothing is kept between calls: resuming is the same as going on. Every draw is seeded from
(study seed, generation, index, attempt), so that an interrupted candidate is drawn again as it was.
The algorithm is cmaes.CMA (Hansen 2016, arXiv 1604.00772), the library that Optuna itself uses.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from cmaes import CMA
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study as OptunaStudy
from optuna.trial import FrozenTrial, TrialState

INTERRUPTED = "interrupted"  # the reason of a trial whose process ended under way


@dataclass(frozen=True)
class Slot:
    """A place in a generation, and how often a candidate failed there before."""

    generation: int
    index: int
    attempt: int = 0


class ReplayedCmaEs(BaseSampler):
    """Ask for candidates one at a time; `names[i]` is the parameter of dimension i."""

    def __init__(
        self,
        names: Sequence[str],
        bounds: Sequence[tuple[float, float]],
        declared: Sequence[tuple[float, float]],
        starts: Sequence[float],
        sigma: float,
        population: int | None,
        seed: int,
        scales: Sequence[float] | None = None,
    ) -> None:
        """One of each per dimension. `bounds` hold the candidates; `declared`, at least as wide, also parents and uniform weights.

        The first step size of dimension i is sigma * scales[i]; scales are 1 by default.
        """
        self.names, self.sigma, self.seed = tuple(names), sigma, seed
        self.bounds, self.starts = np.array(bounds, dtype=float), np.array(starts, dtype=float)
        self.scales = np.ones(len(names)) if scales is None else np.array(scales, dtype=float)
        self.population = population or 4 + math.floor(3 * math.log(len(names)))  # Hansen 2016, table 1
        self.space: dict[str, BaseDistribution] = {name: FloatDistribution(*d) for name, d in zip(names, declared, strict=True)}

    def next_slot(self, trials: Sequence[FrozenTrial]) -> Slot:
        """The first place, in order, that has no finished candidate."""
        done = _finished(trials)
        number = next(n for n in range(len(done) + 1) if divmod(n, self.population) not in done)
        return self.slot(trials, *divmod(number, self.population))

    def slot(self, trials: Sequence[FrozenTrial], generation: int, index: int) -> Slot:
        """A place, and how often a candidate failed there."""
        failures = sum(
            t.state == TrialState.FAIL
            and (t.user_attrs.get("generation"), t.user_attrs.get("index")) == (generation, index)
            and t.user_attrs.get("reason") != INTERRUPTED
            for t in trials
            if t.user_attrs.get("role") == "candidate"
        )
        return Slot(generation, index, failures)

    def draw(self, trials: Sequence[FrozenTrial], slot: Slot) -> np.ndarray:
        """(d,) numbers for a slot: a function of the seed, the slot and the generations before it."""
        optimizer = self.replay(trials, slot.generation)
        optimizer.reseed_rng(_seed(self.seed, slot))
        return optimizer.ask()

    def mean(self, trials: Sequence[FrozenTrial]) -> tuple[int, np.ndarray]:
        """How many generations are complete, and the distribution's mean after them, (d,), within the bounds."""
        complete = self.complete_generations(trials)
        return complete, np.clip(self.replay(trials, complete).mean, *self.bounds.T)

    def complete_generations(self, trials: Sequence[FrozenTrial]) -> int:
        """How many generations have all their candidates finished."""
        done, generation = _finished(trials), 0
        while all((generation, index) in done for index in range(self.population)):
            generation += 1
        return generation

    def replay(self, trials: Sequence[FrozenTrial], generations: int) -> CMA:
        """The optimizer after being told the first `generations`; CMA minimises, scores are maximised."""
        optimizer = CMA(
            mean=self.starts,
            sigma=self.sigma,
            bounds=self.bounds,
            population_size=self.population,
            seed=_seed(self.seed, Slot(0, 0)),
            cov=np.diag(self.scales**2),  # CMA-ES is the same in other units when it begins with their covariance
        )
        done = _finished(trials)
        for generation in range(generations):
            told = [done[generation, index] for index in range(self.population)]
            optimizer.tell([(np.array([t.params[n] for n in self.names]), -float(t.values[0])) for t in told])
        return optimizer

    def infer_relative_search_space(self, study: OptunaStudy, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.space

    def sample_relative(self, study: OptunaStudy, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        trials = study.get_trials(deepcopy=False)
        x = self.draw(trials, self.next_slot(trials))
        return {name: float(value) for name, value in zip(self.names, x, strict=True)}

    def sample_independent(self, study: OptunaStudy, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        raise AssertionError(f"{param_name} is not one of the genome's numbers")


def _finished(trials: Sequence[FrozenTrial]) -> dict[tuple[int, int], FrozenTrial]:
    """Complete candidates by (generation, index)."""
    return {
        (t.user_attrs["generation"], t.user_attrs["index"]): t
        for t in trials
        if t.state == TrialState.COMPLETE and t.user_attrs.get("role") == "candidate"
    }


def _seed(study_seed: int, slot: Slot) -> int:
    text = f"{study_seed}/{slot.generation}/{slot.index}/{slot.attempt}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
