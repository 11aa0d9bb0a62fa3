"""The Excel knowledge base: a sheet of classes with their prompts, and a sheet of examples."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from evomerge.errors import KnowledgeError

SHEETS = {"classes": ("class", "system", "template"), "examples": ("class", "input", "output")}
PLACEHOLDER = re.compile(r"\{(input|examples)\}")


@dataclass(frozen=True)
class KnowledgeClass:
    """A kind of task: `system` may be empty, `template` holds `{input}` and perhaps `{examples}`."""

    name: str
    system: str
    template: str


@dataclass(frozen=True)
class Example:
    """A task with a good answer. `row` is its row in the sheet, as Excel shows it, and serves as its id."""

    row: int
    class_name: str
    input: str
    output: str


@dataclass(frozen=True)
class Knowledge:
    """A whole base; class names are unique, and every example is of one of the classes."""

    classes: tuple[KnowledgeClass, ...]
    examples: tuple[Example, ...]

    def __getitem__(self, name: str) -> KnowledgeClass:
        return next(c for c in self.classes if c.name == name)

    def digest(self) -> str:
        """A SHA-256 over every cell that is used."""
        return sha256(repr(asdict(self)).encode("utf-8", "surrogatepass")).hexdigest()


def render(template: str, text: str, examples: Sequence[Example]) -> str:
    """Fill a template in one pass, so that braces in the task or in an example stay text."""
    shown = "\n\n".join(f"指示: {example.input}\n回答: {example.output}" for example in examples)
    values = {"input": text, "examples": shown}
    return PLACEHOLDER.sub(lambda match: values[match[1]], template)


def read_knowledge(path: str | Path) -> Knowledge:
    """Read the sheets `classes` (class, system, template) and `examples` (class, input, output).

    The first row of a sheet names its columns, in any order; further columns and empty rows are skipped.
    Raises KnowledgeError, naming sheet, row and column: no Excel file, a missing sheet or column, an empty cell
    (only `system` may be empty), a class given twice, a template without `{input}`, an example of an unknown
    class, no classes or no examples.
    """
    path = Path(path)
    book = _open(path)
    classes: dict[str, KnowledgeClass] = {}
    for row, cells in _rows(book, "classes", path):
        name, template = (_filled(cells, column, _place(path, "classes", row, column)) for column in ("class", "template"))
        if name in classes:
            raise KnowledgeError("the class stands here twice", where=_place(path, "classes", row, "class"), found=name, remedy="Keep one.")
        if "{input}" not in template:
            raise KnowledgeError(
                "the template has no {input}",
                where=_place(path, "classes", row, "template"),
                found=template,
                remedy="Write {input} where the task's text belongs.",
            )
        classes[name] = KnowledgeClass(name, cells["system"], template)
    examples = [_example(row, cells, classes, path) for row, cells in _rows(book, "examples", path)]
    for sheet, found in (("classes", classes), ("examples", examples)):
        if not found:
            raise KnowledgeError("the sheet has no rows", where=f"{path}, sheet {sheet}", remedy=f"Add rows of {_columns(sheet)}.")
    return Knowledge(tuple(classes.values()), tuple(examples))


def _open(path: Path) -> Any:
    import openpyxl

    if not path.is_file():
        raise KnowledgeError("no such knowledge base", where=path, remedy="Name an Excel file (.xlsx).")
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # openpyxl warns of drop-down lists and the like, which do no harm
            return openpyxl.load_workbook(file, data_only=True)
    except Exception as error:  # openpyxl lets zipfile's, the XML parser's and its own errors through
        raise KnowledgeError(f"not a readable Excel file: {error}", where=path, remedy="Save it as .xlsx, without a password.") from error


def _rows(book: Any, sheet: str, path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(row as Excel counts it, column -> text) of the rows that hold something in the columns that we use."""
    titles = {title.strip().casefold(): title for title in book.sheetnames}
    if sheet not in titles or not hasattr(book[titles[sheet]], "iter_rows"):  # a sheet that is a chart has no rows
        raise KnowledgeError(
            f"has no sheet {sheet}", where=path, found=book.sheetnames, remedy=f"Add it, with the columns {_columns(sheet)}."
        )
    rows = book[titles[sheet]].iter_rows(values_only=True)
    header = [_text(cell).strip().casefold() for cell in next(rows, ())]
    for column in SHEETS[sheet]:
        if header.count(column) != 1:
            raise KnowledgeError(
                f"has {'no' if column not in header else 'more than one'} column {column}",
                where=f"{path}, sheet {sheet}, row 1",
                found=[name for name in header if name],
                remedy=f"The first row names the columns: {_columns(sheet)}.",
            )
    at = {column: header.index(column) for column in SHEETS[sheet]}
    for number, row in enumerate(rows, start=2):
        cells = {column: _text(row[i]) for column, i in at.items()}
        if any(text.strip() for text in cells.values()):
            yield number, cells | {"class": cells["class"].strip()}


def _example(row: int, cells: dict[str, str], classes: dict[str, KnowledgeClass], path: Path) -> Example:
    name, text, output = (_filled(cells, column, _place(path, "examples", row, column)) for column in SHEETS["examples"])
    if name not in classes:
        raise KnowledgeError(
            "an example of an unknown class",
            where=_place(path, "examples", row, "class"),
            found=name,
            remedy=f"Classes are: {', '.join(classes)}.",
        )
    return Example(row, name, text, output)


def _filled(cells: dict[str, str], column: str, place: str) -> str:
    if not cells[column].strip():
        raise KnowledgeError(f"{column} is empty", where=place, remedy="Fill the cell, or empty the whole row.")
    return cells[column]


def _text(cell: Any) -> str:
    """A cell as text: 12.0 reads 12, as Excel shows it; `_x000D_` is how Excel stores a carriage return."""
    if cell is None:
        return ""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    return str(cell).replace("_x000D_", "").replace("\r\n", "\n")


def _place(path: Path, sheet: str, row: int, column: str) -> str:
    return f"{path}, sheet {sheet}, row {row}, column {column}"


def _columns(sheet: str) -> str:
    return ", ".join(SHEETS[sheet])
