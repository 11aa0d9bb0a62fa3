"""The columns of a base, and the rows that every file format is read into."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from evomerge.errors import KnowledgeError

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
    return {column: names.index(column) for column in known if column in names}
