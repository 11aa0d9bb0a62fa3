"""CMA-ES as an Optuna sampler whose state is replayed from the study's finished trials.

Nothing is pickled and nothing is kept between calls: resuming is the same as going on. Every draw
is seeded from (study seed, generation, index, attempt), so that an interrupted candidate is drawn
again as it was. The algorithm is cmaes.CMA (Hansen 2016, arXiv 1604.00772), the library that Optuna
itself uses.
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


@dataclass(frozen=True)
class Distribution:
    """What a generation is drawn from: mean + sigma * N(0, cov), within bounds. mean (d,), cov (d,
    d).
    """

    mean: np.ndarray
    sigma: float
    cov: np.ndarray


def make_cma(
    start: Distribution, bounds: np.ndarray, population: int, seed: int = 0, lr_adapt: bool = False
) -> CMA:
    """The optimizer as every search here uses it; bounds are (d, 2). CMA minimises, scores are
    maximised.

    lr_adapt: learning rates that follow the signal-to-noise ratio (Nomura, Akimoto and Ono 2023,
    arXiv 2304.03473). With either learning rate the mean is a convex combination of points within
    the bounds, so it stays within them.
    """
    return CMA(
        mean=np.clip(start.mean, *bounds.T),
        sigma=start.sigma,
        bounds=bounds,
        population_size=population,
        seed=seed,
        # CMA-ES is the same in other units when it begins with their covariance
        cov=start.cov.copy(),
        lr_adapt=lr_adapt,
    )


def default_population(dimensions: int) -> int:
    """Hansen 2016, table 1."""
    return 4 + math.floor(3 * math.log(dimensions))


def shortened(x: np.ndarray, start: Distribution, bounds: np.ndarray) -> np.ndarray:
    """A vector from elsewhere as CMA-ES may be told it: at most √d + 2d / (d + 2) standard
    deviations from the mean.

    One far point must not blow up the step size (Hansen 2011, arXiv 1110.4181, equation 4).
    """
    d = len(x)
    step = (np.clip(x, *bounds.T) - start.mean) / start.sigma
    length = math.sqrt(float(step @ np.linalg.solve(start.cov, step)))
    limit = math.sqrt(d) + 2 * d / (d + 2)
    told: np.ndarray = start.mean + start.sigma * step * min(1.0, limit / max(length, 1e-12))
    return told


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
        lr_adapt: bool = False,
        cov: np.ndarray | None = None,
        first: Sequence[Sequence[float]] = (),
    ) -> None:
        """One of each per dimension. `bounds` hold the candidates; `declared`, at least as wide,
        also parents and uniform weights.

        The first step size of dimension i is sigma * scales[i]; scales are 1 by default. `cov` (d,
        d) takes their place, for example another study's (`distribution`). `first` are known
        vectors: the first candidates, in their order.
        """
        self.names, self.first_sigma, self.seed, self.lr_adapt = tuple(names), sigma, seed, lr_adapt
        self.bounds = np.array(bounds, dtype=float)
        units = np.ones(len(names)) if scales is None else np.array(scales, dtype=float)
        mean = np.clip(np.array(starts, dtype=float), *self.bounds.T)
        self.start = Distribution(
            mean, sigma, np.diag(units**2) if cov is None else np.array(cov, dtype=float)
        )
        self.first = [np.array(x, dtype=float) for x in first]
        self.population = population or default_population(len(names))
        self.space: dict[str, BaseDistribution] = {
            name: FloatDistribution(*d) for name, d in zip(names, declared, strict=True)
        }

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
        """(d,) numbers for a slot: a known vector, or a function of the seed, the slot and the
        generations before it.
        """
        place = slot.generation * self.population + slot.index
        if place < len(self.first) and not slot.attempt:
            return self.first[place].copy()
        optimizer = self.replay(trials, slot.generation)
        optimizer.reseed_rng(_seed(self.seed, slot))
        return optimizer.ask()

    def mean(self, trials: Sequence[FrozenTrial]) -> tuple[int, np.ndarray]:
        """How many generations are complete, and the distribution's mean after them, (d,), within
        the bounds.
        """
        complete = self.complete_generations(trials)
        return complete, np.clip(self.replay(trials, complete).mean, *self.bounds.T)

    def sigma(self, trials: Sequence[FrozenTrial], generation: int) -> float:
        """The step size with which a generation is drawn; the generations before it must be
        complete.
        """
        return self.distribution(trials, generation).sigma

    def distribution(
        self, trials: Sequence[FrozenTrial], generation: int | None = None
    ) -> Distribution:
        """What a generation is drawn from, by default the one after all complete ones: a start for
        another study.
        """
        optimizer = self.replay(
            trials, self.complete_generations(trials) if generation is None else generation
        )
        return Distribution(
            np.clip(optimizer.mean, *self.bounds.T), float(optimizer._sigma), np.array(optimizer._C)
        )

    def complete_generations(self, trials: Sequence[FrozenTrial]) -> int:
        """How many generations have all their candidates finished."""
        done, generation = _finished(trials), 0
        while all((generation, index) in done for index in range(self.population)):
            generation += 1
        return generation

    def replay(self, trials: Sequence[FrozenTrial], generations: int) -> CMA:
        """The optimizer after being told the first `generations`."""
        optimizer = make_cma(
            self.start, self.bounds, self.population, _seed(self.seed, Slot(0, 0)), self.lr_adapt
        )
        done = _finished(trials)
        for generation in range(generations):
            places = [(generation, index) for index in range(self.population)]
            optimizer.tell(
                [
                    (self._told(optimizer, place, done[place]), -float(done[place].values[0]))
                    for place in places
                ]
            )
        return optimizer

    def _told(self, optimizer: CMA, place: tuple[int, int], trial: FrozenTrial) -> np.ndarray:
        """A trial's numbers as the optimizer hears them: a known vector, which it did not draw, may
        have to be shortened.
        """
        x = np.array([trial.params[name] for name in self.names])
        number = place[0] * self.population + place[1]
        if number >= len(self.first) or not np.array_equal(x, self.first[number]):
            return x
        return shortened(
            x, Distribution(optimizer.mean, float(optimizer._sigma), optimizer._C), self.bounds
        )

    def infer_relative_search_space(
        self, study: OptunaStudy, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self.space

    def sample_relative(
        self, study: OptunaStudy, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        trials = study.get_trials(deepcopy=False)
        x = self.draw(trials, self.next_slot(trials))
        return {name: float(value) for name, value in zip(self.names, x, strict=True)}

    def sample_independent(
        self,
        study: OptunaStudy,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
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
