"""CSV as spreadsheets export it, and texts that no spreadsheet takes for a formula."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from evomerge.errors import InputError
from evomerge.sheets.sheet import MOST_CELLS, Cell, Sheet, heading, line_breaks, unreadable

# Excel's "CSV UTF-8", and its plain "CSV" on a Japanese Windows; "Unicode text" has a mark
ENCODINGS = {"utf-8-sig": "UTF-8", "cp932": "Windows-31J"}
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
LONGEST = 10_000_000  # characters of a field: csv's own limit is shorter than a document
DELIMITERS = ",\t;"  # Excel writes ; where the comma is the decimal sign
NAMED = re.compile(r'"?sep=([^\r\n])"?\r?\n')  # Excel's own way to name the delimiter
# what a spreadsheet may run; Excel trims what stands before (OWASP, "CSV injection")
FORMULA = re.compile(r"'*(?:[\t\r\n]|\s*[=+\-@＝＋－＠])")


def inert(text: str) -> str:
    """A text for a CSV field: one that a spreadsheet could run begins with one apostrophe more."""
    return f"'{text}" if runs_in_spreadsheet(text) else text


def runs_in_spreadsheet(text: str) -> bool:
    """Whether a spreadsheet could take the text for a formula, apostrophes before it aside."""
    return FORMULA.match(text) is not None


def read_delimited(path: Path, known: Collection[str], error: type[InputError]) -> Sheet:
    """A CSV file, separated by commas, semicolons or tabs: what yields most of the `known` columns.

    UTF-8, UTF-16 with a mark, and Windows-31J are read. Raises `error`.
    """
    text = decode_text(path, ENCODINGS, error, "Save it as CSV UTF-8.")
    named = NAMED.match(text)
    if named:
        text, delimiter = text[named.end() :], named[1]
    else:
        delimiter = _delimiter(text, known)
    sheet = Sheet(str(path))
    count = 0
    csv.field_size_limit(LONGEST)
    try:
        for number, fields in enumerate(_reader(text, delimiter), start=1):
            cells = {i: Cell(line_breaks(field)) for i, field in enumerate(fields) if field}
            if cells:
                sheet.rows[number] = cells
            count += len(cells)
            if count > MOST_CELLS:
                raise csv.Error(f"it has more than {MOST_CELLS:,} filled cells")
    except csv.Error as cause:
        raise error(
            f"not a readable CSV file: {cause}",
            where=path,
            remedy="Save it again from the spreadsheet.",
        ) from cause
    return sheet


def _delimiter(text: str, known: Collection[str]) -> str:
    """The delimiter that splits the first line into most known columns, else into most columns."""

    def found(delimiter: str) -> tuple[int, int]:
        try:
            header = next(filter(None, _reader(text, delimiter)), [])
        except csv.Error:
            return 0, 0
        return sum(heading(name) in known for name in header), len(header)

    return max(DELIMITERS, key=found)


def _reader(text: str, delimiter: str) -> Iterator[list[str]]:
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)


def decode_text(
    path: Path, encodings: Collection[str], error: type[InputError], remedy: str
) -> str:
    """A file's text in the first of the encodings that fits, or in UTF-16 if it begins like that.

    Raises `error` naming the line.
    """
    try:
        data = path.read_bytes()
    except OSError as cause:
        raise unreadable(path, cause, error) from cause
    if data.startswith(UTF_16):
        encodings = ("utf-16",)
    errors: list[UnicodeDecodeError] = []
    for encoding in encodings:
        try:
            return data.decode(encoding)
        except UnicodeDecodeError as cause:
            errors.append(cause)
    wrong = max(errors, key=lambda each: each.start)  # the mistake of the most likely encoding
    names = [ENCODINGS.get(encoding, encoding.upper()) for encoding in encodings]
    what = f"is not {names[0]}"
    if len(names) > 1:
        what = f"is neither {' nor '.join(names)}"
    line = data.count(b"\n", 0, wrong.start) + 1
    raise error(
        what,
        where=f"{path}, line {line}",
        found=data[wrong.start : wrong.start + 4],
        remedy=remedy,
    )
