"""The runner behaves as `evomerge infer`: task files, units, room for the prompt, system turns,
output, finished answers; and it ends with one line, never with a traceback.
"""
# ruff: noqa: F401, F811  # family is a fixture

import json
import shutil
import sys
from dataclasses import replace

import openpyxl
import pytest
import torch
from runner_tools import (
    PROGRAM,
    a_base,
    engine_of,
    evomerge_answers,
    family,
    finish,
    loaded,
    own_prompter,
    rows,
    run,
    save_tokenizer,
    task_file,
)
from test_chat_template_faults import RAISING, TURNS, set_template
from test_device_memory import WORDINGS

from evomerge.console import seconds
from evomerge.reporting.runner import write_runner
from evomerge.study import PromptSection

sys.path.insert(0, str(PROGRAM[1].parent))
import answer_tools

ROWS = [("task_id", "input"), (0, "猫の「数」, あ"), (8, "犬\nと鳥")]
WANTED = {
    "0": {"task_id": 0, "input": "猫の「数」, あ"},
    "8": {"task_id": 8, "input": "犬\nと鳥"},
}


def lines(separator):
    return "\r\n".join(separator.join(f'"{cell}"' for cell in row) for row in ROWS) + "\r\n"


TABLES = {
    "csv": ("t.csv", lines(",").encode()),
    "csv of Excel": ("t.csv", b"\xef\xbb\xbf" + lines(",").encode()),
    "csv of Excel in Japan": ("t.csv", lines(",").encode("cp932")),
    "csv with semicolons": ("t.CSV", lines(";").encode()),
    "csv with tabs": ("t.csv", lines("\t").encode()),
    "csv of Google Sheets": ("t.csv", lines(",").replace('"8"', "8.0").encode()),
    "a JSON list": ("t.json", json.dumps(list(WANTED.values())).encode()),
    "a raw line break": (
        "t.jsonl",
        '{"task_id": 0, "input": "猫の「数」, あ"}\n{"task_id": 8, "input": "犬\nと鳥"}'.encode(),
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_task_files_that_infer_reads_too(tmp_path, name):
    file, data = TABLES[name]
    (tmp_path / file).write_bytes(data)
    assert answer_tools.read_tasks(tmp_path / file) == WANTED


@pytest.mark.parametrize("number", [8, 8.0, "8"])
def test_excel_files(tmp_path, monkeypatch, number):
    book = openpyxl.Workbook()
    for row in [("output", " input ", "task_id"), *[("x", t, i) for i, t in ROWS[1:]], (None,) * 3]:
        book.active.append(row)
    book.active.cell(3, 3, number)
    book.save(tmp_path / "t.xlsx")
    assert answer_tools.read_tasks(tmp_path / "t.xlsx") == WANTED
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(SystemExit, match="pip install openpyxl, or save the tasks as CSV"):
        answer_tools.read_tasks(tmp_path / "t.xlsx")


BAD = {
    "no file": ("t.jsonl", None, "no such task file"),
    "another type": ("t.ods", b"x", "unknown type of task file"),
    "no JSON": ("t.jsonl", b'{"input": "a"}\n{"input"', "line 2: is not valid JSON"),
    "no object": ("t.jsonl", b"[1]", "line 1: a record is not an object"),
    "deep JSON": ("t.jsonl", b"[" * 10**5, "line 1: is not valid JSON"),
    "no text": ("t.jsonl", b"\xff\xfe\x00\xd8\x81", "is not UTF-8"),
    "no input": ("t.csv", b"task_id,text\n0,a\n", "has no column `input`"),
    "an empty input": ("t.csv", b"task_id,input\n0,\n", "row 2: has no text"),
    "a number as input": ("t.jsonl", b'{"input": 5}', "line 1: has no text"),
    "an id of its own kind": ("t.jsonl", b'{"input": "a", "task_id": [1]}', "neither a number"),
    "an id twice": ("t.csv", b"task_id,input\n1,a\n1.0,b\n", "row 3: repeats"),
    "nothing": ("t.csv", b"task_id,input\n", "contains no tasks"),
    "an empty file": ("t.jsonl", b"", "contains no tasks"),
    "no Excel file": ("t.xlsx", b"PK\x03\x04", "not a readable Excel file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_task_files_are_one_line(family, tmp_path, monkeypatch, capsys, name):
    file, data, words = BAD[name]
    write_runner(finish(family), tmp_path / "r", None)
    if data is not None:
        (tmp_path / file).write_bytes(data)
    with pytest.raises(SystemExit, match=words) as caught:
        run(tmp_path / "r", monkeypatch, "--tasks", tmp_path / file, "--out", tmp_path / "o")
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "text",
    [
        *("90s", "55m", "55 m", "1h30m", "1h 30m", "3600", "2d", "1.5h", "0.001s", " 5m "),
        *("", "0", "0s", "-1", "1h30", "1m1h", "soon", "1e9", "nan", "inf", "9" * 400, "900000d"),
        *("5" + " " * 10_000 + "x", "1" * 10_000, "1." * 5_000),
    ],
)
def test_units_are_those_of_every_command(text):
    wanted = seconds(text)
    if wanted is None:
        with pytest.raises(Exception, match="not a duration"):
            answer_tools.seconds(text)
    else:
        assert answer_tools.seconds(text) == wanted


def test_wrong_options_are_lines(family, tmp_path, monkeypatch, capsys):
    write_runner(finish(family), tmp_path / "r", None)
    tasks = task_file(tmp_path, 2)
    out = tmp_path / "o.jsonl"
    for options, words in (
        (["--out", tmp_path], "is a folder"),
        (["--out", tasks], "would overwrite the tasks"),
        (["--out", out, "--time-limit", "soon"], "write 90s, 55m or 1h30m"),
        (["--out", out, "--path", "somewhere"], "write NAME=FOLDER"),
    ):
        with pytest.raises(SystemExit) as caught:
            run(tmp_path / "r", monkeypatch, "--tasks", tasks, *options)
        assert caught.value.code == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
    assert len(rows(tasks)) == 2


def test_ctrl_c_and_other_failures_are_lines_that_keep_the_answers(
    family, tmp_path, monkeypatch, capsys
):
    write_runner(finish(family), tmp_path / "r", None)
    tasks, out = task_file(tmp_path, 16), tmp_path / "new" / "o.jsonl"
    answer = loaded(tmp_path / "r")
    monkeypatch.setattr(sys, "argv", ["answer.py", "--tasks", str(tasks), "--out", str(out)])
    one = answer.answer
    for error, code, words in (
        (KeyboardInterrupt(), 130, "interrupted; finished answers are kept"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (RuntimeError("CUDA error:\nan illegal access"), 1, "CUDA error: an illegal access"),
    ):
        left = [1]

        def failing(*arguments, left=left, error=error):
            if not left:
                raise error
            left.pop()
            return one(*arguments)

        monkeypatch.setattr(answer, "answer", failing)
        with pytest.raises(SystemExit, match=words) as caught, answer.tools.one_line_errors():
            answer.main()
        assert caught.value.code == code
        assert capsys.readouterr().err.count("answer.py: ") == 1
    kept = json.loads(out.with_name("o.jsonl.part").read_text("utf-8"))
    assert len(kept) == 12, "a batch of four a time"
    monkeypatch.setattr(answer, "answer", one)
    answer.main()
    assert (
        evomerge_answers(finish(family), tasks, tmp_path / "ours.jsonl", None) == out.read_bytes()
    )
    out.with_name("o.jsonl.part").write_text("{torn", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--overwrite"])
    with pytest.raises(SystemExit, match="contains no readable answers"):
        answer.main()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried"),
        MemoryError(),
        *map(RuntimeError, WORDINGS),
    ],
)
def test_memory_that_runs_out_halves_the_batch(family, tmp_path, monkeypatch, error):
    write_runner(finish(family), tmp_path / "r", None)
    tasks, out = task_file(tmp_path, 12), tmp_path / "o.jsonl"
    answer = loaded(tmp_path / "r")
    model = answer.tools.load(family / "base")
    generate, sizes = type(model).generate, []

    def short(self, ids, **options):
        sizes.append(len(ids))
        if len(ids) > 2:
            raise error
        return generate(self, ids, **options)

    monkeypatch.setattr(type(model), "generate", short)
    monkeypatch.setattr(sys, "argv", ["answer.py", "--tasks", str(tasks), "--out", str(out)])
    answer.main()
    assert sizes == [4, *[2] * 6]
    assert len(rows(out)) == 12


def test_half_of_a_small_context_is_for_the_prompt(family, tmp_path, monkeypatch):
    """A class that wants 390 of the context's 400 tokens for its answers gets 200."""
    base = a_base()
    longer = tuple(replace(kind, max_new_tokens=390) for kind in base.classes)
    base = replace(base, classes=longer)
    finished = finish(family)
    write_runner(finished, tmp_path / "r", base)
    tasks = task_file(tmp_path, 4)
    run(tmp_path / "r", monkeypatch, "--tasks", tasks, "--out", tmp_path / "theirs.jsonl")
    wanted = evomerge_answers(finished, tasks, tmp_path / "ours.jsonl", base)
    assert (tmp_path / "theirs.jsonl").read_bytes() == wanted
    answer = loaded(tmp_path / "r")
    _, own = answer.prompts(engine_of(finished).tokenizer, 400, ["猫"])
    assert own[0]["max_new_tokens"] == 200


def test_answers_that_were_cut_say_so_as_in_infer(family, tmp_path, monkeypatch):
    finished = finish(family, max_new_tokens=2)
    write_runner(finished, tmp_path / "r", None)
    tasks = task_file(tmp_path, 12)
    run(tmp_path / "r", monkeypatch, "--tasks", tasks, "--out", tmp_path / "theirs.jsonl")
    wanted = evomerge_answers(finished, tasks, tmp_path / "ours.jsonl", None)
    assert (tmp_path / "theirs.jsonl").read_bytes() == wanted
    assert any(row.get("truncated") for row in rows(tmp_path / "theirs.jsonl"))


def copy_with(template, family, folder):
    shutil.copytree(family / "base", folder)
    set_template(folder, template)
    return folder


def test_a_system_turn_that_the_template_does_not_know_goes_above(family, tmp_path):
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    finished = finish(family, prompt=PromptSection(system="短く。"))
    base = a_base()
    write_runner(finished, tmp_path / "r", base)
    engine, answer = engine_of(finished), loaded(tmp_path / "r")
    engine.tokenizer.chat_template = refuses + TURNS
    texts = ["猫あ", "魚の色", "数"]
    prepared = own_prompter(finished, engine, base).prepare(texts)
    for wanted, choice in zip(prepared, answer.choose(texts), strict=True):
        whole, _ = answer.prompt(engine.tokenizer, 10_000, *choice)
        assert whole == wanted.text
        assert "<|system|>" not in whole
        assert whole.startswith(f"<|user|>{choice[1]['system'][:5]}")


@pytest.mark.parametrize("name", ["raise_exception", "a syntax error", "an undefined name"])
def test_a_template_that_raises_is_one_line(family, tmp_path, monkeypatch, capsys, name):
    template, words = RAISING[name]
    model = copy_with(template, family, tmp_path / "model")
    write_runner(finish(family), tmp_path / "r", None)
    arguments = ["--tasks", task_file(tmp_path, 2), "--out", tmp_path / "o", "--model", model]
    with pytest.raises(SystemExit, match=f"the chat template of {model} cannot be") as caught:
        run(tmp_path / "r", monkeypatch, *arguments)
    assert words in str(caught.value)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_finished_answers_are_kept(family, tmp_path, monkeypatch, capsys):
    write_runner(finish(family), tmp_path / "r", None)
    tasks, out = task_file(tmp_path, 3), tmp_path / "o.jsonl"
    arguments = ("--tasks", tasks, "--out", out)
    out.write_text("my notes\n")
    with pytest.raises(SystemExit, match="what it was made from is not known"):
        run(tmp_path / "r", monkeypatch, *arguments)
    assert out.read_text() == "my notes\n"
    run(tmp_path / "r", monkeypatch, *arguments, "--overwrite")
    before = out.read_bytes()
    capsys.readouterr()
    run(tmp_path / "r", monkeypatch, *arguments)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"answers from another run \(changed: model"):
        run(tmp_path / "r", monkeypatch, *arguments, "--model", family / "base")
    fewer = task_file(tmp_path / "r", 2)
    with pytest.raises(SystemExit, match=r"answers from another run \(changed: tasks"):
        run(tmp_path / "r", monkeypatch, "--tasks", fewer, "--out", out)
    assert out.read_bytes() == before
    out.write_bytes(before + b"x")
    with pytest.raises(SystemExit, match="was changed after it was written"):
        run(tmp_path / "r", monkeypatch, *arguments)
