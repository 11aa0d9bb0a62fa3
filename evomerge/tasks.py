"""Tasks: load them from a file or a hub dataset, and split them into search and held-out."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from evomerge.errors import TaskError
from evomerge.task_files import read_records


@dataclass(frozen=True)
class Task:
    """One task; the fields are those of ELYZA-tasks-100, and where the task comes from.

    `output` is the reference and may be empty; `eval_aspect` holds the grading points, `kind` a
    group's name. `source` is a number, None where all tasks come from one source.
    """

    task_id: int | str
    input: str
    output: str = ""
    eval_aspect: str = ""
    kind: str = ""
    source: int | None = None

    @property
    def stored_id(self) -> int | str:
        """The task's name in a study's storage, unique over all of the study's sources."""
        if self.source is None:
            return self.task_id
        return f"{self.source}-{self.task_id}"

    @property
    def key(self) -> str:
        """The stored name as text: what grades are kept by."""
        return str(self.stored_id)


@dataclass(frozen=True)
class Split:
    """Which tasks are for the search, which are held out, and which are for validation."""

    search: tuple[Task, ...]
    held_out: tuple[Task, ...]
    validation: tuple[Task, ...] = ()


def load_tasks(path: str | Path) -> tuple[Task, ...]:
    """Tasks of a .jsonl, .json, .csv, .tsv, .xlsx or .parquet file with a column `input`.

    `task_id` defaults to the row's number. Raises TaskError: no such file, wrong encoding, a row
    that is not a record, a missing or empty `input`, a duplicate `task_id`, in an .xlsx file merged
    cells, dates, error values and formulas without a stored value in a column that is read.
    """
    return tasks_from_rows(read_records(Path(path)), where=str(path))


def load_dataset_tasks(name: str, split: str | None = None) -> tuple[Task, ...]:
    """Tasks of a hub dataset, or of a local folder in the hub's format, with Task's columns.

    Raises TaskError when it cannot be loaded, and as `load_tasks`.
    """
    try:
        import datasets

        loaded = datasets.load_dataset(name, split=split or "test")
    except Exception as error:  # the hub's client raises many kinds of errors
        first = str(error).splitlines()[:1]
        raise TaskError(
            f"the dataset cannot be loaded: {type(error).__name__}: {''.join(first)}",
            where=f"dataset {name}",
            remedy="Check the name and the network, or save it as .jsonl and name the file.",
        ) from error
    rows = [(f"row {i}", dict(row)) for i, row in enumerate(loaded)]
    return tasks_from_rows(rows, where=f"dataset {name}")


def tasks_from_rows(rows: Iterable[tuple[str, Mapping[str, Any]]], where: str) -> tuple[Task, ...]:
    """Tasks from (place, record) pairs; a place names the row in messages."""
    tasks: list[Task] = []
    seen: dict[str, str] = {}
    for number, (place, row) in enumerate(rows):
        at = f"{where}, {place}"
        task = _task(row, number, at)
        if task.key in seen:
            raise TaskError(
                f"duplicate task_id, first in {seen[task.key]}",
                where=at,
                found=task.task_id,
                remedy="Give each task its own id.",
            )
        seen[task.key] = place
        tasks.append(task)
    if not tasks:
        raise TaskError(
            "contains no tasks", where=where, remedy="Add at least one record with a field `input`."
        )
    return tuple(tasks)


def _task(row: Mapping[str, Any], number: int, at: str) -> Task:
    text, task_id = row.get("input"), _whole(row.get("task_id"))
    if text is None:
        raise TaskError(
            "a task has no `input`",
            where=at,
            found=sorted(map(str, row)),
            remedy="Add a field `input` to each task.",
        )
    if not isinstance(text, str) or not text.strip():
        fault = "`input` is not text"
        if isinstance(text, str):
            fault = "`input` is empty"
        raise TaskError(
            fault,
            where=at,
            found=text,
            remedy="Write the instruction as a non-empty string.",
        )
    if task_id is None or task_id == "":
        task_id = number
    if not isinstance(task_id, int | str) or isinstance(task_id, bool):
        raise TaskError(
            "`task_id` is neither a number nor text",
            where=at,
            found=task_id,
            remedy="Use 0, 1, 2, … or names.",
        )
    output, aspect = _text(row, "output", at), _text(row, "eval_aspect", at)
    return Task(task_id, text, output, aspect, _text(row, "kind", at))


def _text(row: Mapping[str, Any], key: str, at: str) -> str:
    value = _whole(row.get(key))
    if value is None:
        return ""
    if isinstance(value, bool | int | float):
        return str(value)
    if not isinstance(value, str):
        raise TaskError(
            f"`{key}` is not text", where=at, found=value, remedy="Write it as a string."
        )
    return value


def _whole(value: Any) -> Any:
    """A number such as 8.0 as 8, and NaN as nothing: so tables with gaps store a column."""
    if not isinstance(value, float):
        return value
    if math.isnan(value):
        return None
    return int(value) if value.is_integer() else value


def split_tasks(
    tasks: Sequence[Task], held_out: float, seed: int, validation: float = 0.0
) -> Split:
    """Split by a seeded shuffle within each `kind`: every part has the same share of every kind.

    `held_out` is the share kept for the verdict, 0 < held_out < 1; `validation` is the share of the
    others that is kept for the choice of the winner. Raises TaskError where a part would be empty.
    """
    if len(tasks) < 2:
        raise TaskError(
            "too few tasks to hold some out",
            found=len(tasks),
            remedy="Add tasks: at least two are needed, and fifty or more give a useful verdict.",
        )
    others, kept = _part(tasks, held_out, random.Random(seed))
    if not validation:
        return Split(others, kept)
    if len(others) < 2:
        raise TaskError(
            "too few tasks for a validation split",
            found=len(others),
            remedy="Set split.validation: 0.",
        )
    search, chosen = _part(others, validation, random.Random(f"validation/{seed}"))
    return Split(search, kept, chosen)


def _part(
    tasks: Sequence[Task], share: float, rng: random.Random
) -> tuple[tuple[Task, ...], tuple[Task, ...]]:
    """(the others, `share` of the tasks in each kind), both in order and neither empty."""
    kinds: dict[str, list[int]] = {}
    for i, task in enumerate(tasks):
        kinds.setdefault(task.kind, []).append(i)
    kept: set[int] = set()
    owed = 0.0  # carried from kind to kind, so that the total is right although each kind rounds
    for kind in sorted(kinds):
        members = kinds[kind]
        rng.shuffle(members)
        owed += share * len(members)
        take = min(len(members), max(0, round(owed)))
        owed -= take
        kept.update(members[:take])
    if not kept:
        kept.add(kinds[min(kinds)][0])
    if len(kept) == len(tasks):
        kept.pop()
    others = tuple(t for i, t in enumerate(tasks) if i not in kept)
    return others, tuple(t for i, t in enumerate(tasks) if i in kept)


def stored_ids(tasks: Sequence[Task]) -> tuple[int | str, ...]:
    """The tasks' names in a study's storage."""
    return tuple(task.stored_id for task in tasks)


def tasks_hash(tasks: Sequence[Task]) -> str:
    """A SHA-256 over every field of every task, in order."""
    records = []
    for task in tasks:
        record = asdict(task) | {"task_id": task.stored_id}
        del record["source"]  # the stored name contains it
        records.append(record)
    return sha256(json.dumps(records, ensure_ascii=False).encode()).hexdigest()
