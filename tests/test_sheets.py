"""Spreadsheets as people have them: one reader for task files and knowledge bases."""

import csv
import datetime
import io
import struct
import time
import tracemalloc
import zipfile

import openpyxl
import pytest
import raw_xlsx
from openpyxl.styles import PatternFill

from evomerge.errors import InputError, KnowledgeError, TaskError
from evomerge.knowledge.read_base import check_knowledge, read_knowledge
from evomerge.knowledge.records import Document, Example, Knowledge, KnowledgeClass
from evomerge.knowledge.write_base import write_knowledge
from evomerge.sheets.cells import shown_number
from evomerge.sheets.delimited import inert
from evomerge.sheets.xlsx import LARGEST, open_workbook
from evomerge.tasks import load_tasks

HEADER = ["task_id", "input", "output", "class"]


def workbook(path, rows, change=lambda sheet: None):
    """The same rows as a task file and as the examples of a base, written by openpyxl."""
    book = openpyxl.Workbook()
    book.active.title = "examples"
    for row in [HEADER, *rows]:
        book.active.append(row)
    change(book.active)
    classes = book.create_sheet("classes")
    classes.append(["class", "system", "template"])
    classes.append(["計算", None, "{input}"])
    book.save(path)
    return path


def read_both(path):
    """(input, output) of a file's tasks, and of its examples; or the two errors."""
    found = []
    for read in (load_tasks, lambda path: read_knowledge(path).examples):
        try:
            found.append([(row.input, row.output) for row in read(path)])
        except InputError as error:
            found.append(error)
    return found


def test_numbers_and_truths_read_as_they_are_shown(tmp_path):
    rows = [[0, 12, 8, "計算"], [1, True, 1.5, "計算"], [2, 0.1 + 0.2, -3, "計算"]]
    path = workbook(tmp_path / "t.xlsx", rows)
    wanted = [("12", "8"), ("TRUE", "1.5"), ("0.3", "-3")]
    assert read_both(path) == [wanted, wanted]
    assert [task.task_id for task in load_tasks(path)] == [0, 1, 2]


def test_numbers_of_google_sheets(tmp_path):
    rows = raw_xlsx.texts("task_id", "input", "output") + "".join(
        f"<row><c><v>{i}.0</v></c><c><v>{12 * i}.0</v></c><c><v>{144 * i}.0</v></c></row>"
        for i in range(1, 3)
    )
    path = raw_xlsx.write(tmp_path / "t.xlsx", {"S": raw_xlsx.sheet(rows)})
    found = [(task.task_id, task.input, task.output) for task in load_tasks(path)]
    assert found == [(1, "12", "144"), (2, "24", "288")]


@pytest.mark.parametrize(
    ("stored", "shown"),
    [
        ("8.0", "8"),
        ("1.1000000000000001", "1.1"),
        ("-0.0", "0"),
        ("1E3", "1000"),
        ("12345678901234567890", "12345678901234567890"),
        ("1e300", "1e+300"),
        ("007", "7"),
        ("NaN", "NaN"),
    ],
)
def test_numbers_as_excel_shows_them(stored, shown):
    assert shown_number(stored) == shown


@pytest.mark.parametrize(
    ("stored", "text"),
    [
        ("one_x000D_\ntwo", "one\ntwo"),
        ("one_x000d_two", "one\ntwo"),
        ("_x0009_a_x000B_", "\ta\x0b"),
        ("_x005F_x000D_", "_x000D_"),
        ("_x0041__x3042_", "Aあ"),
        ("_x005F_x0041_x005F_x0042_", "_x0041_x0042_"),
        ("_xD83C__xDF4E_", "🍎"),
        ("_x00G0_ _x41_ _X0041_", "_x00G0_ _x41_ _X0041_"),
    ],
)
@pytest.mark.parametrize("kind", ["shared", "rich", "inline", "formula"])
def test_stored_characters(tmp_path, stored, text, kind):
    """ECMA-376 22.9.2.19, wherever a text may stand."""
    cell = {
        "shared": '<c t="s"><v>0</v></c>',
        "rich": '<c t="s"><v>0</v></c>',
        "inline": f'<c t="inlineStr"><is><t xml:space="preserve">{stored}</t></is></c>',
        "formula": f'<c t="str"><f>A1</f><v xml:space="preserve">{stored}</v></c>',
    }[kind]
    strings = f'<si><t xml:space="preserve">{stored}</t></si>'
    if kind == "rich":
        half = len(stored) // 2
        strings = (
            f"<si><r><t>{stored[:half]}</t></r><r><rPr><b/></rPr><t>{stored[half:]}</t></r>"
            '<rPh sb="0" eb="1"><t>ルビ</t></rPh></si>'
        )
    rows = raw_xlsx.texts("input") + f"<row>{cell}<c><v>1</v></c></row>"
    path = raw_xlsx.write(tmp_path / "t.xlsx", {"S": raw_xlsx.sheet(rows)}, strings)
    assert load_tasks(path)[0].input == text


