"""infer --explain: JSON lines, the table, the confusion table, and what is refused."""

import json
import unicodedata
from pathlib import Path

import pytest

from evomerge.cli import main
from evomerge.cli.explaining import WIDTH, fit

ROOT = Path(__file__).resolve().parents[1]
BASE = str(ROOT / "evomerge" / "knowledge" / "examples_ja.yaml")
LABELLED = str(ROOT / "tests" / "labelled_tasks.jsonl")


def columns(text):
    return sum(2 if unicodedata.east_asian_width(c) in "WFA" else 1 for c in text)


def run(capsys, *options):
    code = main(["infer", *options])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


def test_json_lines(capsys):
    code, lines, err = run(capsys, "--explain", "--json", "--tasks", LABELLED, "--knowledge", BASE)
    rows = [json.loads(line) for line in lines]
    assert code in (0, None)
    assert [row["task_id"] for row in rows] == list(range(160))
    assert all(list(row) == ["task_id", "class", "confidence", "examples"] for row in rows)
    assert all(0 <= row["confidence"] <= 1 and len(row["examples"]) == 3 for row in rows)
    kinds = [
        json.loads(line)["kind"] for line in Path(LABELLED).read_text(encoding="utf-8").splitlines()
    ]
    right = sum(row["class"] == kind for row, kind in zip(rows, kinds, strict=True))
    assert f"right: {right} of 160" in err


def test_the_table_fits_80_columns(capsys):
    code, lines, _ = run(capsys, "--explain", "--tasks", LABELLED, "--knowledge", BASE)
    assert code in (0, None)
    assert max(map(columns, lines)) <= WIDTH
    counts = [[int(cell) for cell in line.split()[-8:]] for line in lines[-8:]]
    assert [sum(row) for row in counts] == [20] * 8
    assert f"right: {sum(counts[i][i] for i in range(8))} of 160" in "\n".join(lines)


def test_no_confusion_table_without_true_classes(capsys, tmp_path):
    tasks = tmp_path / "t.jsonl"
    tasks.write_text(
        '{"task_id": "\\ud83d", "input": "2+3は\\u001b[31m?", "kind": "other"}\n', encoding="utf-8"
    )
    code, lines, _ = run(capsys, "--explain", "--tasks", str(tasks), "--knowledge", BASE)
    assert code in (0, None)
    assert len(lines) == 2
    assert "\x1b" not in lines[1]
    assert lines[1].startswith("? ")
    assert (
        json.loads(
            run(capsys, "--explain", "--json", "--tasks", str(tasks), "--knowledge", BASE)[1][0]
        )["class"]
        == "計算"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--explain"], "nothing to explain without a knowledge base"),
        (["--explain", "--knowledge", BASE, "--retriever", "x"], "unknown retriever (found: 'x')"),
        (["--json", "--model", "m", "--out", "o"], "--json: goes with --explain"),
        (["--model", "m"], "--out"),
    ],
)
def test_refused(capsys, options, said):
    code, lines, err = run(capsys, "--tasks", LABELLED, *options)
    assert code == 2
    assert not lines
    assert said in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("abc", "abc   "),
        ("日本語", "日本語"),
        ("日本語で", "日本. "),
        ("abcdefg", "abcde."),
        ("か゛き", "か゛き"),
    ],
)
def test_fit(text, wanted):
    assert fit(text, 6) == wanted
