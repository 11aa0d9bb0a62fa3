"""Records of a .jsonl, .json, .csv, .xlsx or .parquet file, each with its place for messages."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any, TypeAlias

from evomerge.errors import TaskError

Record: TypeAlias = tuple[str, dict[str, Any]]  # such as "line 3", and the fields


def read_records(path: Path) -> list[Record]:
    """The records of a file, whose suffix tells its type. Raises TaskError."""
    if not path.is_file():
        raise TaskError(
            "no such task file", where=path, remedy="Name a .jsonl, .csv, .xlsx or .parquet file."
        )
    if path.suffix not in READERS:
        raise TaskError(
            "unknown type of task file",
            where=path,
            found=path.suffix,
            remedy=f"Use one of {', '.join(READERS)}.",
        )
    return READERS[path.suffix](path)


def read_json_records(path: Path) -> list[Record]:
    """The records of a JSON-lines file or of a JSON list; one may spread over several lines.

    CRLF and a byte-order mark are accepted. Raises TaskError naming the line.
    """
    text = _read_text(path)
    between = " \t\r\n,[]" if path.suffix == ".json" else " \t\r\n"
    decoder = json.JSONDecoder()
    records: list[Record] = []
    at, counted, line = 0, 0, 1
    while True:
        while at < len(text) and text[at] in between:
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
                f"not valid JSON: {error.msg}",
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


def _csv_records(path: Path) -> list[Record]:
    csv.field_size_limit(2**31 - 1)  # a passage may be long
    rows = csv.DictReader(io.StringIO(_read_text(path), newline=""))
    records = []
    for i, row in enumerate(rows):
        record: dict[str, Any] = {str(key): value for key, value in row.items()}
        task_id = record.get("task_id")
        if isinstance(task_id, str) and task_id.isdecimal():
            record["task_id"] = int(task_id)
        records.append((f"row {i + 2}", record))
    return records


def _xlsx_records(path: Path) -> list[Record]:
    import openpyxl

    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        rows = list(book.worksheets[0].iter_rows(values_only=True))
    except Exception as error:  # openpyxl passes on zipfile's errors, and raises its own
        raise TaskError(
            f"not a readable Excel file: {error}",
            where=path,
            remedy="Save it as .xlsx, or use .jsonl.",
        ) from error
    header = [str(cell) for cell in rows[0]] if rows else []
    records = []
    for i, row in enumerate(rows[1:]):
        if any(cell is not None for cell in row):
            records.append((f"row {i + 2}", dict(zip(header, row, strict=False))))
    return records


def _parquet_records(path: Path) -> list[Record]:
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


READERS = {
    ".jsonl": read_json_records,
    ".json": read_json_records,
    ".csv": _csv_records,
    ".xlsx": _xlsx_records,
    ".parquet": _parquet_records,
}
