"""Here every answer of a study goes to its judge, batch by batch, and comes back graded.

A judge that waits for a server grades one batch while the next one is answered.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from evomerge.answering.engine import Answer
from evomerge.judging.grade import BatchJudge, Grade, Judge, PendingGrades, WaitingJudge
from evomerge.tasks import Task


@dataclass
class PendingEvaluation:
    """A recipe's answers to some tasks, and their grades, known or pending, by index."""

    judge: Judge | None  # None: only the answers are wanted
    tasks: Sequence[Task]
    answers: list[Answer] = field(default_factory=list)
    seconds: dict[str, float] = field(
        default_factory=lambda: {"merge": 0.0, "answer": 0.0, "judge": 0.0}
    )
    tokens_per_second: float | None = None
    grades: dict[int, Grade] = field(default_factory=dict)
    pending: list[tuple[list[int], PendingGrades]] = field(default_factory=list)

    def batch_answered(self, indices: Sequence[int], answers: Sequence[Answer]) -> None:
        """Request the grades of a batch of answers, or grade it immediately."""
        began = time.perf_counter()
        tasks = [self.tasks[i] for i in indices]
        if isinstance(self.judge, WaitingJudge):
            self.pending.append((list(indices), self.judge.submit(tasks, answers)))
        elif isinstance(self.judge, BatchJudge):
            self.grades.update(zip(indices, self.judge.grade_all(tasks, answers), strict=True))
        elif self.judge is not None:
            for i, task, answer in zip(indices, tasks, answers, strict=True):
                self.grades[i] = self.judge.grade(task, answer)
        self.seconds["judge"] += time.perf_counter() - began

    def done(self) -> bool:
        """Whether every grade has arrived, or never will."""
        return all(pending.done() for _, pending in self.pending)

    def wait(self) -> list[Grade]:
        """The grades in the tasks' order. Raises JudgeError, JudgePaused.

        `seconds["judge"]` grows by the time spent waiting here.
        """
        began = time.perf_counter()
        for indices, pending in self.pending:
            self.grades.update(zip(indices, pending.result(), strict=True))
        self.seconds["judge"] += time.perf_counter() - began
        return [self.grades[i] for i in range(len(self.tasks))]
