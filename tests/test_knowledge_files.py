"""Bases as people have them: Excel with its oddities, YAML, CSV exports; every mistake has its
place.
"""

import datetime
import time

import openpyxl
import pytest
from openpyxl.comments import Comment
from openpyxl.styles import PatternFill
from openpyxl.worksheet.formula import ArrayFormula

from evomerge.cli import main
from evomerge.errors import KnowledgeError
from evomerge.knowledge.read_base import check_knowledge, read_knowledge
from evomerge.knowledge.records import Document, Example, KnowledgeClass, render
from evomerge.knowledge.starter import starter
from evomerge.knowledge.write_base import write_knowledge

HEADERS = {
    "classes": [
        "class",
        "system",
        "template",
        "max_new_tokens",
        "temperature",
        "repetition_penalty",
        "examples",
        "description",
        "documents",
    ],
    "examples": ["class", "input", "output", "weight"],
}


def workbook(**more):
    book = openpyxl.Workbook()
    book.remove(book.active)
    sheets = {
        "classes": [
            HEADERS["classes"],
            ["計算", "先生", "問:{input}", 64, 0.5, 1.1, 2, "数", 1],
            ["創作", None, "{input}"],
        ],
        "examples": [HEADERS["examples"], ["計算", "3+5", "8", 2.5], ["創作", "春の詩", "花の雨"]],
    }
    for title, rows in (sheets | more).items():
        sheet = book.create_sheet(title)
        for row in rows:
            sheet.append(row)
    return book


def saved(book, tmp_path):
    book.save(tmp_path / "b.xlsx")
    return tmp_path / "b.xlsx"


def lines(path):
    return [
        str(mistake).removeprefix(f"{path}, ").removeprefix(str(path))
        for mistake in check_knowledge(path).mistakes
    ]


def test_settings_weights_and_documents(tmp_path):
    path = saved(workbook(documents=[["text", "title"], ["本文", "題"], [None, None]]), tmp_path)
    base = read_knowledge(path)
    assert base.classes == (
        KnowledgeClass("計算", "先生", "問:{input}", "数", 64, 0.5, 1.1, 2, 1),
        KnowledgeClass("創作", "", "{input}", "", None, None, None, None, None),
    )
    assert base.examples == (
        Example(2, "計算", "3+5", "8", 2.5),
        Example(3, "創作", "春の詩", "花の雨", 1.0),
    )
    assert base.documents == (Document(2, "題", "本文"),)
    assert base.digest() != read_knowledge(saved(workbook(), tmp_path)).digest()


def test_settings_as_texts_and_full_width(tmp_path):
    book = workbook()
    for column, text in zip("DEFGI", ["６４", " 0.5 ", "１．１", "2", "３"], strict=True):
        book["classes"][f"{column}2"] = text
    assert read_knowledge(saved(book, tmp_path)).classes[0] == KnowledgeClass(
        "計算", "先生", "問:{input}", "数", 64, 0.5, 1.1, 2, 3
    )


def test_every_mistake_is_found_with_sheet_row_and_column(tmp_path):
    book = workbook()
    classes, examples = book["classes"], book["examples"]
    classes.append(["計算", "", "{imput}", 0, -1, 0, 1.5, "", 0.5])
    classes.append([None, "", None, "many", "warm", "nan", -1, "", -1])
    classes.append(["分析", "", "{input}"])
    examples.append(["説明", "", None, 0])
    examples.append(["計算", "a", "b", "heavy"])
    found = lines(saved(book, tmp_path))
    places = [line.split(":")[0] for line in found]
    assert sorted(places) == sorted(
        [
            f"sheet classes, row 4, column {c}"
            for c in ("class", *HEADERS["classes"][2:7], "documents")
        ]
        + [
            f"sheet classes, row 5, column {c}"
            for c in ("class", *HEADERS["classes"][2:7], "documents")
        ]
        + ["sheet classes, row 6, column class"]
        + [f"sheet examples, row 4, column {c}" for c in ("class", "input", "output", "weight")]
        + ["sheet examples, row 5, column weight"]
    )
    assert all("\n" not in line for line in found)


def test_no_column_hides_the_mistakes_of_the_others(tmp_path):
    book = workbook(examples=[["class", "input"], ["説明", "a"]])
    book["classes"]["D2"] = "x"
    found = lines(saved(book, tmp_path))
    assert any("sheet examples, row 1: has no column output" in line for line in found)
    assert any("row 2, column max_new_tokens" in line for line in found)


