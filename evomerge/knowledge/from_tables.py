"""From the rows of a file to a frozen base; every mistake is reported, not only the first."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from evomerge.knowledge.formats.tables import REQUIRED, Row, Tables, columns
from evomerge.knowledge.records import Document, Example, Knowledge, KnowledgeClass


@dataclass(frozen=True)
class NumberRule:
    """What a setting may be: `least` to `most`, or with `above` only more than `least`.

    A number other than 0 is at least `finest`, as in `generation:` of a study file.
    """

    least: int
    most: int = 1000
    above: bool = False
    whole: bool = False
    finest: float = 0.001

    def allows(self, value: float) -> bool:
        """Whether a value keeps the rule; NaN and infinity never do."""
        if not math.isfinite(value) or (self.whole and value != int(value)):
            return False
        if not self.least <= value <= self.most or (self.above and value == self.least):
            return False
        return value == 0 or value >= self.finest

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        least = f"above {self.least}" if self.above else f"of {self.least} or more"
        return f"{kind} {least}, at most {self.most}"


NUMBERS = {
    "max_new_tokens": NumberRule(1, 10**7, whole=True),
    "temperature": NumberRule(0),
    "repetition_penalty": NumberRule(0, above=True),
    "examples": NumberRule(0, 10**6, whole=True),
    "documents": NumberRule(0, 10**6, whole=True),
    "weight": NumberRule(0, 10**6, above=True, finest=1e-6),
}
MAY_BE_EMPTY = ("system",)

Classes = dict[str, tuple[Row, KnowledgeClass]]


def knowledge_from(tables: Tables) -> Knowledge | None:
    """The base, or None where there are mistakes, which are added to those of the reading."""
    classes = _classes(tables)
    examples = []
    for row in _usable(tables, "examples"):
        example = _example(row, classes, tables)
        if example is not None:
            examples.append(example)
    documents = []
    for row in _usable(tables, "documents"):
        if _check_filled(row, "documents", tables):
            documents.append(Document(row.number, row.cells["title"], row.cells["text"]))
    for sheet in ("classes", "examples"):
        if sheet not in tables.missing and not tables.rows.get(sheet):
            tables.wrong(
                "the sheet has no rows",
                f"{tables.path}, sheet {sheet}",
                None,
                f"Add rows of {columns(sheet)}.",
            )
    if _usable(tables, "examples"):
        _check_all_have_examples(tables, classes)
    _note_doubles(tables, examples)
    _note_unquoted(tables, classes)
    if tables.mistakes:
        return None
    return Knowledge(
        tuple(found for _, found in classes.values()), tuple(examples), tuple(documents)
    )


def _usable(tables: Tables, sheet: str) -> Sequence[Row]:
    """The rows of a sheet; none of one that is already reported as missing or unreadable."""
    return () if sheet in tables.missing else tables.rows.get(sheet, ())


def _classes(tables: Tables) -> Classes:
    classes: Classes = {}
    for row in tables.rows.get("classes", []):
        if "classes" not in tables.missing:
            _check_filled(row, "classes", tables)
        name = row.cells.get("class", "").strip()
        template = row.cells.get("template", "")
        if name in classes:
            tables.wrong(
                f"the class is defined twice, first in row {classes[name][0].number}",
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
        found = KnowledgeClass(
            name=name,
            system=row.cells.get("system", ""),
            template=template,
            description=row.cells.get("description", ""),
            max_new_tokens=_whole_number(row, "max_new_tokens", tables),
            shots=_whole_number(row, "examples", tables),
            quotes=_whole_number(row, "documents", tables),
            temperature=_number(row, "temperature", tables),
            repetition_penalty=_number(row, "repetition_penalty", tables),
        )
        if name:
            classes.setdefault(name, (row, found))
    return classes


def _example(row: Row, classes: Classes, tables: Tables) -> Example | None:
    filled = _check_filled(row, "examples", tables)
    weight = _number(row, "weight", tables)
    name = row.cells.get("class", "").strip()
    if name and name not in classes and classes and "classes" not in tables.missing:
        tables.wrong(
            "an example of an unknown class",
            row.place("class"),
            name,
            f"Use one of: {', '.join(classes)}.",
        )
    if not filled:
        return None
    if weight is None:
        weight = 1.0
    return Example(row.number, name, row.cells["input"], row.cells["output"], weight)


def _check_filled(row: Row, sheet: str, tables: Tables) -> bool:
    """Whether a row's texts can be written as UTF-8 and its required cells are filled."""
    good = True
    for column, text in row.cells.items():
        wrong = _half_pair(text)
        if wrong and column not in row.reported:
            tables.wrong(
                "the text contains half of a surrogate pair",
                row.place(column),
                wrong,
                "Write the whole character.",
            )
            good = False
    for column in REQUIRED[sheet]:
        if column in row.reported:
            good = False
        elif column not in MAY_BE_EMPTY and not row.cells.get(column, "").strip():
            tables.wrong(
                f"{column} is empty",
                row.place(column),
                None,
                "Fill in the cell, or clear the whole row.",
            )
            good = False
    return good


def _number(row: Row, column: str, tables: Tables) -> float | None:
    """A setting; full-width digits count. None: an empty cell, or a mistake that is reported."""
    text = unicodedata.normalize("NFKC", row.cells.get(column, "")).strip()
    if not text or column in row.reported:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    rule = NUMBERS[column]
    if rule.allows(value):
        return value
    tables.wrong(
        f"{column} is not {rule}",
        row.place(column),
        row.cells[column],
        "Enter such a number, or clear the cell.",
    )
    return None


def _whole_number(row: Row, column: str, tables: Tables) -> int | None:
    value = _number(row, column, tables)
    if value is None:
        return None
    return int(value)


def _check_all_have_examples(tables: Tables, classes: Classes) -> None:
    """A class without examples is never near any task; only one with 0 examples means that."""
    used = {row.cells.get("class", "").strip() for row in tables.rows["examples"]}
    for name, (row, found) in classes.items():
        if name not in used and found.shots != 0:
            tables.wrong(
                "the class has no examples",
                row.place("class"),
                name,
                "Add some, or enter 0 in its column examples.",
            )


def _note_doubles(tables: Tables, examples: Sequence[Example]) -> None:
    rows: dict[tuple[str, str], list[str]] = {}
    for example in examples:
        key = (example.class_name, example.input.strip())
        rows.setdefault(key, []).append(str(example.row))
    for (name, _), numbers in rows.items():
        if len(numbers) > 1:
            tables.notes.append(
                f"{tables.path}, sheet examples: the same input in rows {', '.join(numbers)} "
                f"of class {name}"
            )


def _note_unquoted(tables: Tables, classes: Classes) -> None:
    """Documents that no template quotes are most likely meant to be quoted."""
    if not tables.rows.get("documents") or not classes:
        return
    if not any("{documents}" in found.template for _, found in classes.values()):
        tables.notes.append(
            f"{tables.path}: no template contains {{documents}}, so no document is quoted"
        )


def _half_pair(text: str) -> str:
    """The first half of a surrogate pair in a text, or an empty text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return text[error.start : error.end]
    return ""
