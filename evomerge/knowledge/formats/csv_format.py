"""Reads CSV exports: a folder of one file for each sheet, or one file of examples."""

from __future__ import annotations

import re
from pathlib import Path

from evomerge.errors import KnowledgeError
from evomerge.knowledge.formats.tables import (
    OPTIONAL,
    REQUIRED,
    Row,
    Tables,
    fill,
    no_such_base,
)
from evomerge.sheets.delimited import read_delimited

TEMPLATE = "{input}"  # the template of a class that is known only by its examples
# SHEET.csv, or as spreadsheets name an export: FILE - SHEET.csv (Google), FILE-SHEET.csv
# (LibreOffice), with a number where the browser had such a file already
EXPORT = re.compile(r"\A.*-\s*+(?P<sheet>\w++)(?: ?\(\d++\))?\.[ct]sv", re.DOTALL)


def read_csv(path: Path, tables: Tables) -> None:
    """Fill `tables`. Without a file of classes, the classes are those that the examples name."""
    if path.is_file():
        _read_sheet(path, "examples", tables)
    elif path.is_dir():
        files = _files_of_sheets(path, tables)
        for sheet, file in files.items():
            _read_sheet(file, sheet, tables)
        if "classes" in files:
            return
    else:
        raise no_such_base(path)
    _classes_of_examples(tables)


def _files_of_sheets(folder: Path, tables: Tables) -> dict[str, Path]:
    """Sheet -> its file. Raises KnowledgeError: no examples, or two exports of a sheet.

    A file that is named after the sheet alone comes first.
    """
    names = {entry.name.casefold(): entry for entry in sorted(folder.iterdir())}
    exports: dict[str, list[Path]] = {sheet: [] for sheet in REQUIRED}
    for name, entry in names.items():
        found = EXPORT.fullmatch(name)
        if found and found["sheet"] in exports:
            exports[found["sheet"]].append(entry)
    files: dict[str, Path] = {}
    for sheet, others in exports.items():
        plain = names.get(f"{sheet}.csv", names.get(f"{sheet}.tsv"))
        if plain is not None:
            files[sheet] = plain
            tables.notes += [f"{entry}: is not read, beside {plain.name}" for entry in others]
        elif len(others) > 1:
            raise KnowledgeError(
                f"the folder has more than one file of {sheet}",
                where=folder,
                found=[entry.name for entry in others],
                remedy="Keep the exports of one spreadsheet.",
            )
        elif others:
            files[sheet] = others[0]
    if "examples" not in files:
        raise KnowledgeError(
            "the folder has no examples.csv",
            where=folder,
            found=sorted(entry.name for entry in folder.glob("*.csv")) or None,
            remedy="Export each sheet under its name.",
        )
    return files


def _read_sheet(path: Path, sheet: str, tables: Tables) -> None:
    known = (*REQUIRED[sheet], *OPTIONAL[sheet])
    fill(tables, sheet, read_delimited(path, known, KnowledgeError))


def _classes_of_examples(tables: Tables) -> None:
    first: dict[str, Row] = {}
    for row in tables.rows["examples"]:
        name = row.cells.get("class", "").strip()
        if name:
            first.setdefault(name, row)
    classes = []
    for name, row in first.items():
        cells = {"class": name, "system": "", "template": TEMPLATE}
        classes.append(Row(row.number, cells, row.place))
    tables.rows["classes"] = classes
    if "examples" in tables.missing or not first:
        tables.missing.add("classes")
    else:
        tables.notes.append(
            f"{tables.path}: no classes.csv: the classes of the examples get a plain template"
        )