@pytest.mark.parametrize(
    "text",
    [
        "_x000D_",
        "__x0041__",
        "\x00\x1f",
        "\ufffe\uffff",
        "\t=1+1",
        " =1",
        "\u3000=A1",
        "'=1",
        "＝1",
    ],
)
def test_texts_come_back_from_excel(tmp_path, text):
    rows = (Example(2, "計算", f"{text}.", text + "x"), Example(3, "計算", f".{text}", "y"))
    base = Knowledge(
        (KnowledgeClass("計算", "", "{input}"),), rows, (Document(2, "題", f"{text}z"),)
    )
    path = write_knowledge(base, tmp_path / "b.xlsx")
    assert read_knowledge(path) == base
    cell = openpyxl.load_workbook(path)["examples"]["C2"]
    assert cell.data_type == "s"
    assert bool(cell.quotePrefix) == (inert(text) != text or text.startswith("'"))


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("=1+1", "contains a formula without a stored value"),
        ("#N/A", "contains an error value"),
        (datetime.datetime(2026, 5, 18), "contains a date"),
        (datetime.time(9, 30), "contains a date or time"),
    ],
)
def test_what_is_no_text_is_refused_by_both(tmp_path, value, what):
    path = workbook(tmp_path / "t.xlsx", [[0, "a", "b", "計算"], [1, "c", value, "計算"]])
    of_tasks, of_base = read_both(path)
    assert (type(of_tasks), type(of_base)) == (TaskError, KnowledgeError)
    for error in (of_tasks, of_base):
        assert str(error).startswith(f"{path}, sheet examples, row 3, column output: {what}")


def test_dates_by_built_in_and_by_own_formats(tmp_path):
    styles = (
        '<numFmts><numFmt numFmtId="164" formatCode="yyyy/m/d"/>'
        '<numFmt numFmtId="165" formatCode="0.0&quot;日&quot;"/></numFmts>'
        '<cellStyleXfs><xf numFmtId="14"/></cellStyleXfs><cellXfs>'
        + "".join(f'<xf numFmtId="{n}"/>' for n in (0, 14, 31, 55, 164, 165, 9))
        + "</cellXfs>"
    )
    wrong = []
    for style in range(7):
        rows = raw_xlsx.texts("input", "output")
        rows += f'<row><c t="inlineStr"><is><t>a</t></is></c><c s="{style}"><v>46160</v></c></row>'
        path = raw_xlsx.write(tmp_path / "t.xlsx", {"S": raw_xlsx.sheet(rows)}, styles=styles)
        of_tasks, _ = read_both(path)
        if of_tasks != [("a", "46160")]:
            wrong.append((style, "contains a date" in str(of_tasks)))
    assert wrong == [(1, True), (2, True), (3, True), (4, True)]


def test_formulas_are_read_by_their_stored_values(tmp_path):
    rows = raw_xlsx.texts("class", "input", "output") + raw_xlsx.texts("計算", "a", "b")
    rows += (
        '<row><c t="inlineStr"><is><t>計算</t></is></c><c t="str"><f>A1&amp;"x"</f><v>c</v></c>'
        "<c><f>4*2</f><v>8</v></c></row>"
    )
    rows += '<row><c t="str"><f>IF(FALSE,1,"")</f><v></v></c></row>'
    classes = raw_xlsx.texts("class", "system", "template") + raw_xlsx.texts("計算", "", "{input}")
    path = raw_xlsx.write(
        tmp_path / "t.xlsx",
        {"examples": raw_xlsx.sheet(rows), "classes": raw_xlsx.sheet(classes)},
    )
    assert read_both(path) == [[("a", "b"), ("c", "8")]] * 2
    assert check_knowledge(path).notes == (
        f"{path}, sheet examples: formulas are read by their stored values: rows 3",
    )


