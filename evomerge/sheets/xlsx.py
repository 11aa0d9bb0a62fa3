"""The package of an .xlsx file: its sheets, its texts, and which of its formats are dates.

Parts are streamed and never held as trees, and their size is limited before they are read, so that
a file of a few bytes costs no more than its content. openpyxl, which writes our files, builds an
object for every cell down to the last one that was ever formatted.
"""

from __future__ import annotations

import posixpath
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from xml.parsers import expat

from evomerge.errors import InputError
from evomerge.sheets.cells import CellReader
from evomerge.sheets.sheet import Sheet, decoded, unreadable

# [MS-CFB] 2.2: what an encrypted .xlsx and an old .xls begin with
OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
# [MS-OFFCRYPTO] 2.3.4.4: the stream of an encrypted package
ENCRYPTED = "EncryptedPackage".encode("utf-16-le")
# LibreOffice's formatted empty rows unpack to 20 times their size, and nothing of a spreadsheet to
# more. A MB of empty elements takes an eighth of a second to read.
SMALL, RATIO, LARGEST = 4 << 20, 40, 512 << 20
CHUNK = 1 << 20  # bytes that are unpacked at a time
# ECMA-376 18.8.30: the built-in formats of dates and times, those of Japanese Excel among them
DATES = {*range(14, 23), *range(27, 37), *range(45, 48), *range(50, 59)}


@dataclass(frozen=True)
class SheetPart:
    """A sheet of a workbook, not yet read. `part` is empty for a chart, which has no cells."""

    title: str
    visible: bool
    part: str


