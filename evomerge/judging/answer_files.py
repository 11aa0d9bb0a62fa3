"""Grading a file of answers: JSON lines in, JSON lines out."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from evomerge.answering.engine import Answer
from evomerge.errors import InputError, TaskError
from evomerge.files import replace_file
from evomerge.judging.grade import BatchJudge, Grade, Judge
from evomerge.outputs import check_outputs
from evomerge.task_files import read_json_records
from evomerge.tasks import Task, load_tasks

# Half a surrogate pair is a valid JSON escape and cannot be written as UTF-8.
_SURROGATES = dict.fromkeys(range(55296, 57344), "�")


@dataclass(frozen=True)
class GradeSummary:
    """`n` grades, their mean (1 to 5) and its standard error (None for a single grade).

    `tokens` are those of thoughts and of the answer, per answer that tells them (None: none does).
    """

    n: int
    mean: float
    stderr: float | None
    tokens: tuple[float, float] | None = None


@dataclass(frozen=True)
class AnswerLine:
    """One line of an answers file: the task, the model (None: not named), and its answer."""

    task: Task
    model: str | None
    answer: Answer


def grade_file(
    tasks_path: str | Path, answers_path: str | Path, judge: Judge, out: str | Path | None
) -> GradeSummary:
    """Grade a JSON-lines file of answers and write one JSON line each to `out` (None: stdout).

    An answer holds `task_id` and `output`, and may hold `model`, `truncated`, `answer_tokens` and
    `thought_tokens`; a grade holds `task_id`, `grade`, `reason`, `judge`, `model`, `correct`, and
    the numbers of tokens where the answer does. The order stays. `out` is written
    completely or not at all. Raises TaskError for a bad task file or an unknown task id, InputError
    for lines that are not answers or come twice and where `out` is one of the files read,
    JudgeError, OutputError.
    """
    check_outputs(files=[out], inputs=[Path(tasks_path), Path(answers_path)])
    lines = read_answers(answers_path, load_tasks(tasks_path))
    grades = grade_lines(judge, lines)
    written = []
    for line, grade in zip(lines, grades, strict=True):
        record = json.dumps(_record(line, grade, judge), ensure_ascii=False)
        written.append(record.translate(_SURROGATES) + "\n")
    text = "".join(written)
    if out is None:
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        replace_file(
            Path(out),
            lambda path: path.write_text(text, encoding="utf-8", newline="\n"),
            make_folder=False,
        )
    return _summary([grade.value for grade in grades], [line.answer for line in lines])


def grade_lines(judge: Judge, lines: Sequence[AnswerLine]) -> list[Grade]:
    """Grade answers in order, in one call if the judge allows it. Raises what the judge raises."""
    if isinstance(judge, BatchJudge):
        return list(judge.grade_all([line.task for line in lines], [line.answer for line in lines]))
    return [judge.grade(line.task, line.answer) for line in lines]


def read_answers(path: str | Path, tasks: Sequence[Task]) -> list[AnswerLine]:
    """The answers of a JSON-lines file, in order, each with its task.

    Raises TaskError and InputError naming the line.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            "no such answers file",
            where=path,
            remedy="Name a file of JSON lines with `task_id` and `output`.",
        )
    by_id = {str(task.task_id): task for task in tasks}
    seen: dict[tuple[str, str | None], str] = {}
    lines = []
    for place, record in read_json_records(path):
        line = _answer_line(record, by_id, where=f"{path}, {place}")
        key = (str(line.task.task_id), line.model)
        if key in seen:
            whose = ""
            if line.model is not None:
                whose = f" by model {line.model}"
            raise InputError(
                f"a second answer{whose} to this task; the first is in {seen[key]}",
                where=f"{path}, {place}",
                found=line.task.task_id,
                remedy="Keep one answer for each task and model.",
            )
        seen[key] = place
        lines.append(line)
    if not lines:
        raise InputError(
            "contains no answers",
            where=path,
            remedy='Write lines such as {"task_id": 0, "output": "…"}.',
        )
    return lines


def _answer_line(record: Mapping[str, object], by_id: dict[str, Task], where: str) -> AnswerLine:
    for key in ("task_id", "output"):
        if key not in record:
            raise InputError(
                f"an answer has no `{key}`",
                where=where,
                found=sorted(record),
                remedy="Give each answer `task_id` and `output`.",
            )
    task_id = record["task_id"]
    text = record["output"]
    if not isinstance(text, str):
        raise InputError(
            "`output` is not a string",
            where=where,
            found=text,
            remedy="Write the answer as a string.",
        )
    if isinstance(task_id, bool) or str(task_id) not in by_id:
        raise TaskError(
            "an answer to an unknown task",
            where=where,
            found=task_id,
            remedy="Use the task file that the answers were made from.",
        )
    model = model_of(record, where)
    truncated = record.get("truncated")
    if truncated is not None and not isinstance(truncated, bool):
        raise InputError(
            "`truncated` is neither true nor false",
            where=where,
            found=truncated,
            remedy="Write true or false, or leave it out.",
        )
    answered, thought = _tokens(record, where)
    answer = Answer(text, bool(truncated), answered + (thought or 0), thought_tokens=thought)
    return AnswerLine(by_id[str(task_id)], model, answer)


def _tokens(record: Mapping[str, object], where: str) -> tuple[int, int | None]:
    """The tokens of an answer, and of its thoughts where both are known. Raises InputError."""
    found = []
    for key in ("answer_tokens", "thought_tokens"):
        value = record.get(key)
        if value is not None and (type(value) is not int or value < 0):
            raise InputError(
                f"`{key}` is not a number of tokens",
                where=where,
                found=value,
                remedy="Write a whole number, or leave it out.",
            )
        found.append(value)
    answered, thought = found
    if not isinstance(answered, int) or not isinstance(thought, int):
        return 0, None
    return answered, thought


def model_of(record: Mapping[str, Any], where: str) -> str | None:
    """The model that a record names, if it names one. Raises InputError."""
    model = record.get("model")
    if model is not None and not isinstance(model, str):
        raise InputError(
            "`model` is not a string",
            where=where,
            found=model,
            remedy="Write the model's name as a string.",
        )
    return model


def _record(line: AnswerLine, grade: Grade, judge: Judge) -> dict[str, Any]:
    record: dict[str, Any] = {
        "task_id": line.task.task_id,
        "grade": grade.value,
        "reason": grade.reason,
        "judge": judge.name,
        "model": line.model,
        "correct": grade.correct,
    }
    if line.answer.thought_tokens is not None:
        record["answer_tokens"] = line.answer.answer_tokens
        record["thought_tokens"] = line.answer.thought_tokens
    return record


def _summary(grades: Sequence[float], answers: Sequence[Answer]) -> GradeSummary:
    n = len(grades)
    stderr = None
    if n > 1:
        stderr = stdev(grades) / math.sqrt(n)
    tokens, thinking = None, [a for a in answers if a.thought_tokens is not None]
    if thinking:
        thoughts = fmean(answer.thought_tokens or 0 for answer in thinking)
        tokens = (thoughts, fmean(answer.answer_tokens for answer in thinking))
    return GradeSummary(n, fmean(grades), stderr, tokens)
