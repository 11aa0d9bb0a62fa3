"""CMA-ES as a pure function from a study's history to the next vector.

Nothing is pickled: the optimizer is replayed from the finished trials, so that resuming is the same
as continuing. What was replayed last is kept in memory and goes on where the history begins with
the same trials. Every draw is seeded from (study seed, generation, index, attempt), so that an
interrupted candidate is drawn identically again.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from cmaes import CMA

from evomerge.searching.history import History
from evomerge.searching.records.study_facts import Start
from evomerge.searching.records.trial_record import TrialRecord
from evomerge.searching.samplers.cmaes_adapter import (
    Distribution,
    default_population,
    make_cma,
    state,
    twin,
)


@dataclass(frozen=True)
class Slot:
    """A position in a generation, and how often a candidate has failed there."""

    generation: int
    index: int
    attempt: int = 0


@dataclass(frozen=True)
class Replayed:
    """Optimizers that were told these trials; candidates come from `drawing`, their twins.

    Drawing rounds the covariance anew, so that what goes on being told must not draw.
    """

    start: Start | None
    told: tuple[TrialRecord, ...]
    optimizers: tuple[CMA, ...]
    drawing: tuple[CMA, ...]

    @property
    def optimizer(self) -> CMA:
        """The only one, or the first."""
        return self.optimizers[0]


class CmaSampler:
    """Draws one candidate at a time; `names[i]` is the parameter of dimension i."""

    distributions = 1  # a subclass may have several, which take turns

    def __init__(
        self,
        *,
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
        known_candidates: Sequence[Sequence[float]] = (),
    ) -> None:
        """Sequences have one item per dimension.

        `bounds` hold the candidates; `declared`, at least as wide, also parents and uniform
        weights. The first step size of dimension i is sigma * scales[i]; scales are 1 by default,
        and `cov` (d, d) replaces them. `known_candidates` are the first candidates, in order.
        """
        self.names, self.seed, self.lr_adapt = tuple(names), seed, lr_adapt
        self.bounds = np.array(bounds, dtype=float)
        self.space = dict(zip(self.names, declared, strict=True))
        units = np.ones(len(names))
        if scales is not None:
            units = np.array(scales, dtype=float)
        shape = np.diag(units**2)
        if cov is not None:
            shape = np.array(cov, dtype=float)
        mean = np.clip(np.array(starts, dtype=float), *self.bounds.T)
        self.default = Distribution(mean, sigma, shape)
        self.known_candidates = [np.array(x, dtype=float) for x in known_candidates]
        self.population = population or default_population(len(names))
        self._kept: Replayed | None = None

    def start(self, history: History) -> Distribution:
        """The distribution of the first generation: the default, or the stored one."""
        if history.start is None:
            return self.default
        mean = np.clip(np.array(history.start.mean, dtype=float), *self.bounds.T)
        cov = np.array(history.start.cov, dtype=float)
        return Distribution(mean, float(history.start.sigma), cov)

    def known(self, history: History) -> list[np.ndarray]:
        """The vectors that come before any draw."""
        if history.start is None or not history.start.mean_is_first:
            return self.known_candidates
        return [self.start(history).mean, *self.known_candidates]

    def next_slot(self, history: History) -> Slot:
        """The first slot, in order, that has no finished candidate."""
        return self.slot(history, *history.next_slot(self.population))

    def slot(self, history: History, generation: int, index: int) -> Slot:
        """A slot, and how often a candidate has failed there."""
        return Slot(generation, index, history.failures(generation, index))

    def draw(self, history: History, slot: Slot) -> np.ndarray:
        """(d,) numbers for a slot.

        They are a known vector, or a function of the seed, the slot and the generations before it.
        """
        position = slot.generation * self.population + slot.index
        known = self.known(history)
        if position < len(known) and not slot.attempt:
            return known[position].copy()
        turn = self.turn(slot.generation, slot.index)
        drawing = self._after(history, slot.generation).drawing[turn]
        drawing.reseed_rng(_seed(self.seed, slot))
        asked: np.ndarray = drawing.ask()
        return asked

    def turn(self, generation: int, index: int) -> int:
        """Which distribution a slot is drawn from."""
        return (generation + index) % self.distributions

    def vectors(
        self, history: History, generation: int, trials: int, first: int = 0, finished: bool = True
    ) -> Iterator[tuple[float, ...]]:
        """The generation's candidates from index `first` up to the last of all trials.

        Those that are `finished`, unless they are left out, and those to draw.
        """
        for index in range(first, min(self.population, trials - generation * self.population)):
            trial = history.finished.get((generation, index))
            if trial is None:
                yield tuple(self.draw(history, self.slot(history, generation, index)).tolist())
            elif finished:
                yield trial.vector

    def means(self, history: History) -> tuple[int, list[np.ndarray]]:
        """How many generations are complete, and each mean after them, (d,), within the bounds."""
        complete = history.complete_generations(self.population)
        found = self._after(history, complete).optimizers
        return complete, [np.clip(optimizer.mean, *self.bounds.T) for optimizer in found]

    def sigma(self, history: History, generation: int) -> float:
        """The step size that a generation is drawn with; those before it must be complete.

        Of several distributions, the largest.
        """
        found = self._after(history, generation).optimizers
        return max(state(optimizer).sigma for optimizer in found)

    def distribution(self, history: History) -> Distribution:
        """What the generation after all complete ones is drawn from: a start for another study.

        Of several distributions, the one in the middle.
        """
        complete = history.complete_generations(self.population)
        optimizers = self._after(history, complete).optimizers
        found = state(optimizers[len(optimizers) // 2])
        return Distribution(np.clip(found.mean, *self.bounds.T), found.sigma, found.cov)

    def replay(self, history: History, generations: int) -> CMA:
        """The first optimizer after being told the first `generations`, from the beginning."""
        told = history.index.in_order[: generations * self.population]
        return self._replayed(history, told).optimizer

    def _after(self, history: History, generations: int) -> Replayed:
        """The same optimizer, going on from the one that is kept if it was told the same."""
        told = history.index.in_order[: generations * self.population]
        assert len(told) == generations * self.population
        kept = self._kept
        if kept is None or kept.start != history.start:
            kept = self._replayed(history, ())
        shared = min(len(kept.told), len(told))
        if kept.told[:shared] != told[:shared]:
            kept = self._replayed(history, told)
        elif len(kept.told) < len(told):
            optimizers = tuple(map(twin, kept.optimizers))
            self._tell(optimizers, history, range(shared // self.population, generations))
            kept = Replayed(history.start, told, optimizers, tuple(map(twin, optimizers)))
        self._kept = kept
        if len(kept.told) > len(told):  # an earlier generation does not replace a later one
            return self._replayed(history, told)
        return kept

    def _replayed(self, history: History, told: tuple[TrialRecord, ...]) -> Replayed:
        seed, start, optimizers = _seed(self.seed, Slot(0, 0)), self.start(history), []
        for _ in range(self.distributions):
            made = make_cma(start, self.bounds, self.population, seed, self.lr_adapt)
            optimizers.append(made)
        self._tell(optimizers, history, range(len(told) // self.population))
        return Replayed(history.start, told, tuple(optimizers), tuple(map(twin, optimizers)))

    def _tell(
        self, optimizers: Sequence[CMA], history: History, generations: Iterable[int]
    ) -> None:
        """Tell each optimizer the generations, which are complete."""
        known, optimizer = self.known(history), optimizers[0]
        for generation in generations:
            told = []
            for trial in self.ranked(history, generation):
                assert trial.score is not None
                told.append((self._told(optimizer, known, trial), -trial.score))
            optimizer.tell(told)

    def ranked(self, history: History, generation: int) -> list[TrialRecord]:
        """A complete generation, in the order in which an optimizer ranks equal scores."""
        trials = [history.finished[generation, index] for index in range(self.population)]
        if history.credit_breaks_ties:
            trials.sort(key=lambda trial: -trial.credit)
        return trials

    def _told(self, optimizer: CMA, known: Sequence[np.ndarray], trial: TrialRecord) -> np.ndarray:
        """A trial's numbers as the optimizer is told them.

        A known vector, which the optimizer did not draw, may have to be shortened.
        """
        x = np.array(trial.vector)
        assert trial.generation is not None
        assert trial.index is not None
        position = trial.generation * self.population + trial.index
        if position >= len(known) or not np.array_equal(x, known[position]):
            return x
        return within_reach(x, state(optimizer), self.bounds)


def within_reach(x: np.ndarray, start: Distribution, bounds: np.ndarray) -> np.ndarray:
    """A vector from elsewhere as CMA-ES may be told it: (d,), not too far from the mean.

    It lies at most √d + 2d / (d + 2) standard deviations away, so that one far point does not blow
    up the step size (Hansen 2011, arXiv 1110.4181, equation 4).
    """
    d = len(x)
    step = (np.clip(x, *bounds.T) - start.mean) / start.sigma
    length = math.sqrt(float(step @ np.linalg.solve(start.cov, step)))
    limit = math.sqrt(d) + 2 * d / (d + 2)
    told: np.ndarray = start.mean + start.sigma * step * min(1.0, limit / max(length, 1e-12))
    return told


def _seed(study_seed: int, slot: Slot) -> int:
    text = f"{study_seed}/{slot.generation}/{slot.index}/{slot.attempt}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
