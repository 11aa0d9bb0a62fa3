"""The trials of a study so far: an immutable view of the ledger's records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from evomerge.searching.records.study_facts import Start
from evomerge.searching.records.trial_record import (
    INTERRUPTED,
    REFERENCES,
    TrialRecord,
    metric_values,
)


@dataclass(frozen=True)
class History:
    """Every trial by number, and where the first generation starts if not at the default."""

    trials: tuple[TrialRecord, ...] = ()
    start: Start | None = None

    @cached_property
    def complete(self) -> tuple[TrialRecord, ...]:
        """The trials that have a score."""
        return tuple(t for t in self.trials if t.state == "complete" and t.score is not None)

    @cached_property
    def candidates(self) -> tuple[TrialRecord, ...]:
        """The complete candidates."""
        return self._complete("candidate")

    @cached_property
    def references(self) -> tuple[TrialRecord, ...]:
        """The complete parents and uniform weights."""
        return self._complete(*REFERENCES)

    @cached_property
    def parents(self) -> dict[tuple[float, ...], TrialRecord]:
        """The complete parents by their weights."""
        return {t.weights: t for t in self._complete("parent")}

    @cached_property
    def mean(self) -> TrialRecord | None:
        """The latest complete trial of the distribution's mean."""
        means = self._complete("mean")
        return means[-1] if means else None

    @cached_property
    def finished(self) -> dict[tuple[int | None, int | None], TrialRecord]:
        """Complete candidates by (generation, index)."""
        return {t.slot: t for t in self.candidates}

    def has(self, role: str, weights: Sequence[float]) -> bool:
        """Whether a complete trial has this role and these weights."""
        return tuple(weights) in [t.weights for t in self._complete(role)]

    def trial(self, number: int) -> TrialRecord | None:
        """A trial by its number."""
        return {t.number: t for t in self.trials}.get(number)

    def generation(self, generation: int) -> list[TrialRecord]:
        """The generation's complete candidates, in the order of their trials."""
        return [t for t in self.candidates if t.generation == generation]

    def complete_generations(self, population: int) -> int:
        """How many generations have all their candidates, counted from the first one on."""
        return self.next_slot(population)[0]

    def next_slot(self, population: int) -> tuple[int, int]:
        """The first (generation, index) without a complete candidate."""
        number = 0
        while divmod(number, population) in self.finished:
            number += 1
        return divmod(number, population)

    def failures(self, generation: int, index: int) -> int:
        """How many candidates failed in a slot; interrupted ones do not count."""
        failed = 0
        for t in self.trials:
            here = t.role == "candidate" and t.slot == (generation, index)
            if here and t.state == "failed" and t.reason != INTERRUPTED:
                failed += 1
        return failed

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
        uniform = [t for t in self.references if t.role == "uniform" or is_uniform(t.weights)]
        return best_first(uniform)[0]

    def task_baselines(self, metric: str) -> dict[str, float]:
        """Task key -> its mean value by the references, which answer every search task."""
        values: dict[str, list[float]] = {}
        for t in self.references:
            for task, value in metric_values(t.grades, metric).items():
                values.setdefault(task, []).append(value)
        return {task: float(np.mean(known)) for task, known in values.items()}

    def _complete(self, *roles: str) -> tuple[TrialRecord, ...]:
        return tuple(t for t in self.complete if t.role in roles)


def best_first(trials: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Complete trials from the highest score down; the earlier one first where two are equal."""
    return sorted(trials, key=lambda t: (-(t.score or 0.0), t.number))
