"""The columns of a base, and the rows that every file format is read into."""

from __future__ import annotations

import difflib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from evomerge.errors import KnowledgeError
from evomerge.sheets.sheet import EMPTY, Sheet

REQUIRED = {
    "classes": ("class", "system", "template"),
    "examples": ("class", "input", "output"),
    "documents": ("title", "text"),
}
SETTINGS = ("max_new_tokens", "temperature", "repetition_penalty", "examples", "documents")
OPTIONAL = {"classes": ("description", *SETTINGS), "examples": ("weight",), "documents": ()}


@dataclass(frozen=True)
class Row:
    """A row that is not empty: texts by column.

    `place` names one of its columns in a message; mistakes in `reported` columns are known already.
    """

    number: int
    cells: Mapping[str, str]
    place: Callable[[str], str]
    reported: frozenset[str] = frozenset()


@dataclass
class Tables:
    """A base as it was read: sheet -> rows, the mistakes so far, and notes that are not mistakes.

    `missing` holds the sheets that are reported as missing or unreadable; mistakes in their rows
    are not reported.
    """

    path: Path
    rows: dict[str, list[Row]] = field(default_factory=dict)
    mistakes: list[KnowledgeError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing: set[str] = field(default_factory=set)

    def wrong(
        self, what: str, where: object, found: object = None, remedy: str | None = None
    ) -> None:
        """Add a mistake."""
        self.mistakes.append(KnowledgeError(what, where=where, found=found, remedy=remedy))


@dataclass(frozen=True)
class CellPlace:
    """Names a column of one row, as a spreadsheet counts rows; `where` is the file and sheet."""

    where: str
    number: int

    def __call__(self, column: str) -> str:
        return f"{self.where}, row {self.number}, column {column}"


def no_such_base(path: Path) -> KnowledgeError:
    """The error to raise where there is no file."""
    return KnowledgeError(
        "no such knowledge base",
        where=path,
        remedy="Name an Excel file (.xlsx), a .yaml or a .csv file.",
    )


def columns(sheet: str) -> str:
    """The names of a sheet's columns, for a message."""
    required = ", ".join(REQUIRED[sheet])
    if not OPTIONAL[sheet]:
        return required
    return f"{required}; may have {', '.join(OPTIONAL[sheet])}"


def find_columns(sheet: str, header: Sequence[str], where: str, tables: Tables) -> dict[str, int]:
    """Column -> index in the header, in whatever order the columns come.

    Adds mistakes for columns that are missing, double, or named nearly right.
    """
    names = [name.strip().casefold() for name in header]
    known = (*REQUIRED[sheet], *OPTIONAL[sheet])
    for column in known:
        count = names.count(column)
        if count > 1 or (count == 0 and column in REQUIRED[sheet]):
            tables.wrong(
                f"has {'more than one' if count else 'no'} column {column}",
                where,
                [name for name in names if name],
                f"Name the columns in the first row: {columns(sheet)}.",
            )
            tables.missing.add(sheet)
    absent = [column for column in OPTIONAL[sheet] if column not in names]
    for name in names:
        if not name or name in known:
            continue
        near = difflib.get_close_matches(name, absent, n=1, cutoff=0.75)
        if near:
            tables.wrong(
                f"unknown column {name}",
                where,
                None,
                f"Did you mean {near[0]}? Further columns may have any other name.",
            )
        else:
            tables.notes.append(f"{where}: the column {name} is not read")
    found = {}
    for column in known:
        if column in names:
            found[column] = names.index(column)
    return found


def fill(tables: Tables, name: str, sheet: Sheet) -> None:
    """Add the rows of one sheet, whatever file it was read from, with its mistakes and notes."""
    at = find_columns(name, sheet.header, f"{sheet.where}, row {sheet.header_row}", tables)
    merged = _merged(sheet, at, tables)
    read: list[Row] = []
    for number, cells in sheet.body:
        mine = {column: cells.get(i, EMPTY) for column, i in at.items()}
        if not any(cell.text.strip() or cell.wrong for cell in mine.values()):
            continue
        place = CellPlace(sheet.where, number)
        reported = merged.get(number, set())
        for column, cell in mine.items():
            if cell.wrong:
                tables.wrong(cell.wrong, place(column), cell.text or None, cell.remedy)
                reported.add(column)
        texts = {column: cell.text for column, cell in mine.items()}
        read.append(Row(number, texts, place, frozenset(reported)))
    tables.rows[name] = read
    _note_hidden(sheet, at, read, tables)
    _note_formulas(sheet, at, read, tables)


def _merged(sheet: Sheet, at: Mapping[str, int], tables: Tables) -> dict[int, set[str]]:
    """Row -> the columns that merged ranges cover in it.

    Each range is a mistake: only its first cell has a text.
    """
    numbers = list(sheet.rows)
    covered: dict[int, set[str]] = {}
    for area in sheet.merged_at(list(at.values())):
        touched = []
        for c, i in at.items():
            if area.first_column <= i <= area.last_column:
                touched.append(c)
        tables.wrong(
            "cells are merged",
            CellPlace(sheet.where, area.first_row)(touched[0]),
            area.name,
            "Unmerge them, and fill in each of them.",
        )
        first = bisect_left(numbers, area.first_row)
        for number in numbers[first : bisect_right(numbers, area.last_row)]:
            covered.setdefault(number, set()).update(touched)
    return covered


def _note_hidden(sheet: Sheet, at: Mapping[str, int], read: Sequence[Row], tables: Tables) -> None:
    columns = []
    for column, i in at.items():
        if sheet.is_hidden(i):
            columns.append(column)
    if columns:
        tables.notes.append(f"{sheet.where}: hidden columns are read too: {', '.join(columns)}")
    rows = []
    for row in read:
        if row.number in sheet.hidden_rows:
            rows.append(str(row.number))
    if rows:
        tables.notes.append(f"{sheet.where}: hidden rows are read too: {', '.join(rows)}")


def _note_formulas(
    sheet: Sheet, at: Mapping[str, int], read: Sequence[Row], tables: Tables
) -> None:
    rows = []
    for row in read:
        cells = sheet.rows[row.number]
        if any(cells.get(i, EMPTY).formula for i in at.values()):
            rows.append(str(row.number))
    if rows:
        tables.notes.append(
            f"{sheet.where}: formulas are read by their stored values: rows {', '.join(rows)}"
        )
