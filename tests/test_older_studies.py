"""Studies of version 0.1: unfinished ones end as it would have ended them, a finished one is shown.

fixtures/study-0.1/make.py made them with 0.1. Everything here goes through the command line, so
that it holds whatever becomes of the modules; only `grades` reads a storage itself.
"""

import csv
import hashlib
import json
import runpy
import shutil
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import optuna
import pytest
from chat_server import Server
from fault_server import answer_of

FIXTURE = Path(__file__).parent / "fixtures/study-0.1"
UNFINISHED = ("default", "two-files", "race", "warm", "llm")
# What is drawn after the resumption goes through LAPACK, whose last bits are the machine's.
WEIGHT, FIGURE = 1e-12, 1e-9


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A copy of the fixture: its storages are SQLite files again, and name this folder."""
    for name in ("models", "tasks", "studies"):
        shutil.copytree(FIXTURE / name, tmp_path / name)
    for file in (FIXTURE / "storage").iterdir():
        suffix = ".sqlite" if "." in file.stem else ".db"
        with closing(sqlite3.connect(tmp_path / f"{file.stem}{suffix}")) as db:
            db.executescript(located(file, tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def located(file, place):
    return file.read_text(encoding="utf-8").replace("@FIXTURE@", str(place))


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def expected(name):
    return read(FIXTURE / f"expected-{name}.json")


def evomerge(monkeypatch, *arguments):
    """`python -m evomerge …` in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["evomerge", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("evomerge", run_name="__main__")
    return ended.value.code


@pytest.fixture
def run(place, monkeypatch, capsys):
    """run(command, study, …) -> what it printed."""

    def called(command, name, *more):
        subject = f"studies/{name}.yaml" if command == "search" else name
        where = ["--storage", f"sqlite:///{place}/{name}.db"]
        where += ["--results", place / "results"] if command in ("search", "report") else []
        capsys.readouterr()
        code = evomerge(monkeypatch, command, subject, *where, *more)
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return called


@pytest.fixture
def judge_url():
    """A judge whose grade is a function of the answer, as for the fixture; what it graded."""

    def graded(number, prompt):
        grade = 1 + hashlib.sha256(answer_of(prompt).encode()).digest()[0] % 5
        return {"text": json.dumps({"reason": "", "grade": grade})}

    server = Server(plan=graded)
    with server.running() as url:
        yield url, server.answered


def grades(place, name):
    """Trial number -> grades by task. Only this knows how a trial's result is stored."""
    study = optuna.load_study(study_name=name, storage=f"sqlite:///{place}/{name}.db")
    trials = [t for t in study.get_trials(deepcopy=False) if "result" in t.user_attrs]
    return {t.number: t.user_attrs["result"]["grades"] for t in trials}


def table(path):
    """Trial number -> its row of trials.csv."""
    with path.open(encoding="utf-8", newline="") as file:
        return {row["number"]: row for row in csv.DictReader(file)}


def close(wanted):
    return pytest.approx(wanted, abs=FIGURE)


def part(found, wanted):
    """What is found under the keys that are wanted: a later version may show more."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        return {key: part(found[key], value) for key, value in wanted.items() if key in found}
    if isinstance(wanted, list) and isinstance(found, list) and len(found) == len(wanted):
        return [part(f, w) for f, w in zip(found, wanted, strict=True)]
    return found


def from_one(trial):
    """A trial that 0.1 showed, whose generations and candidates counted from 0."""
    shift = 1 if trial["role"] == "candidate" else 0
    places = {key: trial[key] for key in ("generation", "index")}
    for key, value in places.items():
        if value not in (None, ""):  # "" in a table
            places[key] = type(value)(int(value) + shift)
    return trial | places


def same_trials(found, wanted):
    """Every figure of the complete trials, in order; not their numbers, which kills shift."""
    complete = [t for t in found if t["state"] == "complete"]
    places = [(t["role"], t["generation"], t["index"]) for t in map(from_one, wanted)]
    assert [(t["role"], t["generation"], t["index"]) for t in complete] == places
    for place, trial, known in zip(places, complete, wanted, strict=True):
        assert trial["weights"] == pytest.approx(known["weights"], abs=WEIGHT), place
        for key in ("score", "stderr", "n", "truncated"):
            assert trial[key] == close(known[key]), (place, key)


def same_verdict(found, wanted):
    """The same scores and differences. 0.1 resampled the tasks, and an interval is Student's now:
    symmetric, and somewhat wider.
    """
    assert (found["metric"], found["n"]) == (wanted["metric"], wanted["n"])
    assert list(found["candidates"]) == list(wanted["candidates"])
    for name, figures in wanted["candidates"].items():
        assert part(found["candidates"][name], figures) == close(figures), name
    assert list(found["paired"]) == list(wanted["paired"])
    for name, figures in wanted["paired"].items():
        pair = found["paired"][name]
        assert pair["diff"] == close(figures["diff"])
        assert (pair["low"] + pair["high"]) / 2 == close(figures["diff"])
        width = figures["high"] - figures["low"]
        assert width <= pair["high"] - pair["low"] <= 1.35 * width


def same_end(place, name, out, wanted):
    """What the study shows now, and the results that it wrote."""
    shown, results = json.loads(out), place / "results" / name
    same_trials(shown["trials"], wanted["trials"])
    same_verdict(shown["verdict"], wanted["verdict"])
    same_verdict(read(results / "verdict.json"), wanted["verdict"])
    graded, rows = grades(place, name), table(results / "trials.csv")
    numbers = [t["number"] for t in shown["trials"] if t["state"] == "complete"]
    for number, known in zip(numbers, wanted["trials"], strict=True):
        assert graded[number].keys() == known["grades"].keys()
        for task, grade in known["grades"].items():
            assert part(graded[number][task], grade) == close(grade), (number, task)
        for column, value in known["parts"].items():
            assert float(rows[str(number)][f"part {column}"]) == close(value)
    return shown


@pytest.mark.parametrize("name", UNFINISHED)
def test_an_unfinished_study_ends_as_it_would_have(place, run, judge_url, name):
    wanted, (url, answered) = expected(name), judge_url
    before = wanted["before"]
    if before is not None:  # there was a finished candidate, without which nothing is shown
        before["trials"] = [from_one(t) for t in before["trials"]]
        assert part(json.loads(run("show", name, "--json")), before) == before
    run("search", name, *(["--set", f"judge.base_url={url}"] if name == "llm" else []))
    shown = same_end(place, name, run("show", name, "--json"), wanted)
    old, new = before["trials"] if before else [], shown["trials"]
    old = [t | {"state": "failed"} if t["state"] == "running" else t for t in old]
    assert part(new[: len(old)], old) == old
    asked = wanted["votes"] - wanted["votes before"]
    assert sum(answered.values()) == asked, "grades that were kept were not found"
    if name == "default":  # its models are named so that the answers' keys hold in every folder
        batches = f", {wanted['batches']} batches"
        assert batches in run("cache", name), "answers that were kept were not found"


def test_a_finished_study_is_shown_as_it_was(place, run):
    kept = FIXTURE / "finished"
    wanted = json.loads(located(kept / "show.json", place))
    wanted["trials"] = [from_one(t) for t in wanted["trials"]]
    assert part(json.loads(run("show", "finished", "--json")), wanted) == wanted
    assert run("export", "finished") == located(kept / "export.yaml", place)
    front = json.loads(run("show", "finished", "--json", "--pareto"))["pareto"]
    known = {trial["number"]: trial for trial in wanted["trials"]}
    for point in front["points"]:
        assert set(point["values"]) == {"grade", "answer_tokens"}
        assert point["values"]["grade"]["mean"] == close(known[point["trial"]]["score"])
    assert run("export", "finished", "--point", "knee")
    run("report", "finished")
    results = place / "results/finished"
    assert (results / "best.yaml").read_text(encoding="utf-8") == located(kept / "best.yaml", place)
    wanted = read(kept / "verdict.json")
    assert part(read(results / "verdict.json"), wanted) == wanted
    rows, wanted = table(results / "trials.csv"), table(kept / "trials.csv")
    assert rows.keys() == wanted.keys()
    wanted = {number: from_one(row) for number, row in wanted.items()}
    assert part(rows, wanted) == wanted


def test_a_finished_study_stays_or_goes_on(place, run):
    before = json.loads(run("show", "finished", "--json"))
    assert "have now been used" not in run("search", "finished")
    assert json.loads(run("show", "finished", "--json")) == before
    assert "have now been used 2 times" in run("search", "finished", "--trials", 12)
    same_end(place, "finished", run("show", "finished", "--json"), expected("finished"))


def test_a_new_study_begins_where_a_finished_one_ended(place, run):
    name = "from-finished"
    run("search", name)
    same_end(place, name, run("show", name, "--json"), expected(name))


def test_another_model_is_still_noticed(place, monkeypatch, capsys):
    config = place / "models/instruct/generation_config.json"
    config.write_text(config.read_text() + "\n")
    where = ["--storage", f"sqlite:///{place}/warm.db", "--results", place / "results"]
    assert evomerge(monkeypatch, "search", "studies/warm.yaml", *where) == 2
    assert "the study has changed since it began: the model" in capsys.readouterr().err
