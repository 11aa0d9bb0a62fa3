"""Reads the Excel form of a base."""

from __future__ import annotations

from pathlib import Path

from evomerge.errors import KnowledgeError
from evomerge.knowledge.formats.tables import REQUIRED, Tables, columns, fill
from evomerge.sheets.sheet import heading
from evomerge.sheets.xlsx import open_workbook


def read_excel(path: Path, tables: Tables) -> None:
    """Fill `tables` from the sheets `classes`, `examples` and, if any, `documents`; no others."""
    with open_workbook(path, KnowledgeError) as book:
        named = {heading(sheet.title): sheet for sheet in book.sheets}
        for name in REQUIRED:
            sheet = named.get(name)
            if sheet is None and name == "documents":
                continue
            if sheet is None or not sheet.part:
                tables.wrong(
                    f"has no sheet {name}",
                    path,
                    [sheet.title for sheet in book.sheets],
                    f"Add it, with the columns {columns(name)}.",
                )
                tables.missing.add(name)
            elif not sheet.visible:
                tables.wrong(
                    "the sheet is hidden",
                    f"{path}, sheet {name}",
                    None,
                    "Unhide it, so that everything that is used is visible, or rename it.",
                )
                tables.missing.add(name)
            else:
                fill(tables, name, book.read(sheet))