def test_merged_cells_are_refused_by_both(tmp_path):
    rows = [[0, "a", "b", "計算"], [1, "c", "d", "計算"]]
    path = workbook(tmp_path / "t.xlsx", rows, lambda sheet: sheet.merge_cells("C2:C3"))
    for error in read_both(path):
        assert "cells are merged (found: 'C2:C3')" in str(error)
    path = workbook(tmp_path / "t.xlsx", rows, lambda sheet: sheet.merge_cells("F1:H3"))
    assert read_both(path) == [[("a", "b"), ("c", "d")]] * 2


def test_the_first_visible_sheet_holds_the_tasks(tmp_path):
    hidden, shown = raw_xlsx.texts("input", "old"), raw_xlsx.texts("input") + raw_xlsx.texts("a")
    sheets = {"H": raw_xlsx.sheet(hidden), "S": raw_xlsx.sheet(shown)}
    for state in ("hidden", "veryHidden"):
        path = raw_xlsx.write(tmp_path / "t.xlsx", sheets, states={"H": state})
        assert [task.input for task in load_tasks(path)] == ["a"]
    path = raw_xlsx.write(tmp_path / "t.xlsx", {"H": sheets["H"]}, states={"H": "hidden"})
    with pytest.raises(TaskError, match="has no visible sheet"):
        load_tasks(path)


def test_a_prefix_and_the_strict_namespace(tmp_path):
    """The Open XML SDK writes x:row; "Strict Open XML" has namespaces of its own."""
    rows = raw_xlsx.sheet(raw_xlsx.texts("input") + raw_xlsx.texts("あ"))
    prefixed = rows.replace("<", "<x:").replace("<x:/", "</x:").replace("xmlns=", "xmlns:x=")
    strict = rows.replace(raw_xlsx.MAIN, "http://purl.oclc.org/ooxml/spreadsheetml/main")
    for text in (prefixed, strict):
        path = raw_xlsx.write(tmp_path / "t.xlsx", {"S": text})
        assert [task.input for task in load_tasks(path)] == ["あ"]


FAR = {
    "a formatted last row": '<row r="1048576"><c r="A1048576" s="1"/></row>',
    "a formatted last column": '<row r="3"><c r="XFD3" s="1"/></row>',
    "a blank in the last cell": '<row r="1048576"><c r="XFD1048576" t="inlineStr"><is><t> </t></is>'
    "</c></row>",
    "a number in the last cell": '<row r="1048576"><c r="XFD1048576"><v>1</v></c></row>',
    "many formatted rows": "".join(
        f'<row r="{r}"><c r="A{r}" s="1"/></row>' for r in range(3, 9999)
    ),
}


@pytest.mark.parametrize("far", FAR)
def test_cells_far_away_cost_nothing(tmp_path, far):
    rows = raw_xlsx.texts("class", "input", "output") + raw_xlsx.texts("計算", "a", "b") + FAR[far]
    classes = raw_xlsx.texts("class", "system", "template") + raw_xlsx.texts("計算", "", "{input}")
    sheets = {
        "examples": raw_xlsx.sheet(
            rows, before='<dimension ref="A1:XFD1048576"/><cols><col min="1" max="16384"/></cols>'
        ),
        "classes": raw_xlsx.sheet(classes),
    }
    path = raw_xlsx.write(tmp_path / "b.xlsx", sheets)
    tracemalloc.start()
    began = time.process_time()
    assert read_both(path) == [[("a", "b")]] * 2
    assert time.process_time() - began < 3
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_openpyxl_s_formatted_cells_far_away(tmp_path):
    def far(sheet):
        for place in ("A1048576", "XFD1"):
            sheet[place].fill = PatternFill("solid", fgColor="FFFF00")

    path = workbook(tmp_path / "t.xlsx", [[0, "a", "b", "計算"]], far)
    began = time.process_time()
    assert read_both(path) == [[("a", "b")]] * 2
    assert time.process_time() - began < 3


