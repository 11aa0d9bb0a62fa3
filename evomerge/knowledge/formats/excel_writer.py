"""Writes the Excel form of a base, with column notes, widths, drop-down lists and checks."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.errors import KnowledgeError
from evomerge.files import replace_file
from evomerge.knowledge.formats.tables import OPTIONAL, REQUIRED
from evomerge.knowledge.records import Knowledge, KnowledgeClass
from evomerge.sheets.delimited import runs_in_spreadsheet

LONGEST = 32767  # UTF-16 units of an Excel cell ("Excel specifications and limits")
# ECMA-376 22.9.2.19: what looks like a stored character is escaped itself
STORED = re.compile(r"_(?=x[0-9A-Fa-f]{4}_)")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\ufffe\uffff]")
ROOM = 500  # rows below the last that drop-down lists and number checks reach
# height of a line in points, lines of the tallest row: not every program fits rows to their texts
LINE, TALLEST = 17.0, 12

Values = Sequence[str | float | None]


@dataclass(frozen=True)
class Column:
    """How a column is shown: its width in characters, and the note on its header."""

    width: int
    note: str


COLUMNS = {
    "classes": {
        "class": Column(
            12,
            "Name of the kind of task. The sheet examples refers to it.\n課題の種類の名前。",
        ),
        "description": Column(
            32,
            "What belongs to the class, in one sentence. May be empty.\n"
            "この種類に入る課題の説明。空でもよい。",
        ),
        "system": Column(36, "Text of the system turn. May be empty.\nシステム文。空でもよい。"),
        "template": Column(
            56,
            "The prompt. {input}: the task (required). {documents}: quoted documents. {examples}: "
            "the nearest examples as text; without it they are turns of the chat before the "
            "task.\n"
            "{input} は必須。{documents} は引用文書、{examples} は手本に置き換わる。"
            "{examples} がなければ、手本は課題の前の対話になる。",
        ),
        "max_new_tokens": Column(
            16,
            "Longest answer in tokens, 1 or more. Empty: the run's setting.\n"
            "回答の最大トークン数。空なら実行時の値。",
        ),
        "temperature": Column(
            13,
            "0: always the likeliest word. Empty: the run's setting.\n"
            "0 で毎回同じ回答。空なら実行時の値。",
        ),
        "repetition_penalty": Column(
            18,
            "Above 0; 1 changes nothing. Empty: the run's setting.\n"
            "1 で変化なし。空なら実行時の値。",
        ),
        "examples": Column(
            11,
            "How many examples the prompt shows, 0 or more. Empty: 3. A class without examples "
            "must say 0.\nプロンプトに入れる手本の数。空なら 3。手本のない種類は 0。",
        ),
        "documents": Column(
            12,
            "How many documents {documents} quotes, nearest first. Empty: 3.\n"
            "{documents} に引用する文書の数。近い順。空なら 3。",
        ),
    },
    "examples": {
        "class": Column(
            12,
            "Name of the kind of task. The sheet examples refers to it.\n課題の種類の名前。",
        ),
        "input": Column(60, "A task of this class.\n課題文。"),
        "output": Column(80, "A good answer to it.\n模範となる回答。"),
        "weight": Column(
            9,
            "How much the example counts when the class is chosen; above 0. Empty: 1.\n"
            "種類を決めるときの重み。空なら 1。",
        ),
    },
    "documents": {
        "title": Column(24, "The title of the document.\n文書の題名。"),
        "text": Column(100, "The text that may be quoted.\n引用する本文。"),
    },
}
CHECKS = {
    "max_new_tokens": ("whole", "greaterThanOrEqual", "1", "a whole number of 1 or more"),
    "temperature": ("decimal", "greaterThanOrEqual", "0", "a number of 0 or more"),
    "repetition_penalty": ("decimal", "greaterThan", "0", "a number above 0"),
    "examples": ("whole", "greaterThanOrEqual", "0", "a whole number of 0 or more"),
    "documents": ("whole", "greaterThanOrEqual", "0", "a whole number of 0 or more"),
    "weight": ("decimal", "greaterThan", "0", "a number above 0"),
}


def write_excel(knowledge: Knowledge, path: Path, readme: Sequence[tuple[str, str]]) -> Path:
    """Write an .xlsx file; `readme` are the (heading, text) rows of a first sheet.

    Raises KnowledgeError: a text that Excel cannot hold. OutputError.
    """
    book = _book(knowledge, path, readme)

    def save(file: Path) -> None:
        # a stream, because openpyxl would reject the temporary file's suffix
        with file.open("wb") as stream:
            book.save(stream)

    return replace_file(path, save)


def _book(knowledge: Knowledge, path: Path, readme: Sequence[tuple[str, str]]) -> Any:
    import openpyxl

    book = openpyxl.Workbook()
    book.remove(book.worksheets[0])
    if readme:
        _fill_readme(book.create_sheet("README"), readme)
    rows: dict[str, list[Values]] = {
        "classes": list(map(_class_row, knowledge.classes)),
        "examples": [
            (e.class_name, e.input, e.output, None if e.weight == 1 else e.weight)
            for e in knowledge.examples
        ],
        "documents": [(d.title, d.text) for d in knowledge.documents],
    }
    for sheet, columns in COLUMNS.items():
        assert set(columns) == {*REQUIRED[sheet], *OPTIONAL[sheet]}
        _fill(book.create_sheet(sheet), columns, rows[sheet], path)
    names = f"classes!$A$2:$A${len(knowledge.classes) + ROOM}"
    _validate(
        book["examples"],
        1,
        len(knowledge.examples),
        type="list",
        formula1=names,
        error="Choose a class from the sheet classes.",
    )
    return book


def _class_row(c: KnowledgeClass) -> Values:
    return (
        c.name,
        c.description,
        c.system,
        c.template,
        c.max_new_tokens,
        c.temperature,
        c.repetition_penalty,
        c.shots,
        c.quotes,
    )


def _fill(sheet: Any, columns: dict[str, Column], rows: Iterable[Values], path: Path) -> None:
    from openpyxl.styles import Alignment, Border, Side

    _fill_header(sheet, columns)
    wrap = Alignment(wrap_text=True, vertical="top")
    line = Border(bottom=Side("hair", "AAAAAA"))
    count = 0
    for count, row in enumerate(rows, start=1):
        for i, (column, value) in enumerate(zip(columns, row, strict=True), start=1):
            cell = sheet.cell(count + 1, i)
            cell.alignment = wrap
            cell.border = line
            if isinstance(value, str):
                place = f"{path}, sheet {sheet.title}, row {count + 1}, column {column}"
                put_text(cell, value, place)
            elif value is not None:
                cell.value = int(value) if value == int(value) else value
        widths = [column.width for column in columns.values()]
        sheet.row_dimensions[count + 1].height = _height(row, widths)
    for i, column in enumerate(columns, start=1):
        if column in CHECKS:
            kind, operator, least, wanted = CHECKS[column]
            _validate(
                sheet,
                i,
                count,
                type=kind,
                operator=operator,
                formula1=least,
                error=f"{column} is {wanted}, or empty.",
            )
    sheet.freeze_panes = "A2"
    if "class" in columns:
        sheet.freeze_panes = "B2"
    _set_page(sheet)
    sheet.print_title_rows = "1:1"


def _fill_header(sheet: Any, columns: dict[str, Column]) -> None:
    """Column names with their notes, and the format of the columns as a whole."""
    from openpyxl.comments import Comment
    from openpyxl.styles import Alignment, Font, PatternFill
    from openpyxl.utils import get_column_letter

    wrap = Alignment(wrap_text=True, vertical="top")
    for i, (name, column) in enumerate(columns.items(), start=1):
        cell = sheet.cell(1, i)
        put_text(cell, name)
        cell.font = Font(bold=True)
        cell.fill = PatternFill("solid", fgColor="DDE8F0")
        cell.alignment = wrap
        cell.comment = Comment(column.note, "evomerge", width=340, height=130)
        whole = sheet.column_dimensions[get_column_letter(i)]
        whole.width = column.width
        whole.alignment = wrap
        if name not in CHECKS:
            whole.number_format = "@"  # text is expected below the last row too


def _set_page(sheet: Any) -> None:
    """Print on landscape pages, as wide as the sheet."""
    sheet.page_setup.orientation = "landscape"
    sheet.page_setup.fitToHeight = 0
    sheet.sheet_properties.pageSetUpPr.fitToPage = True


def _height(row: Values, widths: Sequence[float]) -> float:
    """Points that the row's texts need when they are wrapped."""
    most = 1
    for text, width in zip(row, widths, strict=True):
        if isinstance(text, str):
            lines = 0
            for line in text.split("\n"):
                columns = int(_columns_of(line) * 1.05)  # words break early
                lines += max(1, -(-columns // int(width - 1)))
            most = max(most, lines)
    return LINE * min(most, TALLEST)


def _columns_of(line: str) -> int:
    """The width of a text in columns, of which a character of East Asian width takes two."""
    return len(line) + sum(unicodedata.east_asian_width(c) in "WFA" for c in line)


def put_text(cell: Any, text: str, place: str = "") -> None:
    """Store a text as a text, even one that looks like a formula, an error or a number.

    Raises KnowledgeError where it is too long.
    """
    stored = CONTROL.sub(lambda match: f"_x{ord(match[0]):04X}_", STORED.sub("_x005F_", text))
    if len(stored.encode("utf-16-le", "surrogatepass")) // 2 > LONGEST:
        raise KnowledgeError(
            f"the text is longer than the {LONGEST} characters of an Excel cell",
            where=place,
            remedy="Write .yaml instead.",
        )
    cell.value = stored
    cell.number_format = "@"
    if cell.data_type in "fe":  # openpyxl took it for a formula or an error value
        cell.data_type = "s"
    # so that editing the cell does not make it one
    cell.quotePrefix = stored.startswith("'") or runs_in_spreadsheet(text)


def _validate(sheet: Any, column: int, rows: int, **rule: Any) -> None:
    from openpyxl.utils import get_column_letter
    from openpyxl.worksheet.datavalidation import DataValidation

    check = DataValidation(allow_blank=True, showErrorMessage=True, errorTitle="evomerge", **rule)
    letter = get_column_letter(column)
    check.add(f"{letter}2:{letter}{rows + 1 + ROOM}")
    sheet.add_data_validation(check)


def _fill_readme(sheet: Any, readme: Sequence[tuple[str, str]]) -> None:
    from openpyxl.styles import Alignment, Font

    for number, (title, text) in enumerate(readme, start=1):
        for i, value in enumerate((title, text), start=1):
            cell = sheet.cell(number, i)
            put_text(cell, value)
            cell.alignment = Alignment(wrap_text=True, vertical="top")
            cell.font = Font(bold=i == 1 or number == 1, size=14 if number == 1 else 11)
        sheet.row_dimensions[number].height = _height((title, text), (24, 100)) + LINE / 2
    sheet.column_dimensions["A"].width = 24
    sheet.column_dimensions["B"].width = 100
    _set_page(sheet)
