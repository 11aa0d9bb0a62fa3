"""Reads the Excel form of a base."""

from __future__ import annotations

import re
import warnings
from datetime import date, time, timedelta
from pathlib import Path
from typing import Any

from evomerge.errors import KnowledgeError
from evomerge.knowledge.formats.tables import (
    REQUIRED,
    CellPlace,
    Row,
    Tables,
    columns,
    find_columns,
)

# [MS-CFB] 2.2: what an encrypted .xlsx and an old .xls begin with
OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
# [MS-OFFCRYPTO] 2.3.4.4: the stream of an encrypted package
ENCRYPTED = "EncryptedPackage".encode("utf-16-le")
# ECMA-376 22.9.2.19 (ST_Xstring): how control characters are stored, and such a _
STORED = re.compile(r"_x00([01][0-9A-Fa-f]|5F)_")


def read_excel(path: Path, tables: Tables) -> None:
    """Fill `tables` from the sheets `classes`, `examples` and, if any, `documents`; no others."""
    book = _workbook(path)
    titles = {title.strip().casefold(): title for title in book.sheetnames}
    for sheet in REQUIRED:
        found: Any = book[titles[sheet]] if sheet in titles else None
        if found is None and sheet == "documents":
            continue
        if not hasattr(found, "iter_rows"):  # missing, or a chart, which has no rows
            tables.wrong(
                f"has no sheet {sheet}",
                path,
                book.sheetnames,
                f"Add it, with the columns {columns(sheet)}.",
            )
            tables.missing.add(sheet)
        elif found.sheet_state != "visible":
            tables.wrong(
                "the sheet is hidden",
                f"{path}, sheet {sheet}",
                None,
                "Unhide it, so that everything that is used is visible, or rename it.",
            )
            tables.missing.add(sheet)
        else:
            _read_sheet(found, sheet, f"{path}, sheet {sheet}", tables)


def _workbook(path: Path) -> Any:
    import openpyxl

    with path.open("rb") as file:
        head = file.read(8)
        if head == OLE:
            raise _unsupported(path, locked=ENCRYPTED in head + file.read())
        file.seek(0)
        try:
            with warnings.catch_warnings():
                # openpyxl warns about drop-down lists and the like, which are harmless
                warnings.simplefilter("ignore", UserWarning)
                return openpyxl.load_workbook(file)
        except Exception as error:
            # openpyxl passes on zipfile's and the XML parser's errors, and raises its own
            raise KnowledgeError(
                f"not a readable Excel file: {error}",
                where=path,
                remedy="Save it as .xlsx, without a password.",
            ) from error


def _unsupported(path: Path, locked: bool) -> KnowledgeError:
    if locked:
        return KnowledgeError(
            "is protected by a password",
            where=path,
            remedy="Open it in Excel and save it as .xlsx, without a password.",
        )
    return KnowledgeError(
        "is an Excel file from before 2007",
        where=path,
        remedy="Open it in Excel and save it as .xlsx.",
    )


def _read_sheet(found: Any, sheet: str, where: str, tables: Tables) -> None:
    rows = found.iter_rows()
    header = [_text(cell.value) for cell in next(rows, ())]
    at = find_columns(sheet, header, f"{where}, row 1", tables)
    merged = _merged(found, at, where, tables)
    read: list[Row] = []
    hidden_rows: list[str] = []
    for number, cells in enumerate(rows, start=2):
        mine = {column: cells[i] for column, i in at.items()}
        texts = {column: _text(cell.value) for column, cell in mine.items()}
        covered = {column for column, i in at.items() if (number, i + 1) in merged}
        if not any(text.strip() for text in texts.values()) and not covered:
            continue
        place = CellPlace(where, number)
        for column, cell in mine.items():
            wrong = _not_text(cell)
            if wrong:
                tables.wrong(wrong[0], place(column), texts[column], wrong[1])
                covered.add(column)
        if number in found.row_dimensions and found.row_dimensions[number].hidden:
            hidden_rows.append(str(number))
        read.append(Row(number, texts, place, frozenset(covered)))
    tables.rows[sheet] = read
    hidden_columns = [column for column, i in at.items() if _is_hidden(found, i + 1)]
    if hidden_columns:
        tables.notes.append(f"{where}: hidden columns are read too: {', '.join(hidden_columns)}")
    if hidden_rows:
        tables.notes.append(f"{where}: hidden rows are read too: {', '.join(hidden_rows)}")


def _is_hidden(found: Any, column: int) -> bool:
    return any(
        group.hidden and (group.min or 0) <= column <= (group.max or 0)
        for group in found.column_dimensions.values()
    )


def _merged(found: Any, at: dict[str, int], where: str, tables: Tables) -> set[tuple[int, int]]:
    """(row, column) of all cells in merged ranges that touch what is read.

    Each range is a mistake: only its first cell has a text.
    """
    cells: set[tuple[int, int]] = set()
    for area in found.merged_cells.ranges:
        touched = [column for column, i in at.items() if area.min_col <= i + 1 <= area.max_col]
        if not touched or area.min_row > found.max_row:
            continue
        place = CellPlace(where, area.min_row)
        tables.wrong(
            "cells are merged",
            place(touched[0]),
            area.coord,
            "Unmerge them, and fill in each of them.",
        )
        last = min(area.max_row, found.max_row)
        for row in range(area.min_row, last + 1):
            cells |= {(row, at[column] + 1) for column in touched}
    return cells


def _not_text(cell: Any) -> tuple[str, str] | None:
    """The mistake in a cell that contains neither text nor a number: (what, remedy)."""
    if cell.data_type == "f":
        return "contains a formula", "Paste its value instead, or format the cell as text."
    if cell.data_type == "e":
        return "contains an error value", "Replace it with text."
    if isinstance(cell.value, date | time | timedelta):
        return (
            "contains a date or time, which Excel stores as a number",
            "Format the cell as text and write it again.",
        )
    return None


def _text(value: Any) -> str:
    """A cell as text: 12.0 reads 12, and True TRUE, as Excel shows them."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = getattr(value, "text", None) or value  # an array formula
    text = STORED.sub(lambda match: chr(int(match[1], 16)), str(text))
    return text.replace("\r\n", "\n").replace("\r", "")
