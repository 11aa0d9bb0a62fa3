"""Grading beside answering: while a judge is waited for, the next candidates are merged and answer.

Answers are handed to the judge batch by batch. Trials are still started and recorded one after
another: what is done ahead lies in the caches of answers and of grades, and a candidate's own turn
finds it there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from evomerge.answering.engine import Answer
from evomerge.errors import EngineError
from evomerge.judging.grade import BatchJudge, Grade, Judge, PendingGrades, WaitingJudge
from evomerge.recipe import Recipe
from evomerge.tasks import Task

Key: TypeAlias = tuple[str, str, tuple[str, ...]]  # recipe, mode, tasks
# what is examined: a recipe on some tasks, answered in a mode
Item: TypeAlias = tuple[Recipe, Sequence[Task], str]


@dataclass
class Begun:
    """A recipe's answers to some tasks, and their grades or what they are waited for with; by the
    tasks' places.
    """

    judge: Judge | None  # None: answers alone are wanted
    tasks: Sequence[Task]
    answers: list[Answer] = field(default_factory=list)
    seconds: dict[str, float] = field(
        default_factory=lambda: {"merge": 0.0, "answer": 0.0, "judge": 0.0}
    )
    tokens_per_second: float | None = None
    grades: dict[int, Grade] = field(default_factory=dict)
    pending: list[tuple[list[int], PendingGrades]] = field(default_factory=list)

    def got(self, places: Sequence[int], answers: Sequence[Answer]) -> None:
        """A batch is answered: ask for its grades, or grade it here and now."""
        began = time.perf_counter()
        tasks = [self.tasks[i] for i in places]
        if isinstance(self.judge, WaitingJudge):
            self.pending.append((list(places), self.judge.submit(tasks, answers)))
        elif isinstance(self.judge, BatchJudge):
            self.grades.update(zip(places, self.judge.grade_all(tasks, answers), strict=True))
        elif self.judge is not None:
            self.grades |= {
                i: self.judge.grade(*pair)
                for i, pair in zip(places, zip(tasks, answers, strict=True), strict=True)
            }
        self.seconds["judge"] += time.perf_counter() - began

    def done(self) -> bool:
        """Whether every grade is there, or will never be."""
        return all(pending.done() for _, pending in self.pending)

    def wait(self) -> list[Grade]:
        """The grades in the tasks' order; `seconds["judge"]` grows by what was waited here. Raises
        JudgeError, JudgePaused.
        """
        began = time.perf_counter()
        for places, pending in self.pending:
            self.grades.update(zip(places, pending.result(), strict=True))
        self.seconds["judge"] += time.perf_counter() - began
        return [self.grades[i] for i in range(len(self.tasks))]


@dataclass
class Ahead:
    """What was begun before its turn."""

    begun: dict[Key, Begun] = field(default_factory=dict)

    def take(self, item: Item, begin: Callable[[Item], Begun]) -> Begun:
        return self.begun.pop(_key(item), None) or begin(item)

    def keep(self, item: Item, begun: Begun) -> None:
        """For its own turn."""
        self.begun[_key(item)] = begun

    def while_waiting(
        self, current: Sequence[Begun], upcoming: Iterator[Item], begin: Callable[[Item], Begun]
    ) -> None:
        """Begin what comes next until the current ones' grades are there; each is begun once."""
        while not all(begun.done() for begun in current):
            item = next(upcoming, None)
            if item is None:
                return
            if _key(item) in self.begun:
                continue
            try:
                self.begun[_key(item)] = begin(item)
            except EngineError:
                return  # it fails again in its own turn, and is recorded then


def _key(item: Item) -> Key:
    recipe, tasks, mode = item
    return recipe.digest(), mode, tuple(str(task.task_id) for task in tasks)
