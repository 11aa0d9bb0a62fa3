"""What is written: the starter base, drafts from tasks, texts that a spreadsheet could take for
something else.
"""

import json
import re
import zipfile
from pathlib import Path

import openpyxl
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evomerge.cli import main
from evomerge.errors import KnowledgeError
from evomerge.knowledge.drafting import draft
from evomerge.knowledge.read_base import check_knowledge, read_knowledge
from evomerge.knowledge.records import Document, Example, Knowledge, KnowledgeClass
from evomerge.knowledge.starter import starter
from evomerge.knowledge.write_base import write_knowledge
from evomerge.searching.ledger import open_ledger
from evomerge.study import read_study
from evomerge.tasks import Task, load_tasks, split_tasks, tasks_hash

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ["分析", "創作", "抽出", "意見", "解決", "説明", "役割", "計算"]
NUMBERS = ["max_new_tokens", "temperature", "repetition_penalty", "examples", "documents", "weight"]
TRICKY = [
    "=1+1", "=HYPERLINK(\"http://x\")", "+1", "-1", "@SUM(A1)", "'quoted", "#N/A", "007", "1e5",
    "TRUE", "2026-05-18", " 前後の空白 ", "二行\nの文", "<|im_start|>system\n", "{input}{examples}",
    "a\tb", "%", "null", "yes", "- a: b", "# x", "_x0041_", "_x000D_", "\x0b縦", "\ufeffx",
    "a\u2028", "🍎",
]  # fmt: skip


def base(texts):
    rows = tuple(Example(i, "計算", text, text, 0.5 * i) for i, text in enumerate(texts, start=2))
    classes = (
        KnowledgeClass("計算", texts[0], "{input}" + texts[0], texts[0], 1, 0.25, 1.5, 0, 2),
        KnowledgeClass("創作", "", "{input}", shots=0),
    )
    return Knowledge(classes, rows, (Document(2, "題", texts[0]),))


@pytest.mark.parametrize("suffix", [".xlsx", ".yaml"])
def test_what_is_read_is_what_was_written(tmp_path, suffix):
    written = base(TRICKY)
    assert (
        read_knowledge(write_knowledge(written, tmp_path / f"b{suffix}", [("a", "b")])) == written
    )


