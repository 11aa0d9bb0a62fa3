"""Reference grades: reading a grades file, and joining it with answers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evomerge.errors import InputError, TaskError
from evomerge.judging.answer_files import AnswerLine, model_of
from evomerge.task_files import read_json_records
from evomerge.tasks import Task

Key = tuple[str | None, str]  # model, task id


@dataclass(frozen=True)
class GradeLine:
    """One reference grade, 1 to 5; `take` numbers a judge's runs over one answer from 1."""

    model: str | None
    task_id: str
    judge: str
    take: int
    grade: float

    @property
    def key(self) -> Key:
        """The key that it is joined by."""
        return self.model, self.task_id


@dataclass(frozen=True)
class Joined:
    """Answers with their reference grades (means over judges), and how many lines had no match."""

    lines: tuple[AnswerLine, ...]
    grades: tuple[float, ...]
    answers_alone: int
    grades_alone: int

    def unmatched(self) -> str:
        """One line on what was left out, or an empty text."""
        parts = []
        if self.answers_alone:
            parts.append(f"{self.answers_alone} answers without a grade")
        if self.grades_alone:
            parts.append(f"{self.grades_alone} grades without an answer")
        if parts:
            return f"left out: {' and '.join(parts)}"
        return ""


def read_grades(path: str | Path, tasks: Sequence[Task]) -> list[GradeLine]:
    """The grades of a JSON-lines file: task_id, judge, grade, and optionally model and take.

    Raises TaskError for an unknown task, InputError for lines that are not grades, are outside 1 to
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
        identity = (line.model, line.task_id, line.judge, line.take)
        if identity in seen:
            raise InputError(
                f"a second grade of this answer by {line.judge}; the first is in {seen[identity]}",
                where=f"{path}, {place}",
                found=line.task_id,
                remedy="Number a judge's runs with `take`.",
            )
        seen[identity] = place
        lines.append(line)
    if not lines:
        raise InputError(
            "contains no grades",
            where=path,
            remedy='Write lines such as {"model": "m", "task_id": 0, "judge": "j", "grade": 4}.',
        )
    return lines


def pick(
    lines: Iterable[GradeLine], judges: Sequence[str], path: str | Path, take: int = 1
) -> dict[Key, float]:
    """One take's grades by one or several judges, averaged.

    Raises InputError naming the judges that the file has.
    """
    lines = list(lines)
    names = Counter(line.judge for line in lines)
    for judge in judges:
        if judge not in names:
            raise InputError(
                "the file has no grades by this judge",
                where=path,
                found=judge,
                remedy=f"Name one of {', '.join(sorted(names))}.",
            )
    grades: dict[Key, list[float]] = {}
    for line in lines:
        if line.judge in judges and line.take == take:
            grades.setdefault(line.key, []).append(line.grade)
    return {key: math.fsum(values) / len(values) for key, values in grades.items()}


def join_grades(answers: Iterable[AnswerLine], grades: Mapping[Key, float]) -> Joined:
    """The answers that have a grade, in their order. Raises InputError where there is none."""
    answers = list(answers)
    lines, given = [], []
    for line in answers:
        key = answer_key(line)
        if key in grades:
            lines.append(line)
            given.append(grades[key])
    if not lines:
        answer = answers[0]
        grade = next(iter(grades), None)
        raise InputError(
            "no answer has a grade by that judge",
            where="answers and grades",
            found=f"an answer of model {answer.model} to task {answer.task.task_id}, "
            f"a grade of {grade}",
            remedy="Use the same `model` and `task_id` in both files.",
        )
    return Joined(tuple(lines), tuple(given), len(answers) - len(lines), len(grades) - len(lines))


def answer_key(line: AnswerLine) -> Key:
    """The key that an answer is joined by."""
    return line.model, str(line.task.task_id)


def _grade_line(record: Mapping[str, object], known: set[str], where: str) -> GradeLine:
    for key in ("task_id", "judge", "grade"):
        if key not in record:
            raise InputError(
                f"a grade has no `{key}`",
                where=where,
                found=sorted(record),
                remedy="Give each grade `task_id`, `judge` and `grade`.",
            )
    task_id = record["task_id"]
    if isinstance(task_id, bool) or str(task_id) not in known:
        raise TaskError(
            "a grade of an unknown task",
            where=where,
            found=task_id,
            remedy="Use the task file that was graded.",
        )
    grade = record["grade"]
    if isinstance(grade, bool) or not isinstance(grade, int | float) or not 1 <= grade <= 5:
        raise InputError(
            "`grade` is not a number from 1 to 5",
            where=where,
            found=grade,
            remedy="Leave out what could not be graded.",
        )
    judge = record["judge"]
    if not isinstance(judge, str) or not judge:
        raise InputError(
            "`judge` is not a name",
            where=where,
            found=judge,
            remedy="Write the judge's name as a string.",
        )
    model = model_of(record, where)
    take = record.get("take", 1)
    if isinstance(take, bool) or not isinstance(take, int) or take < 1:
        raise InputError(
            "`take` is not a count",
            where=where,
            found=take,
            remedy="Number a judge's runs 1, 2, ….",
        )
    return GradeLine(model, str(task_id), judge, take, float(grade))