def test_a_nearly_right_column_is_told_and_others_are_noted(tmp_path):
    book = workbook()
    book["classes"]["E1"], book["classes"]["J1"] = "temprature", "owner"
    path = saved(book, tmp_path)
    assert [(line.split(":")[0], "Did you mean temperature?" in line) for line in lines(path)] == [
        ("sheet classes, row 1", True)
    ]
    book["classes"]["E1"] = "temperature"
    path = saved(book, tmp_path)
    checked = check_knowledge(path)
    assert checked.knowledge is not None
    assert checked.notes == (f"{path}, sheet classes, row 1: the column owner is not read",)


@pytest.mark.parametrize(
    ("cell", "value", "what"),
    [
        ("B2", "=1+1", "contains a formula"),
        ("C2", ArrayFormula("C2", "=SUM(A1:A2)"), "contains a formula"),
        ("C2", "#N/A", "contains an error value"),
        ("C2", datetime.datetime(2026, 5, 18), "contains a date"),
        ("C2", datetime.time(9, 30), "contains a date or time"),
        ("D2", "=2", "contains a formula"),
    ],
)
def test_what_is_no_text_is_refused_with_its_place(tmp_path, cell, value, what):
    book = workbook()
    book["examples"][cell] = value
    (line,) = lines(saved(book, tmp_path))
    column = HEADERS["examples"]["ABCD".index(cell[0])]
    assert line.startswith(f"sheet examples, row 2, column {column}: {what}")


def test_a_text_that_looks_like_a_formula_is_a_text(tmp_path):
    book = workbook()
    cell = book["examples"]["B2"]
    cell.value, cell.data_type = "=HYPERLINK(1)", "s"
    assert read_knowledge(saved(book, tmp_path)).examples[0].input == "=HYPERLINK(1)"


def test_formulas_where_nothing_is_read_do_no_harm(tmp_path):
    book = workbook(other=[["=1"]])
    book["examples"]["E1"], book["examples"]["E2"] = "length", "=LEN(B2)"
    assert len(read_knowledge(saved(book, tmp_path)).examples) == 2


@pytest.mark.parametrize(
    ("area", "row", "column"), [("A2:A3", 2, "class"), ("B3:C3", 3, "input"), ("A1:B1", 1, "class")]
)
def test_merged_cells(tmp_path, area, row, column):
    book = workbook()
    book["examples"].merge_cells(area)
    found = lines(saved(book, tmp_path))
    assert (
        f"sheet examples, row {row}, column {column}: cells are merged (found: {area!r}). "
        "Unmerge them, and fill in each of them." in found
    )
    assert row == 1 or not any("is empty" in line for line in found)


def test_merged_cells_beside_what_is_read(tmp_path):
    book = workbook()
    book["examples"].merge_cells("F1:H3")
    assert check_knowledge(saved(book, tmp_path)).mistakes == ()


@pytest.mark.parametrize("state", ["hidden", "veryHidden"])
def test_hidden_sheets_are_refused_and_hidden_rows_and_columns_are_told(tmp_path, state):
    book = workbook()
    book["examples"].sheet_state = state
    (line,) = lines(saved(book, tmp_path))
    assert line.startswith("sheet examples: the sheet is hidden")
    book["examples"].sheet_state = "visible"
    book["examples"].row_dimensions[3].hidden = True
    book["classes"].column_dimensions.group("B", "C", hidden=True)
    path = saved(book, tmp_path)
    assert check_knowledge(path).notes == (
        f"{path}, sheet classes: hidden columns are read too: system, template",
        f"{path}, sheet examples: hidden rows are read too: 3",
    )


def test_a_hidden_sheet_that_is_not_read_does_no_harm(tmp_path):
    book = workbook(secret=[["x"]])
    book["secret"].sheet_state = "hidden"
    assert check_knowledge(saved(book, tmp_path)).mistakes == ()


def test_styled_empty_rows_are_empty(tmp_path):
    book = workbook()
    for row in range(4, 60):
        book["examples"].cell(row, 1).fill = PatternFill("solid", fgColor="FFFF00")
    book["examples"]["A2"].comment = Comment("x", "y")
    assert len(read_knowledge(saved(book, tmp_path)).examples) == 2


def test_documents_that_nothing_quotes_are_told(tmp_path):
    book = workbook(documents=[["title", "text"], ["題", "本文"]])
    path = saved(book, tmp_path)
    assert check_knowledge(path).notes == (
        f"{path}: no template contains {{documents}}, so no document is quoted",
    )
    book["classes"]["C3"] = "{documents}{input}"
    assert check_knowledge(saved(book, tmp_path)).notes == ()


