"""The studies of a storage: listed, shown, exported and deleted, without torch and without a write
where only reading is asked for.
"""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from io import StringIO
from pathlib import Path

import pytest
import yaml
from search_tools import make_search, make_study

import evomerge
from evomerge.cli import main
from evomerge.errors import StudyError
from evomerge.files import ExclusiveLock
from evomerge.inference.opening import open_prompt
from evomerge.reporting.export import write_results
from evomerge.searching.catalogue import RESULTS
from evomerge.searching.ledger import lock_path
from evomerge.searching.snapshot import load_snapshot

COMMANDS = (
    ["show", "fake"],
    ["show", "fake", "--json"],
    ["list"],
    ["list", "--json"],
    ["export", "fake"],
    ["export", "fake", "--trial", "1"],
    ["cache", "fake"],
)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """The folder of a finished study, with two trials that failed or were interrupted."""
    folder = tmp_path_factory.mktemp("searched")
    search, _, _ = make_search(folder, make_study(trials=8))
    search._evaluate_references()
    for reason in ("out of memory", "interrupted"):
        search.ledger.fail(search.ledger.start("candidate", [1.0] * 4, 0, 0), reason)
    search.run()
    return folder


@pytest.fixture
def place(searched, tmp_path, monkeypatch):
    """A copy of its storage in storage/, in the working directory."""
    shutil.copytree(searched, tmp_path / "storage")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EVOMERGE_STORAGE", raising=False)
    monkeypatch.delenv("EVOMERGE_RESULTS", raising=False)
    return tmp_path


@pytest.fixture
def run(capsys):
    """run(*argv) -> (exit code, stdout, stderr)."""

    def called(*argv):
        capsys.readouterr()
        code = main([str(word) for word in argv])
        return code, *capsys.readouterr()

    return called


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


CHILD = """
import json, os, sys
from evomerge.cli import main
commands, folder, more, user = json.loads(sys.argv[1])
import evomerge
os.chdir(folder)
if user is not None:
    for argv in commands:  # what they import is read before the rights go
        main(argv)
    os.setuid(user)
    os.chdir(more)
print(evomerge.load_study("fake").recipe_yaml)
codes = [main(argv) for argv in commands]
print(json.dumps([codes, sorted({"torch", "transformers"} & sys.modules.keys())]))
"""


