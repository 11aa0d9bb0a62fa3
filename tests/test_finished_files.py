"""Finished answers, grades and judges are never silently overwritten: the same command does
nothing, another one is refused, and an unfinished one goes on.
"""

import json
import shutil

import pytest
from test_infer_command import BASE, KINDS, rows_of

from evomerge.answering.hf.engine import TransformersEngine
from evomerge.cli import main
from evomerge.errors import InputError
from evomerge.finished import is_finished, record_made
from evomerge.knowledge.records import Knowledge
from evomerge.knowledge.write_base import write_knowledge

FP32 = ("--set", "search.dtype=float32")


@pytest.fixture
def place(pair, tmp_path):
    """Tasks, another task file, two bases, and the start of a command."""
    for name, texts in (("tasks", ["あいか", "いうき", "123"]), ("others", ["あいか", "いう"])):
        rows = [{"task_id": i, "input": text} for i, text in enumerate(texts)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_knowledge(BASE, tmp_path / "base.yaml")
    write_knowledge(Knowledge(KINDS, BASE.examples[1:]), tmp_path / "less.yaml")
    return tmp_path


def infer(pair, place, *options, tasks="tasks", model="base", limit=4):
    command = ["infer", "--tasks", place / f"{tasks}.jsonl", "--out", place / "a.jsonl", *FP32]
    command += ["--model", pair / model, "--max-new-tokens", limit, *options]
    return main(list(map(str, command)))


def content(place):
    files = (place / "a.jsonl", place / "a.jsonl.made")
    return [path.read_bytes() for path in files]


def test_the_same_command_says_so_and_loads_nothing(pair, place, capsys, monkeypatch):
    based = ("--knowledge", place / "base.yaml")
    assert infer(pair, place, *based) == 0
    before = content(place)
    capsys.readouterr()

    def load(*_):
        raise AssertionError("a model was loaded")

    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "__init__", load)
        assert infer(pair, place, *based) == 0
        # however its files are called
        shutil.copytree(pair / "base", place / "copy")
        shutil.copy(place / "tasks.jsonl", place / "same.jsonl")
        assert infer(pair, place, *based, model=place / "copy", tasks="same") == 0
        assert infer(pair, place, *based, "--time-limit", "1h30m") == 0
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 3
    assert all("holds these answers already: nothing to do" in line for line in said)
    assert content(place) == before


OTHERS = {
    "model": {"model": "instruct"},
    "tasks": {"tasks": "others"},
    "generation settings": {"limit": 5},
    "prompts": {"options": ("--format", "competition")},
    "engine": {"options": ("--set", "engine.batch_size=2")},
    "knowledge base": {"options": ("--knowledge", "less.yaml")},
    "choice among answers": {"options": ("--best-of", "2")},
}


@pytest.mark.parametrize("named", OTHERS)
def test_another_command_is_refused_and_names_what_is_other(pair, place, capsys, named):
    assert infer(pair, place, "--knowledge", place / "base.yaml", "--set", "prompt.system=") == 0
    before = content(place)
    capsys.readouterr()
    other = dict(OTHERS[named])
    options = [place / o if o.endswith(".yaml") else o for o in other.pop("options", ())]
    based = [] if "--knowledge" in options else ["--knowledge", place / "base.yaml"]
    arguments = (*based, "--set", "prompt.system=", *options)
    assert infer(pair, place, *arguments, **other) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"a.jsonl: holds answers from another run (changed: {named}" in line
    assert "--overwrite" in line
    assert content(place) == before
    assert infer(pair, place, *arguments, "--overwrite", **other) == 0
    assert content(place) != before


def test_a_file_of_unknown_origin_and_a_changed_one_are_refused(pair, place, capsys):
    (place / "a.jsonl").write_text("my own notes\n")
    assert infer(pair, place) == 2
    assert "what it was made from is not known" in capsys.readouterr().err
    assert (place / "a.jsonl").read_text() == "my own notes\n"
    assert infer(pair, place, "--overwrite") == 0
    with (place / "a.jsonl").open("a") as file:
        file.write("my own line\n")
    assert infer(pair, place) == 2
    assert "was changed after it was written" in capsys.readouterr().err


def test_an_unfinished_file_goes_on_and_another_command_is_refused(pair, place, capsys):
    assert infer(pair, place, "--time-limit", "0.0001s") == 1
    assert all(row["unfinished"] == "time limit" for row in rows_of(place / "a.jsonl"))
    assert infer(pair, place, model="instruct") == 2
    capsys.readouterr()
    assert infer(pair, place) == 0
    assert not any("unfinished" in row for row in rows_of(place / "a.jsonl"))
    assert infer(pair, place) == 0
    assert "nothing to do" in capsys.readouterr().err


def test_what_version_0_2_left_unfinished_goes_on(pair, place):
    """It kept OUT.part beside OUT, and no OUT.made."""
    assert infer(pair, place, "--time-limit", "0.0001s") == 1
    (place / "a.jsonl.made").unlink()
    assert infer(pair, place) == 0
    assert not any("unfinished" in row for row in rows_of(place / "a.jsonl"))


def test_overwriting_gives_up_the_unfinished_answers_of_another_run(pair, place, capsys):
    assert infer(pair, place, "--time-limit", "0.0001s") == 1
    (place / "a.jsonl").unlink()
    assert infer(pair, place, model="instruct") == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert infer(pair, place, "--overwrite", model="instruct") == 0


def test_answers_that_were_cut_say_so(pair, place):
    assert infer(pair, place, limit=1) == 0
    assert any(row.get("truncated") is True for row in rows_of(place / "a.jsonl"))
    grades = ["judge", "grade", "--tasks", place / "tasks.jsonl", "--answers", place / "a.jsonl"]
    assert main(list(map(str, grades))) == 0, "a reader takes the key"


def grade(place, *options, answers="answers"):
    command = ["judge", "grade", "--tasks", place / "tasks.jsonl", "--out", place / "g.jsonl"]
    return main(list(map(str, [*command, "--answers", place / f"{answers}.jsonl", *options])))


def test_grades_are_kept_too(place, capsys):
    for name, text in (("answers", "か"), ("better", "き")):
        rows = [{"task_id": i, "output": text} for i in range(3)]
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert grade(place) == 0
    before = (place / "g.jsonl").read_bytes()
    capsys.readouterr()
    assert grade(place) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert grade(place, answers="better") == 2
    assert "holds grades from another run (changed: answers)" in capsys.readouterr().err
    assert (place / "g.jsonl").read_bytes() == before
    assert grade(place, "--overwrite", answers="better") == 0


@pytest.mark.parametrize("broken", ["", "{", "[]", '{"facts": 5}', "[" * 10**5])
def test_a_record_that_cannot_be_read_is_none(tmp_path, broken):
    out = tmp_path / "a"
    out.write_text("x")
    record_made(out, {"model": "1"})
    assert is_finished(out, {"model": "1"}, "answers")
    (tmp_path / "a.made").write_text(broken)
    with pytest.raises(InputError, match="is not known"):
        is_finished(out, {"model": "1"}, "answers")