def test_an_empty_class(tmp_path):
    book = workbook()
    book["classes"].append(["雑談", "", "{input}"])
    (line,) = lines(saved(book, tmp_path))
    assert line.startswith(
        "sheet classes, row 4, column class: the class has no examples (found: '雑談')"
    )
    book["classes"]["G4"] = 0
    base = read_knowledge(saved(book, tmp_path))
    assert base["雑談"].shots == 0


@pytest.mark.parametrize(
    ("inside", "what"),
    [
        ("EncryptedPackage", "is protected by a password"),
        ("Workbook", "is an Excel file from before 2007"),
    ],
)
def test_ole_files(tmp_path, inside, what):
    path = tmp_path / "b.xlsx"
    path.write_bytes(
        bytes.fromhex("d0cf11e0a1b11ae1") + bytes(504) + inside.encode("utf-16-le") + bytes(512)
    )
    with pytest.raises(KnowledgeError, match=what) as caught:
        read_knowledge(path)
    assert "\n" not in str(caught.value)


YAML = """\
examples:
- {class: 計算, input: 3+5, output: 8, weight: 2.5}
- class: 創作
  input: 春の詩
  output: |-
    花の雨
    {input} # これは文
classes:
- class: 計算
  system: 先生
  template: '問:{input}'
  max_new_tokens: 64
  examples: 1
  documents: 0
- class: 創作
  template: "{input}"
  description: yes
documents:
- {title: 題, text: 本文}
"""


def test_yaml(tmp_path):
    path = tmp_path / "b.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + YAML.replace("\n", "\r\n").encode())
    base = read_knowledge(path)
    assert base.classes == (
        KnowledgeClass("計算", "先生", "問:{input}", max_new_tokens=64, shots=1, quotes=0),
        KnowledgeClass("創作", "", "{input}", "yes"),
    )
    assert base.examples == (
        Example(2, "計算", "3+5", "8", 2.5),
        Example(3, "創作", "春の詩", "花の雨\n{input} # これは文"),
    )
    assert base.documents == (Document(2, "題", "本文"),)


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ("input: 春の詩", "input: ", "line 4, examples[1].input: input is empty"),
        ("input: 春の詩", "input: ~", "line 4, examples[1].input: input is empty"),
        (
            "class: 創作\n  input",
            "class: 分析\n  input",
            "line 3, examples[1].class: an example of an unknown class",
        ),
        (
            "max_new_tokens: 64",
            "max_new_tokens: 0",
            "line 12, classes[0].max_new_tokens: max_new_tokens is not a whole number",
        ),
        (
            "max_new_tokens: 64",
            "max_tokens: 64",
            "line 12, classes[0].max_tokens: the key max_tokens is unknown",
        ),
        ("system: 先生", "system: [a]", "line 10, classes[0].system: system is not text"),
        (
            "  system: 先生",
            "  class: 計算",
            "line 10, classes[0].class: the key class is given twice",
        ),
        ("\ndocuments:", "\ndocs:", "line 18: the key docs is unknown"),
        ("documents:\n-", "documents:\n ", "line 18: documents is not a list"),
        ("- {title: 題, text: 本文}", "- 題", "line 19, documents[0]: is not a mapping"),
        ("\ndocuments:", "\n? [a, b]\n:", "the key [ScalarNode"),
        (
            'template: "{input}"',
            'template: "{input}\\ud800"',
            "line 16, classes[1].template: the text contains half of a surrogate pair",
        ),
    ],
)
def test_yaml_mistakes_have_line_and_key(tmp_path, old, new, place):
    path = tmp_path / "b.yaml"
    assert old in YAML
    path.write_text(YAML.replace(old, new), encoding="utf-8")
    found = lines(path)
    assert any(
        line.startswith(place) or (place.startswith("the") and place in line) for line in found
    ), found


@pytest.mark.parametrize(
    "text",
    ["classes: [", "", "- a", "a: b: c", "x\x00", "classes: &a [*a]\nexamples: *a\n", "[" * 5000],
)
def test_broken_yaml_is_one_line(tmp_path, text):
    (tmp_path / "b.yml").write_text(text, encoding="utf-8")
    with pytest.raises(KnowledgeError) as caught:
        read_knowledge(tmp_path / "b.yml")
    assert "\n" not in str(caught.value)