class Workbook:
    """An open .xlsx file."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self._path = path
        self._archive = archive
        self._parts: dict[str, zipfile.ZipInfo] = {}
        for info in archive.infolist():  # names are compared without case (ECMA-376-2 6.2.2.3)
            self._parts[info.filename.replace("\\", "/").casefold()] = info
        self._check_size(path)
        main = self._related("")
        book = next((part for kind, part in main.values() if kind == "officeDocument"), "")
        self._related_parts = self._related(book)
        self.sheets = self._sheets(book)
        self._strings: list[str] | None = None
        self._dates: frozenset[int] = frozenset()

    def read(self, sheet: SheetPart) -> Sheet:
        """The filled cells of a sheet."""
        if self._strings is None:
            self._strings = self._shared_strings()
            self._dates = self._date_formats()
        found = Sheet(f"{self._path}, sheet {sheet.title}")
        reader = CellReader(found, self._strings, self._dates)
        self._parse(sheet.part, reader.start, reader.end, reader.text)
        found.rows = dict(sorted(found.rows.items()))
        return found

    def _check_size(self, path: Path) -> None:
        # zipfile reads no more of a part than the size that is declared for it
        unpacked = sum(info.file_size for info in self._archive.infolist())
        if unpacked > min(LARGEST, SMALL + RATIO * path.stat().st_size):
            raise ValueError(f"it unpacks to {unpacked >> 20:,} MB, too much for a spreadsheet")

    def _sheets(self, book: str) -> list[SheetPart]:
        sheets: list[SheetPart] = []

        def start(tag: str, attributes: dict[str, str]) -> None:
            if tag != "sheet":
                return
            named = {name.rpartition(":")[2]: value for name, value in attributes.items()}
            kind, part = self._related_parts.get(named.get("id", ""), ("", ""))
            visible = named.get("state", "visible") == "visible"
            sheets.append(SheetPart(named["name"], visible, part if kind == "worksheet" else ""))

        self._parse(book, start)
        return sheets

    def _related(self, part: str) -> dict[str, tuple[str, str]]:
        """Id -> (kind, name) of the parts that a part refers to."""
        folder, _, name = part.rpartition("/")
        found: dict[str, tuple[str, str]] = {}

        def start(tag: str, attributes: dict[str, str]) -> None:
            if tag == "Relationship":
                kind = attributes["Type"].rpartition("/")[2]
                target = posixpath.join("/", folder, attributes["Target"].replace("\\", "/"))
                found[attributes["Id"]] = kind, posixpath.normpath(target).lstrip("/")

        self._parse(posixpath.join(folder, "_rels", f"{name}.rels"), start)
        return found

    def _part_of_kind(self, kind: str) -> str | None:
        return next((part for k, part in self._related_parts.values() if k == kind), None)

    def _shared_strings(self) -> list[str]:
        strings: list[str] = []
        pieces: list[str] = []
        inside: list[str] = []  # the open elements that decide whether a text counts

        def start(tag: str, attributes: dict[str, str]) -> None:
            if tag in ("t", "rPh"):
                inside.append(tag)

        def end(tag: str) -> None:
            if tag in ("t", "rPh"):
                inside.pop()
            elif tag == "si":
                strings.append(decoded("".join(pieces)))
                pieces.clear()

        def text(data: str) -> None:
            if inside == ["t"]:  # rPh: how the text is read aloud
                pieces.append(data)

        part = self._part_of_kind("sharedStrings")
        if part is not None:
            self._parse(part, start, end, text)
        return strings

    def _date_formats(self) -> frozenset[int]:
        """The numbers of the cell formats that show a number as a date or time."""
        codes: dict[str, str] = {}
        formats: list[str] = []
        inside = False

        def start(tag: str, attributes: dict[str, str]) -> None:
            nonlocal inside
            if tag == "numFmt":
                codes[attributes["numFmtId"]] = attributes.get("formatCode", "")
            elif tag == "cellXfs":
                inside = True
            elif tag == "xf" and inside:
                formats.append(attributes.get("numFmtId", "0"))

        def end(tag: str) -> None:
            nonlocal inside
            inside = inside and tag != "cellXfs"

        part = self._part_of_kind("styles")
        if part is None:
            return frozenset()
        self._parse(part, start, end)
        dates = set(map(str, DATES)) - codes.keys()
        if codes:
            from openpyxl.styles.numbers import is_date_format

            dates |= {number for number, code in codes.items() if is_date_format(code)}
        return frozenset(i for i, number in enumerate(formats) if number in dates)

    def _parse(
        self,
        part: str,
        start: Callable[[str, dict[str, str]], None],
        end: Callable[[str], None] | None = None,
        text: Callable[[str], None] | None = None,
    ) -> None:
        """Stream a part; elements are named without their namespaces' prefixes."""
        parser = expat.ParserCreate()
        parser.buffer_text = True
        parser.StartElementHandler = lambda tag, found: start(tag.rpartition(":")[2], found)
        if end is not None:
            parser.EndElementHandler = lambda tag: end(tag.rpartition(":")[2])
        if text is not None:
            parser.CharacterDataHandler = text
        parser.StartDoctypeDeclHandler = _no_doctype
        info = self._parts.get(part.casefold())
        if info is None:
            raise ValueError(f"it has no part {part or 'xl/workbook.xml'}")
        with self._archive.open(info) as file:
            # not ParseFile: it feeds 2 KB at a time, and a tag is scanned again with each piece
            while piece := file.read(CHUNK):
                parser.Parse(piece, False)
            parser.Parse(b"", True)


@contextmanager
def open_workbook(path: Path, error: type[InputError]) -> Iterator[Workbook]:
    """The workbook, open for the block. Raises `error` for a file or a sheet that is not readable.

    One that begins like an older Excel file is named as what it is.
    """
    try:
        with path.open("rb") as file:
            head = file.read(8)
            if head == OLE:
                raise _unsupported(path, ENCRYPTED in head + file.read(), error)
            with zipfile.ZipFile(file) as archive:
                yield Workbook(path, archive)
    except InputError:
        raise
    except OSError as cause:
        raise unreadable(path, cause, error) from cause
    except Exception as cause:  # zipfile passes on the errors of every decompressor
        raise error(
            f"not a readable Excel file: {cause}",
            where=path,
            remedy="Save it as .xlsx, without a password.",
        ) from cause


def _no_doctype(*_: object) -> None:
    raise ValueError("it declares entities")  # ECMA-376-2 6.2.5 forbids that


def _unsupported(path: Path, locked: bool, error: type[InputError]) -> InputError:
    if locked:
        return error(
            "is protected by a password",
            where=path,
            remedy="Open it in Excel and save it as .xlsx, without a password.",
        )
    return error(
        "is an Excel file from before 2007",
        where=path,
        remedy="Open it in Excel and save it as .xlsx.",
    )
