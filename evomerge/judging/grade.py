"""What a judge is, and the grade it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from evomerge.answering.engine import Answer
    from evomerge.tasks import Task


@dataclass(frozen=True)
class Grade:
    """One judge's grade of one answer.

    `value` is 1.0 to 5.0. `correct` is True or False for a closed task (a number, a word, a list, a label)
    and None for an open one. `reason` says why, in one line.
    """

    value: float
    correct: bool | None
    reason: str


class Judge(Protocol):
    """Grades answers; `name` stands in every grade and verdict, `version` changes when the same answer may be graded otherwise."""

    name: str
    version: str

    def grade(self, task: Task, answer: Answer) -> Grade:
        """Grade one answer. Raises JudgeError when the judge itself fails."""
