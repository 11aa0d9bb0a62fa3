"""Tasks: load them from a file or a hub dataset, and split them into search and held-out."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from evomerge.errors import TaskError

FILE_TYPES = (".jsonl", ".json", ".csv", ".xlsx", ".parquet")


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
        return self.task_id if self.source is None else f"{self.source}-{self.task_id}"

    @property
    def key(self) -> str:
        """The stored name as text: what grades are kept by."""
        return str(self.stored_id)


@dataclass(frozen=True)
class Split:
    """Tasks that the search sees, tasks that only the verdict sees, and tasks that only the choice
    of the winner sees.
    """

    search: tuple[Task, ...]
    held_out: tuple[Task, ...]
    validation: tuple[Task, ...] = ()


def load_tasks(path: str | Path) -> tuple[Task, ...]:
    """Tasks of a .jsonl, .json, .csv, .xlsx or .parquet file with a column `input`.

    `task_id` defaults to the row's number. Raises TaskError: no such file, wrong encoding, a row
    that is no record, a missing or empty `input`, a duplicate `task_id`.
    """
    path = Path(path)
    if not path.is_file():
        raise TaskError(
            "no such task file", where=path, remedy="Name a .jsonl, .csv, .xlsx or .parquet file."
        )
    if path.suffix not in FILE_TYPES:
        raise TaskError(
            "unknown type of task file",
            where=path,
            found=path.suffix,
            remedy=f"Use one of {', '.join(FILE_TYPES)}.",
        )
    readers = {".csv": _csv_rows, ".xlsx": _xlsx_rows, ".parquet": _parquet_rows}
    reader = readers.get(path.suffix, _json_rows)
    return tasks_from_rows(reader(path), where=str(path))


def load_dataset_tasks(name: str, split: str | None = None) -> tuple[Task, ...]:
    """Tasks of a hub dataset, or of a local folder in the hub's format, with the columns of Task."""
    try:
        import datasets

        loaded = datasets.load_dataset(name, split=split or "test")
    except Exception as error:  # the hub's client raises many kinds of its own
        raise TaskError(
            f"the dataset cannot be loaded: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            where=f"dataset {name}",
            remedy="Check the name and the network, or save it as .jsonl and name the file.",
        ) from error
    return tasks_from_rows(
        ((f"row {i}", dict(row)) for i, row in enumerate(loaded)), where=f"dataset {name}"
    )


def tasks_from_rows(rows: Iterable[tuple[str, Mapping[str, Any]]], where: str) -> tuple[Task, ...]:
    """Tasks from (place, record) pairs; a place names the row in messages."""
    tasks: list[Task] = []
    seen: dict[str, str] = {}
    for number, (place, row) in enumerate(rows):
        at = f"{where}, {place}"
        text = row.get("input")
        if text is None:
            raise TaskError(
                "a task has no `input`",
                where=at,
                found=sorted(map(str, row)),
                remedy="Each task needs a field `input`.",
            )
        if not isinstance(text, str) or not text.strip():
            raise TaskError(
                "`input` is not a text",
                where=at,
                found=text,
                remedy="Write the instruction as a non-empty string.",
            )
        task_id = row.get("task_id")
        task_id = number if task_id is None or task_id == "" else task_id
        if not isinstance(task_id, int | str) or isinstance(task_id, bool):
            raise TaskError(
                "`task_id` is neither a number nor a text",
                where=at,
                found=task_id,
                remedy="Use 0, 1, 2, … or names.",
            )
        if str(task_id) in seen:
            raise TaskError(
                f"duplicate task_id, first in {seen[str(task_id)]}",
                where=at,
                found=task_id,
                remedy="Give each task its own id.",
            )
        seen[str(task_id)] = place
        output, aspect = _text(row, "output", at), _text(row, "eval_aspect", at)
        tasks.append(Task(task_id, text, output, aspect, _text(row, "kind", at)))
    if not tasks:
        raise TaskError(
            "holds no tasks", where=where, remedy="Add at least one record with a field `input`."
        )
    return tuple(tasks)


