"""From rows to one frozen base; every mistake is said, not only the first."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter

from evomerge.knowledge.formats.tables import REQUIRED, Row, Tables, columns
from evomerge.knowledge.records import Document, Example, Knowledge, KnowledgeClass

# column -> (lowest value, may it be that value, is it a whole number)
NUMBERS = {
    "max_new_tokens": (1, True, True),
    "temperature": (0, True, False),
    "repetition_penalty": (0, False, False),
    "examples": (0, True, True),
    "documents": (0, True, True),
    "weight": (0, False, False),
}
MAY_BE_EMPTY = ("system",)


def assemble(tables: Tables) -> Knowledge | None:
    """The base, or None where there are mistakes; they are added to those of the reading."""
    # of those, all is said
    rows = {sheet: [] if sheet in tables.missing else found for sheet, found in tables.rows.items()}
    classes = _classes(tables)
    examples = [
        example
        for row in rows.get("examples", [])
        if (example := _example(row, classes, tables)) is not None
    ]
    documents = [
        document
        for row in rows.get("documents", [])
        if (document := _document(row, tables)) is not None
    ]
    for sheet in ("classes", "examples"):
        if sheet not in tables.missing and not tables.rows.get(sheet):
            tables.wrong(
                "the sheet has no rows",
                f"{tables.path}, sheet {sheet}",
                None,
                f"Add rows of {columns(sheet)}.",
            )
    if tables.rows.get("examples") and "examples" not in tables.missing:
        _check_all_have_examples(tables, classes)
    _note_doubles(tables, examples)
    _note_unquoted(tables, classes)
    if tables.mistakes:
        return None
    return Knowledge(
        tuple(found for _, found in classes.values()), tuple(examples), tuple(documents)
    )


def _classes(tables: Tables) -> dict[str, tuple[Row, KnowledgeClass]]:
    classes: dict[str, tuple[Row, KnowledgeClass]] = {}
    for row in tables.rows.get("classes", []):
        if "classes" not in tables.missing:
            _check_filled(row, "classes", tables)
        name, template = row.cells.get("class", "").strip(), row.cells.get("template", "")
        if name in classes:
            first = classes[name][0].number
            tables.wrong(
                f"the class stands here twice, first in row {first}",
                row.place("class"),
                name,
                "Keep one.",
            )
        if template.strip() and "{input}" not in template:
            tables.wrong(
                "the template has no {input}",
                row.place("template"),
                template,
                "Write {input} where the task's text belongs.",
            )
        settings = {
            column: _number(row, column, tables)
            for column in ("max_new_tokens", "examples", "documents")
        }
        scales = {
            column: _number(row, column, tables) for column in ("temperature", "repetition_penalty")
        }
        if name:
            whole = {
                column: None if value is None else int(value) for column, value in settings.items()
            }
            found = KnowledgeClass(
                name,
                row.cells.get("system", ""),
                template,
                row.cells.get("description", ""),
                whole["max_new_tokens"],
                scales["temperature"],
                scales["repetition_penalty"],
                whole["examples"],
                whole["documents"],
            )
            classes.setdefault(name, (row, found))
    return classes


def _example(
    row: Row, classes: dict[str, tuple[Row, KnowledgeClass]], tables: Tables
) -> Example | None:
    filled = _check_filled(row, "examples", tables)
    weight = _number(row, "weight", tables)
    name = row.cells.get("class", "").strip()
    if name and name not in classes and classes and "classes" not in tables.missing:
        tables.wrong(
            "an example of an unknown class",
            row.place("class"),
            name,
            f"Classes are: {', '.join(classes)}.",
        )
    if not filled:
        return None
    return Example(
        row.number, name, row.cells["input"], row.cells["output"], 1.0 if weight is None else weight
    )


def _document(row: Row, tables: Tables) -> Document | None:
    return (
        Document(row.number, row.cells["title"], row.cells["text"])
        if _check_filled(row, "documents", tables)
        else None
    )


def _check_filled(row: Row, sheet: str, tables: Tables) -> bool:
    good = True
    for column, text in row.cells.items():
        wrong = _unwritable(text)
        if wrong and column not in row.said:
            tables.wrong(
                "the text holds half of a surrogate pair",
                row.place(column),
                wrong,
                "Write the character whole.",
            )
            good = False
    for column in REQUIRED[sheet]:
        if column in row.said:
            good = False
        elif column not in MAY_BE_EMPTY and not row.cells.get(column, "").strip():
            tables.wrong(
                f"{column} is empty",
                row.place(column),
                None,
                "Fill the cell, or empty the whole row.",
            )
            good = False
    return good


def _number(row: Row, column: str, tables: Tables) -> float | None:
    """A setting; full-width digits count. None: the cell is empty, or a mistake that is said."""
    text = unicodedata.normalize("NFKC", row.cells.get(column, "")).strip()
    if not text or column in row.said:
        return None
    lowest, itself, whole = NUMBERS[column]
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if (
        math.isfinite(value)
        and (value > lowest or (itself and value == lowest))
        and not (whole and value != int(value))
    ):
        return value
    wanted = f"a{' whole' if whole else ''} number {f'of {lowest} or more' if itself else f'above {lowest}'}"
    tables.wrong(
        f"{column} is not {wanted}",
        row.place(column),
        row.cells[column],
        "Write such a number, or empty the cell.",
    )
    return None


def _check_all_have_examples(
    tables: Tables, classes: dict[str, tuple[Row, KnowledgeClass]]
) -> None:
    """A class without examples is never near any task; only one that says so is meant to be."""
    used = {row.cells.get("class", "").strip() for row in tables.rows["examples"]}
    for name, (row, found) in classes.items():
        if name not in used and found.shots != 0:
            tables.wrong(
                "the class has no examples",
                row.place("class"),
                name,
                "Add some, or write 0 in its column examples.",
            )


def _note_doubles(tables: Tables, examples: list[Example]) -> None:
    times = Counter((e.class_name, e.input.strip()) for e in examples)
    for (name, text), count in times.items():
        if count > 1:
            rows = [str(e.row) for e in examples if (e.class_name, e.input.strip()) == (name, text)]
            tables.notes.append(
                f"{tables.path}, sheet examples: the same input in rows {', '.join(rows)} of class {name}"
            )


def _note_unquoted(tables: Tables, classes: dict[str, tuple[Row, KnowledgeClass]]) -> None:
    """Documents that no template asks for are most likely meant to be asked for."""
    if (
        tables.rows.get("documents")
        and classes
        and not any("{documents}" in found.template for _, found in classes.values())
    ):
        tables.notes.append(
            f"{tables.path}: no template says {{documents}}, so no document is quoted"
        )


def _unwritable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return text[error.start : error.end]
    return ""
