"""A study that is killed while it is made, at any of its writes, ends as one that was not.

EVOMERGE_KILLS=200 (`make test-kills`) kills at each of the first 200 writes.
"""

import itertools
import os
import signal
import sqlite3
import sys
from contextlib import closing
from io import StringIO

import optuna
import pytest
from process_tools import ended, fork
from search_tools import make_search, make_study, trials

from evomerge.console import Console
from evomerge.errors import OutputError
from evomerge.searching.ledger import open_ledger
from evomerge.searching.open_search import open_search
from evomerge.study import read_study

KILLS = int(os.environ.get("EVOMERGE_KILLS", "0"))
# without it, a few: before, while and after the database gets its name
NUMBERS = range(1, KILLS + 1) if KILLS else (1, 20, 35, 40, 46, 90)
READING = ("SELECT", "PRAGMA")
CHANGING = ("os.rename", "os.link", "os.remove", "os.mkdir", "os.truncate")
STUDY = make_study(trials=8, population=4)


def die_at(number):
    """SIGKILL in this process right before its write of that number: SQL or a file's name."""
    count = itertools.count(1)

    def write():
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event, arguments):
        opened = event == "open" and isinstance(arguments[2], int)
        if event in CHANGING or (opened and arguments[2] & os.O_CREAT):
            write()

    connect = sqlite3.connect

    def traced(*arguments, **settings):
        db = connect(*arguments, **settings)
        db.set_trace_callback(
            lambda sql: None if sql.lstrip().upper().startswith(READING) else write()
        )
        return db

    sqlite3.connect = sqlite3.dbapi2.connect = traced
    sys.addaudithook(watch)


def search(folder, number=None):
    """The code of a process that searches, and is killed at a write."""

    def work():
        if number is not None:
            die_at(number)
        make_search(folder, STUDY)[0].run()
        return 0

    return ended(fork(work))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert search(folder) == 0
    found = make_search(folder, STUDY)[0]
    return trials(found), found.ledger.facts.verdict


@pytest.mark.parametrize("number", NUMBERS)
def test_a_kill_at_any_write_changes_nothing(tmp_path, undisturbed, number):
    assert search(tmp_path, number) == -signal.SIGKILL, "it has fewer writes"
    url = f"sqlite:///{tmp_path}/fake.db"
    if (tmp_path / "fake.db").exists():
        facts = open_ledger(url, "fake").facts
        assert all((facts.begun, facts.names, facts.n_layers)), "what has the name is whole"
    assert search(tmp_path) == 0
    found = make_search(tmp_path, STUDY)[0]
    assert (trials(found), found.ledger.facts.verdict) == undisturbed
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"fake.db", "fake.answers.sqlite"}, "what a killed run left is removed"


STATEMENTS = range(1, 60) if KILLS else (2, 6, 9, 14, 26)


@pytest.mark.parametrize("number", STATEMENTS)
def test_what_an_older_version_left_half_made_is_completed(tmp_path, number):
    """Optuna makes its tables one statement after the other, and so did evomerge before 0.3."""
    url = f"sqlite:///{tmp_path}/s.db"

    def work():
        die_at(number)
        for name in ("s", "t"):
            optuna.create_study(storage=url, study_name=name)
        return 0

    ended(fork(work))
    ledger = open_ledger(url, "s", {"a": (0.0, 2.0)}, create=True)
    if not ledger.storage.is_new:
        ledger.storage.begin_again()
    ledger.remember("names", ["a"])
    ledger.start("candidate", [1.0], 0, 0)
    assert len(open_ledger(url, "s").records()) == 1
    with closing(sqlite3.connect(tmp_path / "s.db")) as db:
        indices = {name for (name,) in db.execute("SELECT name FROM sqlite_master") if name}
    assert {"ix_studies_study_name", "ix_trials_study_id", "alembic_version"} <= indices


def twins(folder, used):
    """A file without its unique index, where one name stands for two studies."""
    url = f"sqlite:///{folder}/s.db"
    study = optuna.create_study(storage=url, study_name="s")
    other = optuna.create_study(storage=url, study_name="t")
    for each in (study, other)[:used]:
        each.add_trial(optuna.trial.create_trial(value=1.0, user_attrs={"role": "parent"}))
    with closing(sqlite3.connect(folder / "s.db")) as db, db:
        db.execute("DROP INDEX ix_studies_study_name")
        db.execute("UPDATE studies SET study_name = 's'")
    return url


@pytest.mark.parametrize("used", [0, 1])
def test_of_two_studies_of_one_name_the_empty_one_goes(tmp_path, used):
    ledger = open_ledger(twins(tmp_path, used), "s", create=True)
    assert len(ledger.records()) == used
    with closing(sqlite3.connect(tmp_path / "s.db")) as db, pytest.raises(sqlite3.IntegrityError):
        db.execute("INSERT INTO studies (study_name) VALUES ('s')")


def test_two_used_studies_of_one_name_are_refused(tmp_path):
    url = twins(tmp_path, 2)
    before = (tmp_path / "s.db").read_bytes()
    for create, remedy in ((True, "Move it away"), (False, "Run its `evomerge search`")):
        with pytest.raises(OutputError, match=f"2 studies of one name .* {remedy}"):
            open_ledger(url, "s", create=create)
    assert (tmp_path / "s.db").read_bytes() == before


@pytest.mark.parametrize("kept", [[], ["study_file"], ["version", "study_file", "models"]])
def test_a_study_without_all_its_facts_begins_again(pair, tmp_path, kept):
    study, url = read_study(pair / "study.yaml"), f"sqlite:///{tmp_path}/s.db"
    with open_search(study, url, Console(StringIO())) as running:
        facts = running.ledger.storage.attributes()
    stored = optuna.create_study(storage=url, study_name="tiny", direction="maximize")
    for key in kept:
        stored.set_user_attr(key, facts[key])
    with open_search(study, url, Console(StringIO())) as running:
        assert running.ledger.storage.attributes().keys() == facts.keys()
        assert running.ledger.facts.models
