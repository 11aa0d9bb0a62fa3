"""Records of a task file, each with its place for messages; the file's suffix tells its type."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from evomerge.errors import TaskError
from evomerge.sheets.delimited import decode_text, read_delimited
from evomerge.sheets.sheet import EMPTY, Cell, Sheet
from evomerge.sheets.xlsx import open_workbook

Record: TypeAlias = tuple[str, dict[str, Any]]  # such as "line 3", and the fields
# the columns of a table that are read
COLUMNS = ("task_id", "input", "output", "eval_aspect", "kind")
LONGEST_NUMBER = 18  # digits of a task_id that is a number


def read_records(path: Path) -> list[Record]:
    """The records of a file, whose suffix tells its type. Raises TaskError."""
    if not path.is_file():
        raise TaskError(
            "no such task file", where=path, remedy="Name a .jsonl, .csv, .xlsx or .parquet file."
        )
    reader = READERS.get(path.suffix.casefold())
    if reader is None:
        raise TaskError(
            "unknown type of task file",
            where=path,
            found=path.suffix,
            remedy=f"Use one of {', '.join(READERS)}.",
        )
    return reader(path)


def read_json_records(path: Path) -> list[Record]:
    """The records of a JSON-lines file or of a JSON list; one may span several lines.

    CRLF and a byte-order mark are accepted. Raises TaskError naming the line.
    """
    text = decode_text(
        path, ("utf-8-sig",), TaskError, "Save it as UTF-8 (in Excel: CSV UTF-8, named .csv)."
    )
    between = " \t\r\n"
    if path.suffix.casefold() == ".json":
        between = " \t\r\n,[]"
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
            value, at = _decode_record(text, at)
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


def _decode_record(text: str, at: int) -> tuple[Any, int]:
    """The JSON value that begins at `at`, and where it ends.

    A line may break within a string: the competition's notebook strips every line and joins them
    until an object ends, so that the break and the blanks around it are no part of the string.
    Raises JSONDecodeError with the first mistake, ValueError, RecursionError.
    """
    try:
        return json.JSONDecoder().raw_decode(text, at)
    except json.JSONDecodeError as strict:
        try:
            _, end = json.JSONDecoder(strict=False).raw_decode(text, at)
            lines = io.StringIO(text[at:end], newline=None)
            return json.loads("".join(map(str.strip, lines)), strict=False), end
        except json.JSONDecodeError as error:
            if error.doc is not text or strict.pos == error.pos:
                raise strict from None
            line = text.count("\n", 0, error.pos) + 1
            what = f"a string is not closed on this line, and then, on line {line}: {error.msg}"
            raise json.JSONDecodeError(what, text, strict.pos) from error


def _csv_records(path: Path) -> list[Record]:
    return _table_records(read_delimited(path, COLUMNS, TaskError), _csv_id)


def _xlsx_records(path: Path) -> list[Record]:
    """The records of the first sheet that is visible."""
    with open_workbook(path, TaskError) as book:
        visible = [sheet for sheet in book.sheets if sheet.visible and sheet.part]
        if not visible:
            raise TaskError(
                "has no visible sheet",
                where=path,
                found=[sheet.title for sheet in book.sheets],
                remedy="Unhide the sheet of the tasks.",
            )
        return _table_records(book.read(visible[0]), _xlsx_id)


def _table_records(sheet: Sheet, task_id: Callable[[Cell], int | str]) -> list[Record]:
    """A record for each row that is filled in a column of tasks; the columns may have any order."""
    header = sheet.header
    for column in COLUMNS:
        count = header.count(column)
        if count > 1 or (count == 0 and column == "input"):
            raise TaskError(
                f"has {'more than one' if count else 'no'} column {column}",
                where=f"{sheet.where}, row {sheet.header_row}",
                found=[name for name in header if name],
                remedy=f"Name the columns in the first row: {', '.join(COLUMNS)}.",
            )
    at = {}
    for column in COLUMNS:
        if column in header:
            at[column] = header.index(column)
    for area in sheet.merged_at(list(at.values())):
        raise TaskError(
            "cells are merged",
            where=f"{sheet.where}, row {area.first_row}",
            found=area.name,
            remedy="Unmerge them, and fill in each of them.",
        )
    records = []
    for number, cells in sheet.body:
        mine = {column: cells.get(i, EMPTY) for column, i in at.items()}
        if not any(cell.text.strip() or cell.wrong for cell in mine.values()):
            continue
        for column, cell in mine.items():
            if cell.wrong:
                raise TaskError(
                    cell.wrong,
                    where=f"{sheet.where}, row {number}, column {column}",
                    found=cell.text or None,
                    remedy=cell.remedy,
                )
        record: dict[str, Any] = {column: cell.text for column, cell in mine.items()}
        record["task_id"] = task_id(mine.get("task_id", EMPTY))
        records.append((f"row {number}", record))
    return records


def _csv_id(cell: Cell) -> int | str:
    """A number where the text is one, be it 7.0, as tables with gaps write it."""
    whole, _, rest = cell.text.strip().partition(".")
    if whole.isdecimal() and len(whole) <= LONGEST_NUMBER and not rest.strip("0"):
        return int(whole)
    return cell.text


def _xlsx_id(cell: Cell) -> int | str:
    if cell.number and cell.text.removeprefix("-").isdecimal():
        return int(cell.text)
    return cell.text


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


READERS = {
    ".jsonl": read_json_records,
    ".json": read_json_records,
    ".csv": _csv_records,
    ".tsv": _csv_records,
    ".xlsx": _xlsx_records,
    ".xlsm": _xlsx_records,
    ".parquet": _parquet_records,
}
