"""Reads CSV exports: a folder of one file for each sheet, or one file of examples."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from evomerge.errors import KnowledgeError
from evomerge.knowledge.formats.tables import (
    REQUIRED,
    CellPlace,
    Row,
    Tables,
    find_columns,
    no_such_base,
)

TEMPLATE = "{input}"  # the template of a class that is known only by its examples
ENCODINGS = ("utf-8-sig", "cp932")  # Excel's "CSV UTF-8", and its plain "CSV" on a Japanese Windows
LONGEST = 10_000_000  # characters of a field: csv's own limit is shorter than a document


def read_csv(path: Path, tables: Tables) -> None:
    """Fill `tables`. Without a classes.csv, the classes are those that the examples name."""
    if path.is_dir():
        files = {entry.name.casefold(): entry for entry in sorted(path.iterdir())}
        for sheet in REQUIRED:
            if f"{sheet}.csv" in files:
                _read_sheet(files[f"{sheet}.csv"], sheet, tables)
            elif sheet == "examples":
                raise KnowledgeError(
                    "the folder has no examples.csv",
                    where=path,
                    remedy="Export each sheet under its name.",
                )
        if "classes.csv" in files:
            return
    elif path.is_file():
        _read_sheet(path, "examples", tables)
    else:
        raise no_such_base(path)
    _classes_of_examples(tables)


def _classes_of_examples(tables: Tables) -> None:
    first: dict[str, Row] = {}
    for row in tables.rows["examples"]:
        name = row.cells.get("class", "").strip()
        if name:
            first.setdefault(name, row)
    tables.rows["classes"] = [
        Row(row.number, {"class": name, "system": "", "template": TEMPLATE}, row.place)
        for name, row in first.items()
    ]
    if "examples" in tables.missing or not first:
        tables.missing.add("classes")
    else:
        tables.notes.append(
            f"{tables.path}: no classes.csv: the classes of the examples get a plain template"
        )


def _read_sheet(path: Path, sheet: str, tables: Tables) -> None:
    text = _decode(path)
    first = text.partition("\n")[0]
    delimiter = max(",\t;", key=first.count)  # Excel writes ; where the comma is the decimal sign
    csv.field_size_limit(LONGEST)
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    except csv.Error as error:
        raise KnowledgeError(
            f"not a readable CSV file: {error}",
            where=path,
            remedy="Save it again from the spreadsheet.",
        ) from error
    header = rows[0] if rows else []
    at = find_columns(sheet, header, f"{path}, row 1", tables)
    read: list[Row] = []
    for number, row in enumerate(rows[1:], start=2):
        cells = {column: _cell(row, i) for column, i in at.items()}
        if any(cell.strip() for cell in cells.values()):
            read.append(Row(number, cells, CellPlace(str(path), number)))
    tables.rows[sheet] = read


def _cell(row: list[str], i: int) -> str:
    """Cell i of a row that may be too short, with plain line breaks."""
    if i >= len(row):
        return ""
    return row[i].replace("\r\n", "\n").replace("\r", "\n")


def _decode(path: Path) -> str:
    data = path.read_bytes()
    errors: list[UnicodeDecodeError] = []
    for encoding in ENCODINGS:
        try:
            return data.decode(encoding)
        except UnicodeDecodeError as error:
            errors.append(error)
    wrong = max(errors, key=lambda error: error.start)  # the mistake of the most likely encoding
    line = data.count(b"\n", 0, wrong.start) + 1
    raise KnowledgeError(
        "is neither UTF-8 nor Windows-31J",
        where=f"{path}, line {line}",
        found=data[wrong.start : wrong.start + 4],
        remedy="Save it as CSV UTF-8.",
    )
