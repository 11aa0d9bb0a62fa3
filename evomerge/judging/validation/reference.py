"""Reference grades: reading a grades file, and joining it with answers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.errors import InputError, TaskError
from evomerge.judging.answer_files import AnswerLine
from evomerge.task_files import read_json_records
from evomerge.tasks import Task

Key = tuple[str | None, str]  # model, task id


@dataclass(frozen=True)
class GradeLine:
    """One reference grade, 1 to 5; `take` counts the runs of one judge on one answer from 1."""

    model: str | None
    task_id: str
    judge: str
    take: int
    grade: float

    @property
    def key(self) -> Key:
        """What it is joined by."""
        return self.model, self.task_id


@dataclass(frozen=True)
class Joined:
    """Answers with their reference grades (the mean over judges), and how many lines found no
    partner.
    """

    lines: tuple[AnswerLine, ...]
    grades: tuple[float, ...]
    answers_alone: int
    grades_alone: int

    def unmatched(self) -> str:
        """A line for people, or an empty one."""
        parts = [
            f"{n} {what}"
            for n, what in (
                (self.answers_alone, "answers without a grade"),
                (self.grades_alone, "grades without an answer"),
            )
            if n
        ]
        return f"left out: {' and '.join(parts)}" if parts else ""


def read_grades(path: str | Path, tasks: Sequence[Task]) -> list[GradeLine]:
    """The grades of a JSON-lines file: task_id, judge, grade, and model and take where there are
    several.

    Raises TaskError for an unknown task, InputError for lines that are no grades, are out of 1 to
    5, or come twice.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            "no such grades file",
            where=path,
            remedy="Name a file of JSON lines: model, task_id, judge, take, grade.",
        )
    known = {str(task.task_id) for task in tasks}
    seen: dict[tuple[object, ...], str] = {}
    lines = []
    for place, record in read_json_records(path):
        line = _grade_line(record, known, f"{path}, {place}")
        whole = (line.model, line.task_id, line.judge, line.take)
        if whole in seen:
            raise InputError(
                f"a second grade of this answer by {line.judge}, the first in {seen[whole]}",
                where=f"{path}, {place}",
                found=line.task_id,
                remedy="Number a judge's runs with `take`.",
            )
        seen[whole] = place
        lines.append(line)
    if not lines:
        raise InputError(
            "holds no grades",
            where=path,
            remedy='Write lines such as {"model": "m", "task_id": 0, "judge": "j", "grade": 4}.',
        )
    return lines


def pick(
    lines: Iterable[GradeLine], judges: Sequence[str], path: str | Path, take: int = 1
) -> dict[Key, float]:
    """One take's grades of one or several judges, averaged. Raises InputError naming the judges
    that the file has.
    """
    lines = list(lines)
    names = Counter(line.judge for line in lines)
    for judge in judges:
        if judge not in names:
            raise InputError(
                "the file has no grades by this judge",
                where=path,
                found=judge,
                remedy=f"It has {', '.join(sorted(names))}.",
            )
    sums: dict[Key, list[float]] = {}
    for line in lines:
        if line.judge in judges and line.take == take:
            sums.setdefault(line.key, []).append(line.grade)
    return {key: math.fsum(grades) / len(grades) for key, grades in sums.items()}


def join(answers: Iterable[AnswerLine], grades: dict[Key, float]) -> Joined:
    """Answers that have a grade, in their order. Raises InputError where there is none."""
    answers = list(answers)
    lines = [line for line in answers if answer_key(line) in grades]
    if not lines:
        a, g = next(iter(answers)), next(iter(grades), None)
        raise InputError(
            "no answer has a grade by that judge",
            where="answers and grades",
            found=f"an answer of model {a.model} to task {a.task.task_id}, a grade of {g}",
            remedy="They are joined by `model` and `task_id`.",
        )
    return Joined(
        tuple(lines),
        tuple(grades[answer_key(line)] for line in lines),
        len(answers) - len(lines),
        len(grades) - len(lines),
    )


def answer_key(line: AnswerLine) -> Key:
    """What an answer is joined by."""
    return line.model, str(line.task.task_id)


def _grade_line(record: dict[str, Any], known: set[str], where: str) -> GradeLine:
    for key in ("task_id", "judge", "grade"):
        if key not in record:
            raise InputError(
                f"a grade has no `{key}`",
                where=where,
                found=sorted(record),
                remedy="Each needs `task_id`, `judge`, `grade`.",
            )
    task_id, judge, grade = record["task_id"], record["judge"], record["grade"]
    model, take = record.get("model"), record.get("take", 1)
    if isinstance(task_id, bool) or str(task_id) not in known:
        raise TaskError(
            "a grade of an unknown task",
            where=where,
            found=task_id,
            remedy="Use the task file that was graded.",
        )
    if isinstance(grade, bool) or not isinstance(grade, int | float) or not 1 <= grade <= 5:
        raise InputError(
            "`grade` is no number from 1 to 5",
            where=where,
            found=grade,
            remedy="Leave out what could not be graded.",
        )
    if not isinstance(judge, str) or not judge:
        raise InputError(
            "`judge` is not a name",
            where=where,
            found=judge,
            remedy="Write the judge's name as a string.",
        )
    if model is not None and not isinstance(model, str):
        raise InputError(
            "`model` is not a text",
            where=where,
            found=model,
            remedy="Write the model's name as a string.",
        )
    if isinstance(take, bool) or not isinstance(take, int) or take < 1:
        raise InputError(
            "`take` is no count", where=where, found=take, remedy="Number a judge's runs 1, 2, …."
        )
    return GradeLine(model, str(task_id), judge, take, float(grade))
