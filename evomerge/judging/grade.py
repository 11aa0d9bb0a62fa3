"""The interface of judges, and the grade that one gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from evomerge.answering.engine import Answer
    from evomerge.tasks import Task


@dataclass(frozen=True)
class Grade:
    """One judge's grade of one answer.

    `value` is 1.0 to 5.0. `correct` is True or False for a closed task (a number, a word, a list, a
    label) and None for an open one. `reason` explains the grade in one line.
    """

    value: float
    correct: bool | None
    reason: str


class Judge(Protocol):
    """Grades answers.

    `name` appears in every grade and verdict; `version` changes whenever the same answer may get
    another grade.
    """

    name: str
    version: str

    def grade(self, task: Task, answer: Answer) -> Grade:
        """Grade one answer. Raises JudgeError when the judge itself fails."""


class PendingGrades(Protocol):
    """Grades that have been requested and may not have arrived yet."""

    def done(self) -> bool: ...

    def result(self) -> list[Grade]:
        """Wait for the grades.

        Raises JudgeError, and JudgePaused where some are missing and the same command can continue.
        """


@runtime_checkable
class BatchJudge(Protocol):
    """A judge that grades several answers together more cheaply than one by one."""

    def grade_all(self, tasks: Sequence[Task], answers: Sequence[Answer]) -> list[Grade]:
        """Grade answers, in order. Raises JudgeError."""


@runtime_checkable
class WaitingJudge(Protocol):
    """A judge that waits for a server, while the next candidate can answer."""

    def submit(self, tasks: Sequence[Task], answers: Sequence[Answer]) -> PendingGrades:
        """Request grades and return immediately. Raises as the last failure did."""

    def close(self, drain: bool = True) -> None:
        """Send no more requests; `drain` waits for those in flight and keeps their grades."""