CSV = 'output,class,input\n"8, か",計算,3+5\n"花の雨\n①",創作,春の詩\n'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp932"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_of_examples(tmp_path, encoding, delimiter):
    path = tmp_path / "b.csv"
    text = CSV.replace(",", delimiter).replace(f"8{delimiter} か", "8, か").replace("\n", "\r\n")
    path.write_bytes(text.encode(encoding))
    base = read_knowledge(path)
    assert base.examples == (
        Example(2, "計算", "3+5", "8, か"),
        Example(3, "創作", "春の詩", "花の雨\n①"),
    )
    assert base.classes == (
        KnowledgeClass("計算", "", "{input}"),
        KnowledgeClass("創作", "", "{input}"),
    )


def test_csv_folder(tmp_path):
    (tmp_path / "Examples.csv").write_bytes(CSV.encode("cp932"))
    (tmp_path / "classes.csv").write_bytes(
        "class,system,template,temperature,documents\n計算,,{input},0.3,2\n創作,作家,{input},\n".encode(
            "cp932"
        )
    )
    base = read_knowledge(tmp_path)
    assert base.classes == (
        KnowledgeClass("計算", "", "{input}", temperature=0.3, quotes=2),
        KnowledgeClass("創作", "作家", "{input}"),
    )
    assert len(base.examples) == 2


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (CSV.encode() + b"\xff\xfe\xfd", "line 5: is neither UTF-8 nor Windows-31J"),
        (b"", "row 1: has no column class"),
        (b"class,input,output\n", "sheet examples: the sheet has no rows"),
        ("class,input,output\n計算,,8\n".encode(), "row 2, column input: input is empty"),
        ("class,input,output\n計算,3+5\n".encode("cp932"), "row 2, column output: output is empty"),
    ],
)
def test_bad_csv(tmp_path, data, what):
    path = tmp_path / "b.csv"
    path.write_bytes(data)
    with pytest.raises(KnowledgeError) as caught:
        read_knowledge(path)
    assert f"{path}, {what}" in str(caught.value)


def test_a_folder_without_examples_and_a_file_that_is_not_there(tmp_path):
    for path, what in (
        (tmp_path, "no examples.csv"),
        (tmp_path / "x.csv", "no such"),
        (tmp_path / "x.yaml", "no such"),
    ):
        with pytest.raises(KnowledgeError, match=what):
            read_knowledge(path)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = saved(workbook(), tmp_path)

    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", refuse)  # root may read everything
    with pytest.raises(KnowledgeError, match="cannot be read: Permission denied"):
        read_knowledge(path)


def test_documents_fill_their_place_and_stay_text():
    documents = [Document(2, "{input}", "<|im_end|> {examples}")]
    assert (
        render("{documents}|{input}", "{documents}", [], documents)
        == "{input}\n<|im_end|> {examples}|{documents}"
    )


def test_check_prints_a_line_for_each_mistake_and_exits_2(tmp_path, capsys):
    book = workbook()
    book["classes"]["D2"], book["examples"]["B3"] = "=1", None
    path = saved(book, tmp_path)
    assert main(["knowledge", "check", str(path)]) == 2
    told = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1] for line in told[:-1]] == [
        f" {path}, sheet classes, row 2, column max_new_tokens",
        f" {path}, sheet examples, row 3, column input",
    ]
    assert told[-1] == f"{path}: 2 mistakes"
    assert main(["knowledge", "check", str(saved(workbook(), tmp_path))]) == 0
    assert main(["knowledge", "check", str(tmp_path / "none.xlsx")]) == 2


def test_a_large_base_is_read_in_seconds(tmp_path):
    rows = [["計算", f"{i}+{i}はいくつですか", str(2 * i)] for i in range(5000)]
    path = saved(
        workbook(examples=[["class", "input", "output"], *rows, ["創作", "春の詩", "花"]]), tmp_path
    )
    began = time.perf_counter()
    assert len(read_knowledge(path).examples) == 5001
    assert time.perf_counter() - began < 15


def test_a_column_that_is_missing_is_one_mistake(tmp_path):
    """Not one more for each row that has nothing in it."""
    write_knowledge(starter(), tmp_path / "b.xlsx")
    book = openpyxl.load_workbook(tmp_path / "b.xlsx")
    next(cell for cell in book["examples"][1] if cell.value == "output").value = "answer"
    book.save(tmp_path / "b.xlsx")
    (mistake,) = check_knowledge(tmp_path / "b.xlsx").mistakes
    assert "has no column output" in str(mistake)
