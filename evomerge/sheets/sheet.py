"""A sheet as texts by row and column, whatever file it was read from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from evomerge.errors import InputError

MOST_COLUMNS, MOST_ROWS = 16_384, 1_048_576  # "Excel specifications and limits"
# ECMA-376 22.9.2.19 (ST_Xstring): how characters are stored that XML cannot hold
STORED = re.compile("_x([0-9A-Fa-f]{4})_")
MOST_CELLS = 1_000_000  # that are filled, in one sheet: about half a gigabyte of memory


class Cell(NamedTuple):
    """A cell that is filled. `wrong` and `remedy` say why it is no text, as in "contains a date".

    `number` tells a number from a text of digits; `formula`: the text is a formula's stored value.
    """

    text: str
    wrong: str = ""
    remedy: str = ""
    number: bool = False
    formula: bool = False


EMPTY = Cell("")


class Area(NamedTuple):
    """A range of merged cells; rows count from 1, columns from 0, and the last ones belong to it.

    `name` is the range as a spreadsheet shows it: "A2:B3".
    """

    first_row: int
    last_row: int
    first_column: int
    last_column: int
    name: str


@dataclass
class Sheet:
    """The filled cells of a sheet, by row (from 1, in order) and column (from 0).

    `where` names file and sheet in messages.
    """

    where: str
    rows: dict[int, dict[int, Cell]] = field(default_factory=dict)
    merged: list[Area] = field(default_factory=list)
    hidden_rows: set[int] = field(default_factory=set)
    hidden_columns: list[tuple[int, int]] = field(default_factory=list)  # (first, last)

    @property
    def header_row(self) -> int:
        """The number of the first row that holds a text: it names the columns."""
        for number, cells in self.rows.items():
            if any(cell.text.strip() for cell in cells.values()):
                return number
        return 1

    @property
    def header(self) -> list[str]:
        """The columns' names in their order, without blanks around them and in lower case."""
        cells = self.rows.get(self.header_row, {})
        names = [""] * (max(cells, default=-1) + 1)
        for column, cell in cells.items():
            names[column] = heading(cell.text)
        return names

    @property
    def body(self) -> list[tuple[int, dict[int, Cell]]]:
        """The rows below the header with their numbers."""
        first = self.header_row
        return [(number, cells) for number, cells in self.rows.items() if number > first]

    def merged_at(self, columns: Sequence[int]) -> list[Area]:
        """The merged ranges that touch one of these columns and a row up to the last filled one."""
        last = max(self.rows, default=0)
        touching = []
        for area in self.merged:
            inside = any(area.first_column <= column <= area.last_column for column in columns)
            if inside and area.first_row <= last:
                touching.append(area)
        return touching

    def is_hidden(self, column: int) -> bool:
        """Whether a column is hidden."""
        return any(first <= column <= last for first, last in self.hidden_columns)


def heading(text: str) -> str:
    """A column's name as it is compared."""
    return text.strip().casefold()


def decoded(text: str) -> str:
    """A text of an .xlsx file with the characters that it stands for, and plain line breaks."""
    if "_x" in text:
        text = STORED.sub(lambda match: chr(int(match[1], 16)), text)
        # the halves of a surrogate pair are stored one by one
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
    return line_breaks(text)


def line_breaks(text: str) -> str:
    """A cell's text with plain line breaks."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def unreadable(path: Path, cause: OSError, error: type[InputError]) -> InputError:
    """The error to raise where the system does not give the file."""
    return error(
        f"cannot be read: {cause.strerror or cause}", where=path, remedy="Check its permissions."
    )
