"""A study is its contents: it begins with its first trial, and goes on wherever its files are."""

import json
import shutil
import sqlite3
from contextlib import closing
from io import StringIO

import pytest

from evomerge.answering.hf.engine import TransformersEngine
from evomerge.cli import main
from evomerge.console import Console
from evomerge.errors import EvomergeError, InputError, StudyError
from evomerge.searching.ledger import open_ledger
from evomerge.searching.open_search import open_search
from evomerge.study import read_study
from evomerge.study.environment import expanded

FAST = ("search.trials=2", "generation.max_new_tokens=3", "search.ranking=all")
REFUSED = {
    "context": ("generation.max_new_tokens=64", "exceed the context"),
    "warm start": ("search.warm_start=likelihood", "requires task_arithmetic"),
    "judge": ("judge.kind=llm", "cannot be reached"),
    "judge's file": ("judge.kind=learned", "no such learned judge file"),
    "source": ("search.source_study=nobody", "no study 'nobody'"),
    "filters": ("genome.filters=[nothing]", "no tensor name contains this"),
    "one pass": ("engine.population=true", ""),
}


def command(folder, *settings, storage="storage/tiny.db", name="study.yaml"):
    where = ["--storage", str(folder / storage), "--results", str(folder / "results")]
    return ["search", str(folder / name), *where, *(x for s in settings for x in ("--set", s))]


@pytest.fixture
def place(pair, tmp_path):
    """A folder that holds a study file with all it names."""
    return shutil.copytree(pair, tmp_path / "place")


@pytest.mark.parametrize("why", REFUSED)
def test_a_first_run_that_is_refused_leaves_no_study(place, capsys, monkeypatch, why):
    setting, said = REFUSED[why]
    settings = [*FAST, setting]
    if why == "warm start":
        settings.append("genome.normalize=true")
    if why == "judge":
        settings.append("judge.base_url=http://127.0.0.1:9")
    if why == "judge's file":
        settings.append("judge.file=missing.json")
    if why == "one pass":
        settings.append("genome.merge_method=ties")
    assert main(command(place, *settings)) in (1, 2)
    assert said in capsys.readouterr().err
    assert not list((place / "storage").glob("*"))


def opened(place, *settings):
    """A search of the study, ready to run."""
    study = read_study(place / "study.yaml", [*FAST, *settings])
    return open_search(study, f"sqlite:///{place}/tiny.db", Console(StringIO()))


def done(search, dimensions=4):
    """Record a trial, on which the study depends from then on."""
    trial = search.ledger.start("parent", [0.0] * dimensions)
    search.ledger.storage.end_trial(trial.number, "result", {"n": 1}, 1.0)


def test_the_file_may_change_until_a_trial_is_done(place):
    with opened(place) as search:
        trial = search.ledger.start("parent", [0.0] * 4)
        search.ledger.fail(trial, "too little memory")
        search.ledger.start("parent", [0.0] * 4)
    with opened(place) as search:
        assert len(search.ledger.records()) == 2, "nothing has changed"
    with opened(place, "genome.layer_granularity=2", "search.seed=7") as search:
        assert search.ledger.storage.is_new
        done(search, 2)
    assert open_ledger(f"sqlite:///{place}/tiny.db", "tiny").facts.study.search.seed == 7
    with (
        pytest.raises(StudyError, match=r"changed since it began: search\.seed"),
        opened(place, "genome.layer_granularity=2"),
    ):
        pass


