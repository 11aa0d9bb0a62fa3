"""Prefetching: while the judge works, the next recipes are merged and answer their tasks.

Trials are still started and recorded one after another:
what is done ahead is in the caches of answers and grades, where each candidate finds it in its own
turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from evomerge.answering.cache import MERGED
from evomerge.errors import EngineError
from evomerge.recipe import Recipe
from evomerge.searching.judge_answers import PendingEvaluation
from evomerge.searching.ledger import Ledger
from evomerge.searching.prepare import Problem
from evomerge.searching.samplers.cma import Slot
from evomerge.tasks import Task

Key: TypeAlias = tuple[str, str, tuple[str, ...]]  # recipe, mode, tasks
# an evaluation: a recipe on some tasks, answered in a mode
Item: TypeAlias = tuple[Recipe, Sequence[Task], str]
Reference: TypeAlias = tuple[str, tuple[float, ...]]  # role and vector


@dataclass
class Prefetcher:
    """Keeps the evaluations that were started before their turn."""

    begun: dict[Key, PendingEvaluation] = field(default_factory=dict)

    def take(self, item: Item) -> PendingEvaluation | None:
        """The evaluation that was started ahead, if it was."""
        return self.begun.pop(_key(item), None)

    def keep(self, item: Item, evaluation: PendingEvaluation) -> None:
        """Put an evaluation back for its own turn."""
        self.begun[_key(item)] = evaluation

    def while_waiting(
        self,
        current: Sequence[PendingEvaluation],
        upcoming: Iterable[Item],
        begin: Callable[[Item], PendingEvaluation],
    ) -> None:
        """Start what comes next until the current grades have arrived; each item starts once."""
        items = iter(upcoming)
        while not all(evaluation.done() for evaluation in current):
            item = next(items, None)
            if item is None:
                return
            if _key(item) in self.begun:
                continue
            try:
                self.begun[_key(item)] = begin(item)
            except EngineError:
                return  # it fails again in its own turn, and is recorded then


class TaskPlan(Protocol):
    """Which tasks a generation answers, and how."""

    @property
    def compares_candidates_first(self) -> bool:
        """Whether a generation's candidates are compared before their trials begin."""

    @property
    def tasks_follow_grades(self) -> bool:
        """Whether a generation's tasks depend on the grades before it."""

    def tasks(self, generation: int) -> Sequence[Task]:
        """The search tasks that a generation is ranked on."""

    def mode(self) -> str:
        """How candidates answer: a mode of the answer cache."""


@dataclass(frozen=True)
class Upcoming:
    """The evaluations that will follow whatever the pending grades turn out to be."""

    problem: Problem
    ledger: Ledger
    generation_plan: TaskPlan
    # the trials that the verdict compares the winner with, once the references are graded
    compared: Callable[[], Iterable[Sequence[float]]]
    warm_start: bool  # whether gradient steps come between the references and the candidates

    def after_reference(self, following: Sequence[Reference]) -> Iterator[Item]:
        """The references that are left, and then the first generation where its draws are known."""
        genome, tasks = self.problem.genome, self.problem.split.search
        for _, vector in following:
            yield genome.decode(vector), tasks, MERGED
        plan = self.generation_plan
        fixed = not self.warm_start and not plan.compares_candidates_first
        fixed = fixed and not plan.tasks_follow_grades
        if fixed and plan.mode() == MERGED:
            yield from self._draws(0, 0)

    def after_candidate(self, slot: Slot) -> Iterator[Item]:
        """The rest of the generation, whose draws are independent, and then the verdict's."""
        if not self.generation_plan.compares_candidates_first:
            yield from self._draws(slot.generation, slot.index + 1)
        yield from self.after_mean()

    def after_mean(self) -> Iterator[Item]:
        """The references that the verdict compares the winner with, on the held-out tasks."""
        genome, tasks = self.problem.genome, self.problem.split.held_out
        for vector in self.compared():
            yield genome.decode(vector), tasks, MERGED

    def _draws(self, generation: int, first: int) -> Iterator[Item]:
        """The generation's unfinished candidates from an index on, up to the last trial."""
        history, trials = self.ledger.history(), self.problem.study.search.trials
        tasks, mode = self.generation_plan.tasks(generation), self.generation_plan.mode()
        for vector in self.problem.sampler.vectors(history, generation, trials, first, False):
            yield self.problem.genome.decode(vector), tasks, mode


def _key(item: Item) -> Key:
    recipe, tasks, mode = item
    return recipe.digest(), mode, tuple(task.key for task in tasks)