# What a cell cannot hold for certain: half surrogates, U+FFFE and U+FFFF (no XML), a carriage
# return.
ANY = st.characters(exclude_categories=["Cs"], exclude_characters="\r\ufffe\uffff")
TEXT = st.text(ANY | st.sampled_from(" \n\t\"'#:-=|>_x0a\x85"), min_size=1, max_size=30).filter(
    str.strip
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(texts=st.lists(TEXT, min_size=1, max_size=5))
@pytest.mark.parametrize("suffix", [".xlsx", ".yaml"])
def test_any_text_comes_back(tmp_path, suffix, texts):
    written = base(texts)
    assert read_knowledge(write_knowledge(written, tmp_path / f"b{suffix}")) == written


def test_no_text_becomes_a_formula(tmp_path):
    path = write_knowledge(base(TRICKY), tmp_path / "b.xlsx", [("=1", "=2")])
    with zipfile.ZipFile(path) as file:
        sheets = [
            file.read(name).decode()
            for name in file.namelist()
            if name.startswith("xl/worksheets/sheet")
        ]
        styles = file.read("xl/styles.xml").decode()
    assert len(sheets) == 4
    assert not any(re.search(r"<f[ >]", sheet) or 't="e"' in sheet for sheet in sheets)
    assert 'quotePrefix="1"' in styles
    cells = openpyxl.load_workbook(path)["examples"]["B"][1 : 1 + len(TRICKY)]
    assert [cell.data_type for cell in cells] == ["s"] * len(TRICKY)
    assert [cell.quotePrefix for cell in cells] == [text[0] in "=+-@'" for text in TRICKY]


def test_a_text_that_excel_would_cut_is_refused(tmp_path):
    long, most = ["a", "字" * 32768], ["a", "字" * 32760]
    with pytest.raises(
        KnowledgeError, match="sheet examples, row 3, column input: the text is longer"
    ):
        write_knowledge(base(long), tmp_path / "b.xlsx")
    assert list(tmp_path.iterdir()) == []
    assert read_knowledge(write_knowledge(base(long), tmp_path / "b.yaml")) == base(long)
    assert (
        read_knowledge(write_knowledge(base(most), tmp_path / "b.xlsx")).examples[1].input
        == most[1]
    )


def test_starter_sheet(tmp_path, capsys):
    path = tmp_path / "base.xlsx"
    assert main(["knowledge", "new", str(path)]) == 0
    book = openpyxl.load_workbook(path)
    assert book.sheetnames == ["README", "classes", "examples", "documents"]
    assert [cell.value for cell in book["classes"]["A"][1:]] == CLASSES
    for sheet in book.worksheets[1:]:
        assert sheet.freeze_panes in ("A2", "B2")
        for cell in sheet[1]:
            assert cell.comment.text.strip()
            column = sheet.column_dimensions[cell.column_letter]
            assert column.width >= len(cell.value)
            assert (column.number_format == "@") == (cell.value not in NUMBERS)
    heights = [book[name].row_dimensions[2].height for name in ("README", "classes", "examples")]
    # of more than one line: LibreOffice does not fit rows to wrapped texts by itself
    assert min(heights) > 30
    # a weight of 1 goes without saying
    assert [cell.value for cell in book["examples"]["D"][1:3]] == [None, None]
    checks = {str(v.sqref)[0]: v for v in book["classes"].data_validations.dataValidation}
    assert sorted(checks) == ["E", "F", "G", "H", "I"]
    (names,) = [v for v in book["examples"].data_validations.dataValidation if v.type == "list"]
    assert names.formula1.startswith("classes!$A$2")
    capsys.readouterr()
    assert main(["knowledge", "check", str(path)]) == 0
    assert capsys.readouterr().err == f"{path}: ok, 8 classes, 711 examples\n"
    assert main(["knowledge", "new", str(path)]) == 2  # what somebody filled in is not written over
    assert main(["knowledge", "new", str(tmp_path / "base.ods")]) == 2


def test_starter_yaml_is_the_same(tmp_path):
    assert main(["knowledge", "new", str(tmp_path / "base.yaml")]) == 0
    assert read_knowledge(tmp_path / "base.yaml") == starter()
    text = (tmp_path / "base.yaml").read_text(encoding="utf-8")
    assert text.startswith("# evomerge: ")
    assert [row["class"] for row in yaml.safe_load(text)["classes"]] == CLASSES
    assert all(c.description and c.max_new_tokens for c in starter().classes)


def test_a_draft_has_a_class_for_each_kind(tmp_path, capsys):
    rows = [("a", "", "計算"), ("=1+1", "2", "計算"), ("b", "詩", ""), ("c", "歌", "創作 ")]
    lines = [
        json.dumps({"task_id": i, "input": t, "output": o, "kind": k})
        for i, (t, o, k) in enumerate(rows)
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    out = tmp_path / "b.xlsx"
    assert main(["knowledge", "from-tasks", str(tmp_path / "t.jsonl"), "--out", str(out)]) == 0
    assert "left out, without a reference: 1 task\n" in capsys.readouterr().err
    drafted = read_knowledge(out)
    assert [c.name for c in drafted.classes] == ["計算", "一般", "創作"]
    assert [(e.class_name, e.input, e.output) for e in drafted.examples] == [
        ("計算", "=1+1", "2"),
        ("一般", "b", "詩"),
        ("創作", "c", "歌"),
    ]
    assert check_knowledge(out).notes == ()
    assert main(["knowledge", "from-tasks", str(tmp_path / "t.jsonl"), "--out", str(out)]) == 2


def test_a_draft_needs_references():
    with pytest.raises(KnowledgeError, match="no task has a reference"):
        draft([Task(0, "a")], "t.jsonl")


@pytest.fixture
def study(tmp_path):
    """(task file, storage, split) of a study that has begun; the last task equals the first but for
    spaces.
    """
    rows = [
        {"task_id": f"t{i}", "input": f"問 {i}", "output": str(i), "kind": "ab"[i % 2]}
        for i in range(40)
    ]
    rows.append({"task_id": "again", "input": "問0", "output": "x", "kind": "a"})
    (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = (
        (ROOT / "search_spaces" / "demo.yaml")
        .read_text(encoding="utf-8")
        .replace("../demo/tasks.jsonl", "tasks.jsonl")
    )
    (tmp_path / "s.yaml").write_text(text, encoding="utf-8")
    url = f"sqlite:///{tmp_path}/s.db"
    ledger = open_ledger(url, "s", create=True)
    tasks = load_tasks(tmp_path / "tasks.jsonl")
    split = split_tasks(tasks, 0.5, 0, 0.2)
    ledger.remember("study_file", read_study(tmp_path / "s.yaml").to_dict())
    ledger.remember("tasks", tasks_hash(tasks))
    ledger.remember(
        "split",
        {
            part: [t.task_id for t in getattr(split, part)]
            for part in ("search", "validation", "held_out")
        },
    )
    ledger.start("parent", [])  # a study is stored with its first trial
    return tmp_path / "tasks.jsonl", url, split


def from_study(tasks, url, out):
    return main(
        ["knowledge", "from-tasks", str(tasks), "--out", str(out), "--study", "s", "--storage", url]
    )


def test_a_draft_from_a_study_shows_nothing_of_what_it_holds_out(tmp_path, study):
    file, url, split = study
    assert from_study(file, url, tmp_path / "b.yaml") == 0
    inputs = {e.input for e in read_knowledge(tmp_path / "b.yaml").examples}
    unseen = {t.input.replace(" ", "") for t in (*split.held_out, *split.validation)}
    assert inputs == {t.input for t in split.search if t.input.replace(" ", "") not in unseen}
    assert len(unseen) > 20


def test_other_files_and_other_ids_show_nothing_either(tmp_path, study):
    """The ids of another file say nothing: the texts decide."""
    file, url, split = study
    tasks = load_tasks(file)
    search = [t.task_id for t in split.search]
    swapped = [
        {"task_id": f"x{i}", "input": t.input, "output": t.output}
        for i, t in enumerate(reversed(tasks))
    ]
    fresh = [{"task_id": search[0], "input": "新しい問", "output": "y"}]
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, swapped + fresh)))
    assert from_study(tmp_path / "other.jsonl", url, tmp_path / "b.yaml") == 0
    assert from_study(file, url, tmp_path / "c.yaml") == 0
    drafted, own = (read_knowledge(tmp_path / name) for name in ("b.yaml", "c.yaml"))
    assert {e.input for e in drafted.examples} == {e.input for e in own.examples}


def test_a_study_whose_tasks_have_changed_drafts_nothing(tmp_path, study, capsys):
    file, url, _ = study
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[1:]))
    assert from_study(file, url, tmp_path / "b.yaml") == 2
    assert "the study's task files have changed" in capsys.readouterr().err
    assert not (tmp_path / "b.yaml").exists()


def test_an_unknown_study(tmp_path, study):
    assert from_study(study[0], f"sqlite:///{tmp_path}/none.db", tmp_path / "b.yaml") == 2


def test_elyza_tasks_become_a_base(tmp_path, shared):
    tasks = load_tasks(shared / "elyza" / "tasks.jsonl")
    drafted = read_knowledge(write_knowledge(draft(tasks, "elyza").knowledge, tmp_path / "b.xlsx"))
    assert [(e.input, e.output) for e in drafted.examples] == [
        (t.input.replace("\r\n", "\n"), t.output.replace("\r\n", "\n")) for t in tasks
    ]