def test_a_study_goes_on_in_another_folder_with_the_answers_it_has(
    place, tmp_path, monkeypatch, capsys
):
    assert main(command(place, *FAST)) == 0
    before = open_ledger(f"sqlite:///{place}/storage/tiny.db", "tiny").records()
    moved = tmp_path / "elsewhere"
    place.rename(moved)
    (moved / "instruct").rename(moved / "sibling")
    text = (moved / "study.yaml").read_text().replace("./instruct", "./sibling")
    (moved / "tasks.jsonl").rename(moved / "questions.jsonl")
    (moved / "study.yaml").write_text(text.replace("tasks.jsonl", "questions.jsonl"))
    for number in (1, 2):  # a second time, after the new names are stored
        with closing(sqlite3.connect(moved / "storage/tiny.db")) as db, db:
            for table in ("trials", "trial_params", "trial_values", "trial_user_attributes"):
                db.execute(f"DELETE FROM {table}")
            db.execute("DELETE FROM study_user_attributes WHERE key IN ('verdict', 'validation')")
        monkeypatch.setattr(
            TransformersEngine, "answer", lambda *_: pytest.fail("an answer was not found")
        )
        # nothing is complete, but nothing has changed either: the study is the same
        assert main(command(moved, *FAST)) == 0, capsys.readouterr().err
        ledger = open_ledger(f"sqlite:///{moved}/storage/tiny.db", "tiny")
        again = [r for r in ledger.records() if r.state == "complete"]
        assert [(r.vector, r.score) for r in again] == [(r.vector, r.score) for r in before]
        assert str(moved / "sibling") in ledger.facts.study.genome.models, number
    monkeypatch.undo()
    assert main(["export", "tiny", "--storage", str(moved / "storage/tiny.db")]) == 0
    assert f"model: {moved}/sibling" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("task", "the tasks (3)"),
        ("new task", "the tasks (new: 40)"),
        ("missing task", "the tasks (missing: 3)"),
        ("order", "the tasks (their order)"),
        ("tensors", "instruct (model.safetensors)"),
        ("file", "instruct (generation_config.json)"),
        ("key", "search.sigma"),
    ],
)
def test_what_has_changed_is_named(place, change, named):
    with opened(place) as search:
        done(search)
    rows = [json.loads(line) for line in (place / "tasks.jsonl").read_text().splitlines()]
    settings = []
    if change == "task":
        rows[3]["output"] += "あ"
    elif change == "new task":
        rows.append(rows[0] | {"task_id": 40})
    elif change == "missing task":
        del rows[3]
    elif change == "order":
        rows[0], rows[1] = rows[1], rows[0]
    elif change == "key":
        settings.append("search.sigma=0.1")
    else:
        file = "generation_config.json" if change == "file" else "model.safetensors"
        source = place / "base" / file
        data = source.read_bytes()
        (place / "instruct" / file).write_bytes(data if change == "tensors" else data + b"\n")
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (place / "tasks.jsonl").write_text(text)
    with pytest.raises(StudyError) as raised, opened(place, *settings):
        pass
    assert named in str(raised.value)


def test_models_that_change_places_are_a_change(place):
    """The numbers of a vector belong to models by their places."""
    shutil.copytree(place / "instruct", place / "other")
    config = json.loads((place / "other/generation_config.json").read_text())
    (place / "other/generation_config.json").write_text(json.dumps(config | {"x": 1}))
    first = f"genome.models=[{place}/instruct, {place}/other]"
    with opened(place, first) as search:
        done(search, 8)
    with (
        pytest.raises(StudyError, match=r"the model .*other"),
        opened(place, f"genome.models=[{place}/other, {place}/instruct]"),
    ):
        pass
    with opened(place, first):
        pass


SECRET = "hunter22-hunter22"


def test_variables_are_stored_and_shown_as_they_are_written(place, monkeypatch, capsys):
    monkeypatch.setenv("PAIR", str(place))
    monkeypatch.setenv("SYSTEM", SECRET)
    monkeypatch.setenv("NAME", "tiny")
    text = (place / "study.yaml").read_text()
    text = text.replace("./instruct", "'${PAIR}/instruct'").replace("study: tiny", "study: ${NAME}")
    text = text.replace("tasks.jsonl", "'${PAIR}/tasks.jsonl'")
    (place / "study.yaml").write_text(text + "prompt: {system: '${SYSTEM}'}\n")
    run = command(place, *FAST, "search.trials=1")
    assert main(run) == 0
    capsys.readouterr()
    for path in place.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path
    stored = open_ledger(f"sqlite:///{place}/storage/tiny.db", "tiny").facts
    assert stored.study_file["genome"]["models"] == ["${PAIR}/instruct"]
    assert stored.study_file["prompt"]["system"] == "${SYSTEM}"
    assert stored.study.prompt.system == SECRET
    assert "${SYSTEM}" in (place / "results/tiny/report.html").read_text()
    show = ["show", "tiny", "--storage", str(place / "storage/tiny.db")]
    assert main(show) == 0
    assert main(["export", *show[1:]]) == 0
    assert f"model: {place}/instruct" in capsys.readouterr().out
    monkeypatch.setenv("SYSTEM", "another")
    assert main(run) == 2
    assert "changed since it began: prompt.system" in capsys.readouterr().err
    monkeypatch.delenv("SYSTEM")
    assert main(run) == 2
    assert "`prompt.system` uses ${SYSTEM}, which is not set" in capsys.readouterr().err
    monkeypatch.delenv("PAIR")
    assert main(show) == 0, "a study can be shown where its variables are not set"
    elsewhere = place.rename(place.with_name("elsewhere"))
    monkeypatch.setenv("PAIR", str(elsewhere))
    monkeypatch.setenv("SYSTEM", SECRET)
    assert main(command(elsewhere, *FAST, "search.trials=1")) == 0


