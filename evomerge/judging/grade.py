"""What a judge is, and the grade it gives."""

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
    label) and None for an open one. `reason` says why, in one line.
    """

    value: float
    correct: bool | None
    reason: str


class Judge(Protocol):
    """Grades answers; `name` stands in every grade and verdict, `version` changes when the same
    answer may be graded otherwise.
    """

    name: str
    version: str

    def grade(self, task: Task, answer: Answer) -> Grade:
        """Grade one answer. Raises JudgeError when the judge itself fails."""


class PendingGrades(Protocol):
    """Grades of some answers, on their way."""

    def done(self) -> bool: ...

    def result(self) -> list[Grade]:
        """Wait for them. Raises JudgeError; JudgePaused: some are missing, and the same command
        goes on.
        """


@runtime_checkable
class BatchJudge(Protocol):
    """A judge to whom several answers at once cost less."""

    def grade_all(self, tasks: Sequence[Task], answers: Sequence[Answer]) -> list[Grade]:
        """Grade answers, in order. Raises JudgeError."""


@runtime_checkable
class WaitingJudge(Protocol):
    """A judge that spends its time waiting for others: it is asked, and meanwhile the next
    candidate answers.
    """

    def submit(self, tasks: Sequence[Task], answers: Sequence[Answer]) -> PendingGrades:
        """Ask for grades and return at once. Raises as the last failure did."""

    def close(self, drain: bool = True) -> None:
        """Ask nothing more; `drain` waits for what is under way, so that it is kept."""