@pytest.mark.parametrize("part", ["xl/worksheets/s1.xml", "xl/strings.xml", "xl/media/image1.png"])
def test_zip_bombs_are_refused_before_they_are_unpacked(tmp_path, part):
    sheets = {"S": raw_xlsx.sheet(raw_xlsx.texts("input") + raw_xlsx.texts("a"))}
    path = raw_xlsx.write(tmp_path / "t.xlsx", sheets, more={part: bytes(100 << 20)})
    began = time.process_time()
    for error in read_both(path):
        assert "it unpacks to 100 MB, too much for a spreadsheet" in str(error)
    assert time.process_time() - began < 1


MANY = {
    "cells": "<row>" + "<c/>" * 900_000 + "</row>",
    "rows": "<row/>" * 600_000,
    "numbers": "<row>" + "<c><v>1</v></c>" * 250_000 + "</row>",
    "attributes": "<row " + " ".join(f'a{i}="1"' for i in range(300_000)) + "/>",
    "elements in each other": "<a>" * 500_000,
    "stored characters": f'<row><c t="inlineStr"><is><t>{"_x000D_" * 500_000}</t></is></c></row>',
}


@pytest.mark.parametrize("many", MANY)
def test_what_the_limit_lets_pass_costs_little(tmp_path, many):
    path = raw_xlsx.write(tmp_path / "t.xlsx", {"S": raw_xlsx.sheet(MANY[many])})
    began = time.process_time()
    with pytest.raises(TaskError):
        load_tasks(path)
    assert time.process_time() - began < 4


def test_a_bomb_that_lies_about_its_size(tmp_path):
    sheets = {"S": raw_xlsx.sheet(raw_xlsx.texts("input") + raw_xlsx.texts("a"))}
    path = raw_xlsx.write(tmp_path / "t.xlsx", sheets, more={"xl/strings.xml": bytes(40 << 20)})
    data = path.read_bytes()
    size = struct.pack("<L", 40 << 20)
    path.write_bytes(data.replace(size, struct.pack("<L", 1000)))
    tracemalloc.start()
    with pytest.raises(TaskError, match="not a readable Excel file"):
        load_tasks(path)
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    "sheet",
    [
        '<!DOCTYPE a [<!ENTITY b "x">]><worksheet>&b;</worksheet>',
        "<worksheet><sheetData><row>",
        '<worksheet><sheetData><row r="1"><c r="AAAA1"><v>1</v></c></row></sheetData></worksheet>',
        '<worksheet><sheetData><row r="1048577"><c/></row></sheetData></worksheet>',
        '<worksheet><sheetData><row r="x"><c/></row></sheetData></worksheet>',
        '<worksheet><sheetData><row><c t="s"><v>7</v></c></row></sheetData></worksheet>',
        "<worksheet><sheetData><row><c><v>x</v></c></row></sheetData></worksheet>",
        "<worksheet>" * 100_000,
        "\x00\x01",
        "",
    ],
)
def test_damaged_sheets_are_one_line(tmp_path, sheet):
    path = raw_xlsx.write(tmp_path / "t.xlsx", {"examples": sheet, "classes": sheet})
    for error in read_both(path):
        assert f"{path}: not a readable Excel file" in str(error)
        assert "\n" not in str(error)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"text", b"PK\x05\x06" + bytes(18)])
def test_what_is_no_archive_is_one_line(tmp_path, data):
    path = tmp_path / "t.xlsx"
    path.write_bytes(data)
    for error in read_both(path):
        assert "not a readable Excel file" in str(error)


def test_an_old_or_locked_file_is_named_for_tasks_too(tmp_path):
    path = tmp_path / "t.xlsx"
    path.write_bytes(bytes.fromhex("d0cf11e0a1b11ae1") + bytes(504))
    with pytest.raises(TaskError, match="from before 2007"):
        load_tasks(path)


