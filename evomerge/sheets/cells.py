"""The cells of one sheet of an .xlsx file, from the events of an XML parser."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence

from evomerge.sheets.sheet import MOST_CELLS, MOST_COLUMNS, MOST_ROWS, Area, Cell, Sheet, decoded

PLACE = re.compile(r"\$?([A-Z]{1,3})\$?([0-9]{1,7})")
PLAIN = re.compile(r"-?[0-9]{1,21}")
MOST_AREAS = 100_000
TRUE = ("1", "true")
FORMULA = (
    "contains a formula without a stored value",
    "Paste its value instead, or format the cell as text.",
)
ERROR = ("contains an error value", "Replace it with text.")
DATE = (
    "contains a date or time, which Excel stores as a number",
    "Format the cell as text and write it again.",
)


class CellReader:
    """Fills a sheet; `start`, `end` and `text` are the handlers of the parser.

    `strings` are the texts that sheets share, `dates` the cell formats that show dates.
    """

    def __init__(self, into: Sheet, strings: Sequence[str], dates: Collection[int]) -> None:
        self._into = into
        self._strings = strings
        self._dates = dates
        self._row = 0
        # the last place that was named in this row, and the cells without a place since then
        self._named, self._unnamed = "", 0
        self._cells: dict[int, Cell] = {}
        self._count = 0
        self._attributes: dict[str, str] = {}
        self._kept: list[str] | None = None  # where texts go that count
        self._value: list[str] = []
        self._has_value = self._has_formula = self._is_spoken = False

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        """An element begins."""
        if tag == "c":
            self._attributes = attributes
            self._value = []
            self._has_value = self._has_formula = False
            self._named = attributes.get("r", self._named)
            self._unnamed = 0 if "r" in attributes else self._unnamed + 1
        elif tag == "v" or (tag == "t" and not self._is_spoken):
            self._kept = self._value
            self._has_value = True
        elif tag == "f":
            self._has_formula = True
        elif tag == "row":
            self._begin_row(attributes)
        elif tag == "rPh":  # how the text is read aloud
            self._is_spoken = True
        elif tag == "col":
            if attributes.get("hidden") in TRUE:
                columns = int(attributes["min"]) - 1, int(attributes["max"]) - 1
                self._into.hidden_columns.append(columns)
        elif tag == "mergeCell":
            self._merge(attributes["ref"])

    def end(self, tag: str) -> None:
        """An element ends."""
        if tag == "c":
            if self._has_value or self._has_formula:
                self._end_cell()
        elif tag in ("v", "t"):
            self._kept = None
        elif tag == "rPh":
            self._is_spoken = False

    def text(self, data: str) -> None:
        """A piece of text."""
        if self._kept is not None:
            self._kept.append(data)

    def _begin_row(self, attributes: dict[str, str]) -> None:
        self._row = int(attributes["r"]) if "r" in attributes else self._row + 1
        if not 1 <= self._row <= MOST_ROWS:
            raise ValueError(f"it has a row {self._row}")
        self._named, self._unnamed = "", 0
        self._cells = {}
        if attributes.get("hidden") in TRUE:
            self._into.hidden_rows.add(self._row)

    def _end_cell(self) -> None:
        cell = self._cell("".join(self._value))
        if not cell.text and not cell.wrong:
            return
        if not self._cells:  # the row's first filled cell
            self._cells = self._into.rows.setdefault(self._row, self._cells)
        before = _place(self._named)[1] if self._named else -1
        self._cells[before + self._unnamed] = cell
        self._count += 1
        if self._count > MOST_CELLS:
            raise ValueError(f"it has more than {MOST_CELLS:,} filled cells in a sheet")

    def _cell(self, value: str) -> Cell:
        kind = self._attributes.get("t", "n")
        if kind == "s":
            return Cell(self._strings[int(value)], formula=self._has_formula)
        if kind in ("str", "inlineStr"):
            return Cell(decoded(value), formula=self._has_formula)
        if kind == "e":
            return Cell(value, *ERROR)
        if not value.strip():
            return Cell("", *FORMULA) if self._has_formula else Cell("")
        if kind == "b":
            return Cell("TRUE" if value.strip() in TRUE else "FALSE", formula=self._has_formula)
        if kind == "d" or int(self._attributes.get("s", 0)) in self._dates:
            return Cell(value, *DATE)
        return Cell(shown_number(value), number=True, formula=self._has_formula)

    def _merge(self, name: str) -> None:
        if len(self._into.merged) >= MOST_AREAS:
            raise ValueError(f"it has more than {MOST_AREAS:,} merged ranges in a sheet")
        first, _, last = name.partition(":")
        one, other = _place(first), _place(last or first)
        self._into.merged.append(Area(one[0], other[0], one[1], other[1], name))


def shown_number(stored: str) -> str:
    """A stored number as Excel shows it: 12.0 reads 12, and at most 15 digits count."""
    stored = stored.strip()
    if PLAIN.fullmatch(stored):
        return str(int(stored))
    number = float(stored)
    if not math.isfinite(number):
        return stored
    if number.is_integer() and abs(number) < 1e21:
        return str(int(number))
    return format(number, ".15g")


def _place(name: str) -> tuple[int, int]:
    """(row from 1, column from 0) of a cell's name such as B3."""
    found = PLACE.fullmatch(name)
    if found is None:
        raise ValueError(f"it has a cell {name[:20]!r}")
    column = 0
    for letter in found[1]:
        column = column * 26 + ord(letter) - 64
    if column > MOST_COLUMNS:
        raise ValueError(f"it has a column {found[1]}")
    return int(found[2]), column - 1