def split_tasks(
    tasks: Sequence[Task], held_out: float, seed: int, validation: float = 0.0
) -> Split:
    """Split by a seeded shuffle within each `kind`, so that every part holds every kind in the same
    share.

    `held_out` is the share kept for the verdict, 0 < held_out < 1; `validation` is the share of the
    others that is kept for the choice of the winner. Raises TaskError where a part would be empty.
    """
    if len(tasks) < 2:
        raise TaskError(
            "too few tasks to hold some out",
            found=len(tasks),
            remedy="Two tasks are the least; fifty or more tell something.",
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
    return tuple(t for i, t in enumerate(tasks) if i not in kept), tuple(
        t for i, t in enumerate(tasks) if i in kept
    )


def tasks_hash(tasks: Sequence[Task]) -> str:
    """A SHA-256 over every field of every task, in order."""
    records = []
    for task in tasks:
        record = asdict(task) | {"task_id": task.stored_id}
        del record["source"]  # the stored name holds it
        records.append(record)
    return sha256(json.dumps(records, ensure_ascii=False).encode()).hexdigest()


def read_json_records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(place, record) pairs of a JSON-lines file, a JSON list, or records that spread over several
    lines.

    CRLF and a byte-order mark are accepted. Raises TaskError naming the line.
    """
    text = _read_text(path)
    decoder = json.JSONDecoder()
    records: list[tuple[str, dict[str, Any]]] = []
    at, counted, line = 0, 0, 1
    while True:
        while (
            at < len(text)
            and text[at] in " \t\r\n,[]"
            and (text[at] not in ",[]" or path.suffix == ".json")
        ):
            at += 1
        if at >= len(text):
            return records
        # from the last record on: a large file is counted once
        line += text.count("\n", counted, at)
        counted = at
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            wrong = text.count("\n", 0, error.pos) + 1
            raise TaskError(
                f"no valid JSON: {error.msg}",
                where=f"{path}, line {wrong}",
                found=text[at : at + 40],
                remedy="Write one JSON object per line.",
            ) from error
        except (RecursionError, ValueError) as error:
            # nested too deeply, or a number of thousands of digits
            raise TaskError(
                f"cannot be read: {error}",
                where=f"{path}, line {line}",
                remedy="Write one plain JSON object per line.",
            ) from error
        if not isinstance(value, dict):
            raise TaskError(
                "a record is not an object",
                where=f"{path}, line {line}",
                found=value,
                remedy='Write {"task_id": 0, "input": "…"}.',
            )
        records.append((f"line {line}", value))


def _json_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    return read_json_records(path)


def _csv_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # a passage may be long
    rows = csv.DictReader(io.StringIO(_read_text(path), newline=""))
    return [
        (f"row {i + 2}", {str(k): _number(k, v) for k, v in row.items()})
        for i, row in enumerate(rows)
    ]


def _xlsx_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    import openpyxl

    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        rows = list(book.worksheets[0].iter_rows(values_only=True))
    except Exception as error:  # openpyxl lets zipfile's and its own errors through
        raise TaskError(
            f"not a readable Excel file: {error}",
            where=path,
            remedy="Save it as .xlsx, or use .jsonl.",
        ) from error
    header = [str(cell) for cell in rows[0]] if rows else []
    return [
        (f"row {i + 2}", dict(zip(header, row, strict=False)))
        for i, row in enumerate(rows[1:])
        if any(cell is not None for cell in row)
    ]


def _parquet_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    import pyarrow.parquet as parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except Exception as error:  # pyarrow's errors share no root but Exception
        raise TaskError(
            f"not a readable parquet file: {error}",
            where=path,
            remedy="Save it again, or use .jsonl.",
        ) from error
    return [(f"row {i}", row) for i, row in enumerate(rows)]


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TaskError(
            "is not UTF-8",
            where=path,
            found=data[error.start : error.start + 4],
            remedy="Save it as UTF-8 (in Excel: CSV UTF-8).",
        ) from error


def _number(key: str | None, value: Any) -> Any:
    return (
        int(value) if key == "task_id" and isinstance(value, str) and value.isdecimal() else value
    )


def _text(row: Mapping[str, Any], key: str, at: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if isinstance(value, bool | int | float):
        return str(value)
    if not isinstance(value, str):
        raise TaskError(
            f"`{key}` is not a text", where=at, found=value, remedy="Write it as a string."
        )
    return value