def child(commands, folder, more="", user=None):
    """Exit codes of the commands in a process of their own, and what it imported of the heavy."""
    argument = json.dumps([commands, str(folder), str(more), user])
    done = subprocess.run(
        [sys.executable, "-c", CHILD, argument],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_reading_a_study_imports_no_torch(place):
    commands = [*COMMANDS, ["report", "fake"], ["export", "fake", "--runner", "runner"]]
    commands += [["export", "fake", "-o", "best.yaml"], ["delete", "fake", "--yes"]]
    assert child(commands, place) == [[0] * len(commands), []]


def test_a_list_names_every_study_of_the_default_folder(place, run):
    search, _, _ = make_search(place / "storage", make_study("b" * 40, trials=100, uniform=()))
    search._evaluate_references()
    (place / "storage/broken.db").write_text("this is no database, but a text of some length")
    code, out, err = run("list")
    assert code == 0
    head, first, second = out.splitlines()
    assert max(len(line) for line in out.splitlines()) <= 80
    assert head.split() == ["study", "candidates", "state", "best", "last", "activity"]
    assert first.split()[0] == "b" * 31 + "."
    reference = max(t.score for t in search.ledger.history().complete)
    assert first.split()[1:4] == ["0/100", "unfinished", f"{reference:.3f}"]
    best = max(t.score for t in load("fake").records if t.score)
    assert second.split()[:4] == ["fake", "8/8", "finished", f"{best:.3f}"]
    assert "broken.db" in err
    assert len(err.splitlines()) == 1
    entries = json.loads(run("list", "--json")[1])
    assert [entry["name"] for entry in entries] == ["b" * 40, "fake"]
    assert entries[1]["trials"] == entries[1]["planned"] == 8
    assert entries[1]["best"] == best
    assert entries[1]["storage"].endswith("storage/fake.db")
    trials = evomerge.load_study("fake").snapshot.ledger.storage.trials()
    assert entries[1]["last_activity"] == trials[-1].datetime_complete.isoformat()


def load(name):
    return evomerge.load_study(name)


def test_a_list_of_several_studies_in_one_storage(place, run):
    for name in ("two", "one"):
        search, _, _ = make_search(place, make_study(name))
        search._evaluate_references()
        shutil.copy(place / f"{name}.db", place / "both.db")
    search, _, _ = make_search(place, make_study("both"))
    search._evaluate_references()
    code, out, _ = run("list", "--storage", "both.db")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["both", "one"]


def test_a_list_of_nothing(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EVOMERGE_STORAGE", raising=False)
    code, out, err = run("list")
    assert (code, out) == (0, "")
    assert "there are no studies" in err
    assert run("list", "--json")[1] == "[]\n"
    assert evomerge.list_studies("missing.db") == []
    assert not list(tmp_path.iterdir())


def test_a_study_that_is_searched_is_listed_as_running_and_not_deleted(place, run):
    before = contents(place / "storage")
    with ExclusiveLock(lock_path("sqlite:///storage/fake.db", "fake")):
        assert evomerge.list_studies()[0].state == "running"
        code, _, err = run("delete", "fake", "--yes")
        assert code == 2
        assert "being searched by another process" in err
    assert contents(place / "storage") == before
    assert evomerge.list_studies()[0].state == "finished"


def test_a_study_that_goes_on_after_its_verdict_is_unfinished(place):
    ledger = load_snapshot("sqlite:///storage/fake.db", "fake").ledger
    attributes = ledger.storage.attributes()
    assert attributes["stopped"]
    search, _, _ = make_search(place / "storage", make_study(trials=9))
    search.ledger.remember("stopped", None)
    assert evomerge.list_studies()[0].state == "unfinished"


def test_delete_says_what_goes_and_asks(place, run, monkeypatch):
    assert run("report", "fake")[0] == 0
    results = place / "results/fake"
    assert {path.name for path in results.iterdir()} == set(RESULTS)
    (results / "notes.txt").write_text("mine")
    before = contents(place / "storage"), contents(results)
    code, out, err = run("delete", "fake")
    assert (code, out) == (2, "")
    for word in ("14 trials", "fake.answers.sqlite", "best.yaml", "stay", "add --yes"):
        assert word in err
    assert (contents(place / "storage"), contents(results)) == before
    for answer, code in (("n\n", 2), ("y\n", 0)):
        terminal = StringIO(answer)
        monkeypatch.setattr(terminal, "isatty", lambda: True)
        monkeypatch.setattr(sys, "stdin", terminal)
        assert run("delete", "fake")[0] == code
    assert not list((place / "storage").iterdir())
    assert contents(results) == {"notes.txt": b"mine"}
    assert run("delete", "fake", "--yes")[0] == 2


def test_delete_takes_the_results_folder_that_holds_nothing_else(place, run):
    assert run("report", "fake")[0] == 0
    assert run("delete", "fake", "--yes") == (0, "", "deleted the study fake\n")
    assert not (place / "results/fake").exists()


def test_delete_leaves_other_studies_and_foreign_files(place, run):
    search, _, _ = make_search(place, make_study("other"))
    search._evaluate_references()
    other = json.loads(run("list", "--storage", "other.db", "--json")[1])
    shutil.copy("other.db", "fake.db")
    search, _, _ = make_search(place, make_study("fake"))
    search._evaluate_references()
    results = place / "results/fake"
    results.mkdir(parents=True)
    (results / "README.md").write_text("# fake\n\nmy own notes")
    (results / "best.yaml").write_text("mine")
    before = contents(results)
    assert run("delete", "fake", "--storage", "fake.db", "--yes")[0] == 0
    assert contents(results) == before
    left = json.loads(run("list", "--storage", "fake.db", "--json")[1])
    assert [{**entry, "storage": ""} for entry in left] == [{**other[0], "storage": ""}]
    with pytest.raises(StudyError, match="There are: other"):
        evomerge.load_study("fake", storage="fake.db")


def test_the_results_that_delete_knows_are_those_that_are_written(place):
    snapshot = load_snapshot("sqlite:///storage/fake.db", "fake")
    assert {path.name for path in write_results(snapshot, place / "out")} == set(RESULTS)


def test_any_finished_trial_is_exported_and_called_what_it_is(place, run):
    found = evomerge.load_study("fake")
    for record in found.records:
        code, out, err = run("export", "fake", "--trial", record.number)
        if record.state != "complete":
            assert (code, out) == (2, "")
            assert record.reason in err
            continue
        assert code == 0
        weights = [
            piece["sources"][0]["parameters"]["weight"] for piece in yaml.safe_load(out)["slices"]
        ]
        assert weights == pytest.approx(record.vector)
        assert err.startswith(f"This is trial {record.number} (")
        assert ("is the winner" in err) == (record.number == found.winner.number)
        if record.role == "candidate":
            assert f"a candidate of generation {record.generation + 1}" in err
    assert found.with_trial(found.winner.number).recipe_yaml == found.recipe_yaml


def test_the_card_and_the_runner_of_another_trial_do_not_claim_the_verdict(place, run):
    from evomerge.reporting.export import card

    found = evomerge.load_study("fake")
    other = next(t for t in found.records if t.role == "candidate" and t.state == "complete")
    assert other.number != found.winner.number
    assert run("export", "fake", "--trial", other.number, "--runner", "runner")[0] == 0
    texts = [card(found.with_trial(other.number).snapshot), Path("runner/README.md").read_text()]
    for text in texts:
        assert f"This is trial {other.number} (" in text
        assert f"not the winner, which is trial {found.winner.number}" in text
        assert "## Verdict" not in text
    assert f"# fake, trial {other.number}\n" in texts[0]
    assert "## Verdict" in card(found.snapshot)
    written = found.with_trial(other.number).write_results(place / "out")
    assert written[0].read_text() == found.recipe_yaml, "results are the winner's"


@pytest.mark.parametrize(("number", "words"), [(99, "has no trial 99"), (-1, "has no trial -1")])
def test_a_trial_that_is_not_there(place, run, number, words):
    code, out, err = run("export", "fake", "--trial", number)
    assert (code, out) == (2, "")
    assert words in err
    assert "from 0 to 13" in err


def plain(file):
    pass


def logged(file):
    """A database whose writers use a write-ahead log, closed in order."""
    with closing(sqlite3.connect(file)) as db:
        db.execute("PRAGMA journal_mode=WAL")


def killed_with_a_log(file):
    """A writer that used a write-ahead log was killed: its log holds what is not in the file."""
    aside = file.with_name("aside")
    shutil.copy(file, aside)
    with closing(sqlite3.connect(aside)) as db:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("UPDATE studies SET study_name = 'fake' WHERE study_name = 'fake'")
        db.execute("CREATE TABLE later (x)")
        db.commit()
        shutil.copy(aside, file)
        shutil.copy(f"{aside}-wal", f"{file}-wal")
    for path in file.parent.glob("aside*"):
        path.unlink()


def killed_with_a_journal(file):
    """A writer was killed in the middle of a transaction, which has partly reached the file."""
    aside = file.with_name("aside")
    shutil.copy(file, aside)
    with closing(sqlite3.connect(aside, isolation_level=None)) as db:
        db.execute("PRAGMA cache_size=1")
        db.execute("BEGIN")
        db.execute("DELETE FROM trial_user_attributes")
        db.execute("UPDATE trial_values SET value = -1")
        db.execute("UPDATE studies SET study_name = 'gone'")
        shutil.copy(aside, file)
        shutil.copy(f"{aside}-journal", f"{file}-journal")
        db.execute("ROLLBACK")
    for path in file.parent.glob("aside*"):
        path.unlink()


STATES = [plain, logged, killed_with_a_log, killed_with_a_journal]


@pytest.mark.parametrize("state", STATES)
def test_reading_changes_nothing_beside_the_storage(place, run, state):
    shown = run("show", "fake", "--json")[1]
    state(place / "storage/fake.db")
    state(place / "storage/fake.answers.sqlite") if state is logged else None
    before = contents(place / "storage")
    for argv in (*COMMANDS, ["report", "fake"]):
        assert run(*argv)[0] == 0, argv
    assert run("show", "fake", "--json")[1] == shown
    assert "batches" in run("cache", "fake")[1]
    assert open_prompt((), "sqlite:///storage/fake.db", "fake").format
    assert contents(place / "storage") == before


@pytest.fixture
def open_to_all(searched):
    """A folder that every user can reach: (it, a copy of the study's storage in it)."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copytree(searched, folder / "storage")
        yield folder
        for path in folder.rglob("*"):
            path.chmod(0o755)


@pytest.mark.skipif(sys.platform == "win32", reason="permissions are those of POSIX")
@pytest.mark.parametrize("state", STATES)
def test_a_storage_that_may_only_be_read(open_to_all, place, state):
    storage = open_to_all / "storage"
    state(storage / "fake.db")
    for path in storage.iterdir():
        path.chmod(0o444)
    storage.chmod(0o555)
    results = open_to_all / "results"
    results.mkdir()
    results.chmod(0o777)
    commands = [*COMMANDS, ["report", "fake"]]
    nobody = 65534 if os.getuid() == 0 else None
    where = place if nobody else open_to_all
    codes, _ = child(commands, where, open_to_all, nobody)
    assert codes == [0] * len(commands)
    assert (results / "fake/best.yaml").is_file()
