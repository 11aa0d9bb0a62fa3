"""Writes a base, as Excel that people like to fill in or as YAML. What is read back equals what was
written.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from evomerge.errors import KnowledgeError
from evomerge.files import replace_file
from evomerge.knowledge.formats.tables import OPTIONAL, REQUIRED
from evomerge.knowledge.formats.yaml_format import to_yaml
from evomerge.knowledge.records import Knowledge

LONGEST = 32767  # UTF-16 units of an Excel cell ("Excel specifications and limits")
# ECMA-376 22.9.2.19: what looks like a stored character is escaped itself
STORED = re.compile(r"_(?=x[0-9A-Fa-f]{4}_)")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f]")
ROOM = 500  # rows below the last that drop-down lists and number checks reach
# points of a line, lines of the tallest row: not every program fits rows to their texts by itself
LINE, TALLEST = 17.0, 12

Values = Sequence[str | float | None]

ORDER = {
    "classes": (
        "class",
        "description",
        "system",
        "template",
        "max_new_tokens",
        "temperature",
        "repetition_penalty",
        "examples",
        "documents",
    ),
    "examples": ("class", "input", "output", "weight"),
    "documents": ("title", "text"),
}
WIDTHS = {
    "class": 12, "description": 32, "system": 36, "template": 56, "max_new_tokens": 16, "temperature": 13,
    "repetition_penalty": 18, "examples": 11, "documents": 12, "input": 60, "output": 80, "weight": 9, "title": 24, "text": 100,
}  # fmt: skip
NOTES = {
    "class": "Name of the kind of task. Sheet examples names it again.\n課題の種類の名前。",
    "description": "What belongs to the class, in a sentence. May be empty.\nこの種類に入る課題の説明。空でもよい。",
    "system": "Text of the system turn. May be empty.\nシステム文。空でもよい。",
    "template": "The prompt. {input}: the task (needed). {documents}: quoted documents. {examples}: the nearest examples as text; "
    "without it they are turns of the chat before the task.\n"
    "{input} は必須。{documents} は引用文書、{examples} は手本に置き換わる。{examples} がなければ、手本は課題の前の対話になる。",
    "max_new_tokens": "Longest answer in tokens, 1 or more. Empty: that of the run.\n回答の最大トークン数。空なら実行時の値。",
    "temperature": "0: always the likeliest word. Empty: that of the run.\n0 で毎回同じ回答。空なら実行時の値。",
    "repetition_penalty": "Above 0; 1 changes nothing. Empty: that of the run.\n1 で変化なし。空なら実行時の値。",
    "examples": "How many examples the prompt shows, 0 or more. Empty: 3. A class without examples must say 0.\n"
    "プロンプトに入れる手本の数。空なら 3。手本のない種類は 0。",
    "documents": "How many documents {documents} quotes, nearest first. Empty: 3.\n{documents} に引用する文書の数。近い順。空なら 3。",
    "input": "A task of this class.\n課題文。",
    "output": "Its good answer.\n模範となる回答。",
    "weight": "How much the example counts when the class is chosen; above 0. Empty: 1.\n種類を決めるときの重み。空なら 1。",
    "title": "What the document is called.\n文書の題名。",
    "text": "The text that may be quoted.\n引用する本文。",
}
CHECKS = {
    "max_new_tokens": ("whole", "greaterThanOrEqual", "1", "a whole number of 1 or more"),
    "temperature": ("decimal", "greaterThanOrEqual", "0", "a number of 0 or more"),
    "repetition_penalty": ("decimal", "greaterThan", "0", "a number above 0"),
    "examples": ("whole", "greaterThanOrEqual", "0", "a whole number of 0 or more"),
    "documents": ("whole", "greaterThanOrEqual", "0", "a whole number of 0 or more"),
    "weight": ("decimal", "greaterThan", "0", "a number above 0"),
}


def write_knowledge(
    knowledge: Knowledge, path: str | Path, readme: Sequence[tuple[str, str]] = ()
) -> Path:
    """Write .xlsx, .yaml or .yml, by the suffix, whole or not at all; `readme` are the (heading,
    text) rows of a first sheet.

    Raises KnowledgeError: another suffix, a text that Excel cannot hold. OutputError: the file
    cannot be written.
    """
    path = Path(path)
    suffix = path.suffix.casefold()
    if suffix in (".yaml", ".yml"):
        head = "".join(
            f"# {line}\n"
            for title, text in readme
            for line in (f"{title}: {text}" if title else text).split("\n")
        )
        return replace_file(
            path,
            lambda file: file.write_text(head + to_yaml(knowledge), encoding="utf-8", newline="\n"),
        )
    if suffix != ".xlsx":
        raise KnowledgeError(
            "unknown type of knowledge base",
            where=path,
            found=path.suffix,
            remedy="Name it .xlsx or .yaml.",
        )
    book = _book(knowledge, path, readme)
    return replace_file(path, lambda file: _save(book, file))


def _save(book: Any, file: Path) -> None:
    # openpyxl would take the temporary file's suffix for a wrong one
    with file.open("wb") as stream:
        book.save(stream)


def _book(knowledge: Knowledge, path: Path, readme: Sequence[tuple[str, str]]) -> Any:
    import openpyxl

    book = openpyxl.Workbook()
    book.remove(book.worksheets[0])
    if readme:
        _fill_readme(book.create_sheet("README"), readme)
    rows: dict[str, list[Values]] = {
        "classes": [
            (
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
            for c in knowledge.classes
        ],
        "examples": [
            (e.class_name, e.input, e.output, None if e.weight == 1 else e.weight)
            for e in knowledge.examples
        ],
        "documents": [(d.title, d.text) for d in knowledge.documents],
    }
    for sheet, columns in ORDER.items():
        assert set(columns) == {*REQUIRED[sheet], *OPTIONAL[sheet]}
        _fill(book.create_sheet(sheet), columns, rows[sheet], path)
    names = f"classes!$A$2:$A${len(knowledge.classes) + ROOM}"
    _validate(
        book["examples"],
        1,
        len(knowledge.examples),
        type="list",
        formula1=names,
        error="Choose a class of the sheet classes.",
    )
    return book


def _fill(sheet: Any, columns: Sequence[str], rows: Iterable[Values], path: Path) -> None:
    from openpyxl.comments import Comment
    from openpyxl.styles import Alignment, Border, Font, PatternFill, Side
    from openpyxl.utils import get_column_letter

    wrap, line = Alignment(wrap_text=True, vertical="top"), Border(bottom=Side("hair", "AAAAAA"))
    for i, column in enumerate(columns, start=1):
        cell = sheet.cell(1, i)
        put_text(cell, column)
        cell.font, cell.fill, cell.alignment = (
            Font(bold=True),
            PatternFill("solid", fgColor="DDE8F0"),
            wrap,
        )
        cell.comment = Comment(NOTES[column], "evomerge", width=340, height=130)
        whole = sheet.column_dimensions[get_column_letter(i)]
        whole.width, whole.alignment = WIDTHS[column], wrap
        if column not in CHECKS:
            whole.number_format = "@"  # what is typed below the last row is a text too
    count = 0
    for count, row in enumerate(rows, start=1):
        for i, (column, value) in enumerate(zip(columns, row, strict=True), start=1):
            cell = sheet.cell(count + 1, i)
            cell.alignment, cell.border = wrap, line
            if isinstance(value, str):
                put_text(
                    cell, value, f"{path}, sheet {sheet.title}, row {count + 1}, column {column}"
                )
            elif value is not None:
                cell.value = int(value) if value == int(value) else value
        sheet.row_dimensions[count + 1].height = _height(
            row, [WIDTHS[column] for column in columns]
        )
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
    sheet.freeze_panes = "B2" if columns[0] == "class" else "A2"
    sheet.page_setup.orientation, sheet.page_setup.fitToHeight = "landscape", 0
    sheet.sheet_properties.pageSetUpPr.fitToPage = True
    sheet.print_title_rows = "1:1"


def _height(row: Values, widths: Sequence[float]) -> float:
    """Points that the row's texts need when they are wrapped; a character of East Asian width takes
    two columns.
    """
    most = 1
    for text, width in zip(row, widths, strict=True):
        lines = text.split("\n") if isinstance(text, str) else []
        columns = [
            sum(2 if unicodedata.east_asian_width(c) in "WFA" else 1 for c in line)
            for line in lines
        ]
        # words break early
        most = max(most, sum(max(1, -(-int(n * 1.05) // int(width - 1))) for n in columns))
    return LINE * min(most, TALLEST)


def put_text(cell: Any, text: str, place: str = "") -> None:
    """Store a text as a text, also one that looks like a formula, an error or a number. Raises
    KnowledgeError: too long.
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
    # and editing the cell shall not make it one
    cell.quotePrefix = stored[:1] in ("=", "+", "-", "@", "'")


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
    sheet.column_dimensions["A"].width, sheet.column_dimensions["B"].width = 24, 100
    sheet.page_setup.orientation, sheet.page_setup.fitToHeight = "landscape", 0
    sheet.sheet_properties.pageSetUpPr.fitToPage = True