@pytest.mark.parametrize(
    "url", [f"http://u:{SECRET}@h/v1", f"http://h/v1?api_key={SECRET}", f"http://h/v1#{SECRET}"]
)
@pytest.mark.parametrize("how", ["file", "--set", "variable", "resumed"])
def test_a_password_in_a_judges_address_is_refused_before_it_is_stored(
    place, monkeypatch, capsys, url, how
):
    monkeypatch.setenv("JUDGE", url)
    settings = [f"judge.base_url={'${JUDGE}' if how == 'variable' else url}"]
    if how == "file":
        text = (
            (place / "study.yaml").read_text().replace("judge: {", f"judge: {{base_url: '{url}',")
        )
        (place / "kept.yaml").write_text(text)
        settings = []
    if how == "resumed":
        with opened(place) as search:
            done(search)
    name = "kept.yaml" if how == "file" else "study.yaml"
    assert main(command(place, *FAST, *settings, storage="tiny.db", name=name)) == 2
    line = capsys.readouterr().err
    assert "`judge.base_url` contains more than a host and a path" in line
    assert SECRET not in line
    for path in place.rglob("*"):
        if path.is_file() and path.name != "kept.yaml":
            assert SECRET.encode() not in path.read_bytes(), path


def test_a_password_that_an_older_version_stored_is_not_shown(place):
    with opened(place) as search:
        facts = search.ledger.storage.attributes()
        done(search)
    facts["study_file"]["judge"]["base_url"] = f"http://u:{SECRET}@h/v1"
    ledger = open_ledger(f"sqlite:///{place}/tiny.db", "tiny", create=True)
    ledger.storage.set_attribute("study_file", facts["study_file"])
    assert SECRET not in json.dumps(ledger.facts.study_file)
    with opened(place) as search:
        stored = search.ledger.storage.attributes()["study_file"]
    assert SECRET not in json.dumps(stored)


@pytest.mark.parametrize(
    "text",
    [
        f"postgresql://u:{SECRET}@h/d",
        f"said: 'http://u:{SECRET}@h/v1', then",
        f"http://h/v1?token={SECRET}&x=1",
        f"mysql://h/d?ssl=1;p%61ssword={SECRET}",
        f"postgresql://u:{SECRET}/with@every?thing#{SECRET}@h/d",
    ],
)
def test_no_error_shows_a_password(text):
    for error in (
        EvomergeError(text),
        EvomergeError("x", where=text),
        EvomergeError("x", found=text),
    ):
        assert SECRET not in str(error)
        assert "***" in str(error)
    long = EvomergeError("x", found="y" * 60 + " " + text)
    assert SECRET[:8] not in str(long)


@pytest.mark.parametrize(
    "text",
    ["http://127.0.0.1:8000/v1", "sqlite:///a@b.db", "mail a@b: or x://y", "https://h:443/x?n=1"],
)
def test_what_holds_no_password_is_shown_whole(text):
    assert str(EvomergeError(text)) == text


def test_a_variable_that_sounds_secret_is_not_shown_in_errors():
    variables = {"HUB_TOKEN": "Zq9SECRETzq", "MODELS": "/data/models"}
    filled = expanded({"a": "${HUB_TOKEN}", "b": "${MODELS}/x"}, variables)
    assert filled == {"a": "Zq9SECRETzq", "b": "/data/models/x"}
    error = str(InputError("no such model", where="/data/models/x", found=[filled["a"]]))
    assert "Zq9SECRETzq" not in error
    assert "${HUB_TOKEN}" in error
    assert "/data/models/x" in error