def test_the_limits_let_real_files_pass(tmp_path):
    """Twenty thousand formatted empty rows."""
    empty = "".join(
        f'<row r="{r}"><c r="A{r}" s="1"/><c r="B{r}" s="1"/></row>' for r in range(3, 20_003)
    )
    rows = raw_xlsx.texts("input") + raw_xlsx.texts("a") + empty
    path = raw_xlsx.write(tmp_path / "t.xlsx", {"S": raw_xlsx.sheet(rows)})
    with zipfile.ZipFile(path) as file:
        sizes = [(info.file_size, info.compress_size) for info in file.infolist()]
    assert max(size / packed for size, packed in sizes) < 40
    with open_workbook(path, TaskError) as book:
        assert len(book.read(book.sheets[0]).rows) == 2
    assert 100 * max(size for size, _ in sizes) < LARGEST


CSV = [
    [" Output", "Task_ID ", "INPUT", "note", "class"],
    ["8; か", "7", "3+5, は\n二行", "x", "計算"],
    ["", "", "", "stray", ""],
    ["花", "8.0", "春\t詩", "", "計算"],
    ["", "", "", "", ""],
]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp932", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("mark", ["", "sep"])
def test_csv_of_every_kind_for_tasks_and_knowledge(tmp_path, encoding, delimiter, mark):
    written = io.StringIO(newline="")
    csv.writer(written, delimiter=delimiter).writerows(CSV)
    text = (f"sep={delimiter}\r\n" if mark else "") + written.getvalue()
    path = tmp_path / ("t.tsv" if delimiter == "\t" else "t.csv")
    path.write_bytes(text.encode(encoding))
    wanted = [("3+5, は\n二行", "8; か"), ("春\t詩", "花")]
    assert read_both(path) == [wanted, wanted]
    assert [task.task_id for task in load_tasks(path)] == [7, 8]
    assert [example.row for example in read_knowledge(path).examples] == [2, 4]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("task_id,output\n1,a\n", "row 1: has no column input"),
        ("input,INPUT\na,b\n", "row 1: has more than one column input"),
        ("\ninput,output\n,b\n", "row 3: `input` is empty"),
        ("", "row 1: has no column input"),
        ("input\n", "contains no tasks"),
    ],
)
def test_bad_task_tables(tmp_path, text, what):
    path = tmp_path / "T.CSV"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TaskError) as caught:
        load_tasks(path)
    assert what in str(caught.value)


@pytest.mark.parametrize(
    "names",
    [
        ("base - examples.csv", "base - classes.csv"),
        ("私の表 - Examples.csv", "私の表 - Classes (1).csv"),
        ("base-examples.csv", "base-classes.csv"),
        ("a - b - examples.csv", "classes.csv"),
        ("base - examples.tsv", "classes.tsv"),
    ],
)
def test_exports_are_named_after_file_and_sheet(tmp_path, names):
    (tmp_path / names[0]).write_text("class,input,output\nk,a,b\n")
    (tmp_path / names[1]).write_text("class,system,template\nk,s,{input}\n")
    (tmp_path / "notes - other.csv").write_text("x\n")
    base = read_knowledge(tmp_path)
    assert (base.classes[0].system, base.examples[0].output) == ("s", "b")


def test_two_exports_of_a_sheet_are_not_guessed_between(tmp_path):
    for name in ("a - examples.csv", "b - examples.csv"):
        (tmp_path / name).write_text("class,input,output\nk,a,b\n")
    with pytest.raises(KnowledgeError, match="more than one file of examples"):
        read_knowledge(tmp_path)
    (tmp_path / "examples.csv").write_text("class,input,output\nk,a,c\n")
    checked = check_knowledge(tmp_path)
    assert checked.knowledge.examples[0].output == "c"
    assert any("a - examples.csv: is not read" in note for note in checked.notes)


@pytest.mark.parametrize(
    "text",
    [
        "=1+1",
        "+1",
        "-1",
        "@A1",
        "\t=1",
        "\r=1",
        "\n=1",
        "\t1",
        " =1",
        "\u3000=1",
        "＝1",
        "'=1",
        "''  -1",
    ],
)
def test_texts_that_spreadsheets_run_are_made_inert(text):
    assert inert(text) == f"'{text}"
    assert inert("a" + text) == "a" + text


@pytest.mark.parametrize("text", ["", "a", " a", "'quoted'", "1", "。=", "'tis"])
def test_other_texts_stay_as_they_are(text):
    assert inert(text) == text
