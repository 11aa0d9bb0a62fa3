"""The columns of a base, and its rows as every kind of file hands them over: texts by column, each
with its place.
"""

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
    """A row that holds something. `place` names one of its columns in a message; a mistake in
    `said` columns is known already.
    """

    number: int
    cells: Mapping[str, str]
    place: Callable[[str], str]
    said: frozenset[str] = frozenset()


@dataclass
class Tables:
    """A base as it was read: sheet -> rows, the mistakes so far, and what is no mistake but good to
    know.

    `missing` holds the sheets that are said to be missing or unreadable; no more is said of their
    rows.
    """

    path: Path
    rows: dict[str, list[Row]] = field(default_factory=dict)
    mistakes: list[KnowledgeError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing: set[str] = field(default_factory=set)

    def wrong(
        self, what: str, where: object, found: object = None, remedy: str | None = None
    ) -> None:
        self.mistakes.append(KnowledgeError(what, where=where, found=found, remedy=remedy))


def columns(sheet: str) -> str:
    """The names of a sheet's columns, for a message."""
    more = f"; may have {', '.join(OPTIONAL[sheet])}" if OPTIONAL[sheet] else ""
    return ", ".join(REQUIRED[sheet]) + more


def find_columns(
    sheet: str, header: Sequence[str], where: str, tables: Tables, implied: Sequence[str] = ()
) -> dict[str, int]:
    """Column -> index in the header, in whatever order they stand; says what is missing, double, or
    nearly a column's name.
    """
    names = [name.strip().casefold() for name in header]
    known = (*REQUIRED[sheet], *OPTIONAL[sheet])
    absent = [column for column in known if column not in names]
    for column in known:
        if names.count(column) > 1 or (
            column in absent and column in REQUIRED[sheet] and column not in implied
        ):
            tables.wrong(
                f"has {'no' if column in absent else 'more than one'} column {column}",
                where,
                [name for name in names if name],
                f"The first row names the columns: {columns(sheet)}.",
            )
            tables.missing.add(sheet)
    for name in filter(None, names):
        if name in known:
            continue
        near = difflib.get_close_matches(
            name, [column for column in absent if column in OPTIONAL[sheet]], n=1, cutoff=0.75
        )
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
