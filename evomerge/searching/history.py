"""The trials of a study so far: an immutable view of the ledger's records."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import TypeAlias

from evomerge.searching.estimates import task_means
from evomerge.searching.records.study_facts import Start
from evomerge.searching.records.trial_record import (
    INTERRUPTED,
    REFERENCES,
    TrialRecord,
    metric_values,
)

Slotted: TypeAlias = tuple[int | None, int | None]  # generation and index


@dataclass(frozen=True)
class TrialIndex:
    """What trials say together; another trial costs no look at those before it."""

    complete: tuple[TrialRecord, ...] = ()  # that have a score, by number
    candidates: tuple[TrialRecord, ...] = ()  # of them
    others: tuple[TrialRecord, ...] = ()  # of them: parents, uniform weights and means
    finished: Mapping[Slotted, TrialRecord] = field(default_factory=dict)  # candidates, by slot
    in_order: tuple[TrialRecord, ...] = ()  # the same in the order of their slots
    failed: Mapping[Slotted, int] = field(default_factory=dict)  # failed candidates of a slot
    best: TrialRecord | None = None  # the complete trial with the highest score

    def after(self, trials: Sequence[TrialRecord]) -> TrialIndex:
        """The index of these trials and the following ones, whose numbers are higher."""
        complete = tuple(t for t in trials if t.state == "complete" and t.score is not None)
        candidates = tuple(t for t in complete if t.role == "candidate")
        failed = dict(self.failed)
        for t in trials:
            if t.role == "candidate" and t.state == "failed" and t.reason != INTERRUPTED:
                failed[t.slot] = failed.get(t.slot, 0) + 1
        finished, in_order = self.finished, self.in_order
        if candidates:
            finished = {**finished, **{t.slot: t for t in candidates}}
            in_order += candidates
            if len(in_order) != len(finished) or not _ascending(self.in_order[-1:] + candidates):
                in_order = tuple(sorted(finished.values(), key=_position))
        contenders = complete if self.best is None else (self.best, *complete)
        return TrialIndex(
            complete=self.complete + complete,
            candidates=self.candidates + candidates,
            others=self.others + tuple(t for t in complete if t.role != "candidate"),
            finished=finished,
            in_order=in_order,
            failed=failed,
            best=best_first(contenders)[0] if contenders else None,
        )


@dataclass(frozen=True)
class History:
    """Every trial by number, and what decides about draws besides.

    `start` is where the first generation starts if not at the default. `known` is the trials' index
    where it has been made already.
    """

    trials: tuple[TrialRecord, ...] = ()
    start: Start | None = None
    credit_breaks_ties: bool = False  # among candidates of equal score
    known: TrialIndex | None = field(default=None, repr=False, compare=False)

    @cached_property
    def index(self) -> TrialIndex:
        """What the trials say together."""
        return self.known or TrialIndex().after(self.trials)

    def extended(self, trials: Sequence[TrialRecord]) -> History:
        """This history and the trials that follow."""
        if not trials:
            return self
        return replace(self, trials=self.trials + tuple(trials), known=self.index.after(trials))

    @property
    def complete(self) -> tuple[TrialRecord, ...]:
        """The trials that have a score."""
        return self.index.complete

    @property
    def candidates(self) -> tuple[TrialRecord, ...]:
        """The complete candidates."""
        return self.index.candidates

    @property
    def finished(self) -> Mapping[Slotted, TrialRecord]:
        """Complete candidates by (generation, index)."""
        return self.index.finished

    @cached_property
    def references(self) -> tuple[TrialRecord, ...]:
        """The complete parents and uniform weights."""
        return self._complete(*REFERENCES)

    @cached_property
    def parents(self) -> dict[tuple[float, ...], TrialRecord]:
        """The complete parents by their vectors."""
        return {t.vector: t for t in self._complete("parent")}

    @cached_property
    def mean(self) -> TrialRecord | None:
        """The latest complete trial of the distribution's mean."""
        return self.means[-1] if self.means else None

    @cached_property
    def means(self) -> tuple[TrialRecord, ...]:
        """The complete trials of means after the same generation, the latest one."""
        means = self._complete("mean")
        return tuple(t for t in means if t.generation == means[-1].generation)

    def has(self, role: str, vector: Sequence[float]) -> bool:
        """Whether a complete trial has this role and this vector."""
        return tuple(vector) in [t.vector for t in self.complete if t.role == role]

    def trial(self, number: int) -> TrialRecord | None:
        """A trial by its number."""
        return {t.number: t for t in self.trials}.get(number)

    def generation(self, generation: int) -> list[TrialRecord]:
        """The generation's complete candidates, in the order of their trials."""
        order = self.index.in_order
        first = bisect_left(order, (generation, 0), key=_position)
        last = bisect_left(order, (generation + 1, 0), key=_position)
        return sorted(order[first:last], key=lambda t: t.number)

    def complete_generations(self, population: int) -> int:
        """How many generations have all their candidates, counted from the first one on."""
        return self.next_slot(population)[0]

    def next_slot(self, population: int) -> tuple[int, int]:
        """The first (generation, index) without a complete candidate."""
        order = self.index.in_order

        def missing(number: int) -> int:
            """How many slots before the one of the candidate `number` are open."""
            generation, index = _position(order[number])
            return generation * population + index - number

        return divmod(bisect_right(range(len(order)), 0, key=missing), population)

    def failures(self, generation: int, index: int) -> int:
        """How many candidates failed in a slot; interrupted ones do not count."""
        return self.index.failed.get((generation, index), 0)

    def last_failure(self) -> str | None:
        """The reason of the latest failed trial."""
        for t in reversed(self.trials):
            if t.state == "failed":
                return t.reason
        return None

    def best_candidate(self) -> TrialRecord:
        """The complete candidate with the highest score; there must be one."""
        return best_first(self.candidates)[0]

    def best_uniform(self, is_uniform: Callable[[Sequence[float]], bool]) -> TrialRecord:
        """The best single weight by the search tasks.

        The base and a sibling alone count as the weights 0 and 1: `is_uniform` finds them.
        """
        uniform = []
        for trial in self.references:
            if trial.role == "uniform" or is_uniform(trial.vector):
                uniform.append(trial)
        return best_first(uniform)[0]

    def task_baselines(self, metric: str) -> dict[str, float]:
        """Task key -> its mean value by the references, which answer every search task."""
        return task_means(metric_values(t.grades, metric) for t in self.references)

    def _complete(self, *roles: str) -> tuple[TrialRecord, ...]:
        return tuple(t for t in self.index.others if t.role in roles)


def best_first(trials: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Complete trials from the highest score down; the earlier one first where two are equal."""
    return sorted(trials, key=lambda t: (-(t.score or 0.0), t.number))


def _position(trial: TrialRecord) -> tuple[int, int]:
    """A candidate's slot."""
    assert trial.generation is not None
    assert trial.index is not None
    return trial.generation, trial.index


def _ascending(trials: Sequence[TrialRecord]) -> bool:
    """Whether the candidates' slots ascend."""
    return all(_position(a) < _position(b) for a, b in pairwise(trials))
