"""Every storage has one place and one searcher, and whatever goes wrong with it is one line."""

import json
import os
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import optuna
import pytest
import sqlalchemy

from evomerge.api.inputs import storage_url
from evomerge.cli import main
from evomerge.errors import EvomergeError, InputError, StudyError
from evomerge.files import LockHeld
from evomerge.searching.ledger import cache_path, only_worker, open_ledger
from evomerge.searching.records import storage_lease
from evomerge.searching.records.storage_errors import storage_errors
from evomerge.searching.records.storage_lease import LEASES, StorageLease
from evomerge.searching.records.storage_place import storage_place

ROOT = Path(__file__).parents[1]
SPACE = {"a": (0.0, 2.0)}
NAMES = ["s.db", "a b.db", "a%20b.db", "a?b.db", "a#b.db", "a{b}.db", "あ.db", "a&b=c.db", "s"]


def begun(url, name="s"):
    """A ledger whose study is stored."""
    ledger = open_ledger(url, name, SPACE, create=True)
    ledger.start("candidate", [1.0], 0, 0)
    return ledger


@pytest.mark.parametrize("name", NAMES)
def test_the_file_that_is_named_is_the_one_that_is_opened_and_locked(tmp_path, name):
    url = storage_url(tmp_path / name, "s")
    assert storage_place(url).file == tmp_path / name
    with only_worker(url, "s"):
        begun(url)
        with pytest.raises(StudyError, match="another process"), only_worker(url, "s"):
            pass
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert len(open_ledger(url, "s").storage.trials()) == 1
    assert cache_path(url, "s") == tmp_path / "s.answers.sqlite"


@pytest.mark.parametrize(
    "form",
    [
        "sqlite:///{}",
        "sqlite+pysqlite:///{}",
        "sqlite:///{}?timeout=5",
        "sqlite:///file:{}?uri=true",
        "sqlite:///{}/../s.db",
    ],
)
def test_every_spelling_of_a_file_has_the_same_lock(tmp_path, form):
    file = tmp_path / "s.db"
    begun(f"sqlite:///{file}")
    spelled = form.format(tmp_path if "/../" in form else file)
    if "/../" in form:
        (tmp_path / "below").mkdir()
        spelled = f"sqlite:///{tmp_path}/below/../s.db"
    assert len(open_ledger(spelled, "s").storage.trials()) == 1
    with (
        only_worker(f"sqlite:///{file}", "s"),
        pytest.raises(StudyError, match="another process"),
        only_worker(spelled, "s"),
    ):
        pass


def test_a_link_has_the_lock_of_its_file(tmp_path):
    begun(f"sqlite:///{tmp_path}/s.db")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/link.db").symlink_to(tmp_path / "s.db")
    with (
        only_worker(f"sqlite:///{tmp_path}/s.db", "s"),
        pytest.raises(StudyError, match="another process"),
        only_worker(f"sqlite:///{tmp_path}/folder/link.db", "s"),
    ):
        pass


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///",
        "sqlite:///:memory:",
        "sqlite+pysqlite:///:memory:",
        "sqlite:///file::memory:?uri=true",
        "sqlite:///file:x?mode=memory&uri=true",
        "sqlite:///file:/x?vfs=memdb&uri=true",
    ],
)
def test_a_storage_in_memory_is_refused(pair, tmp_path, monkeypatch, capsys, url):
    monkeypatch.chdir(tmp_path)
    assert main(["search", str(pair / "study.yaml"), "--storage", url]) == 2
    assert "in memory is lost when the command ends" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("postgresql+psycopg2://u:hunter22@h/d", "pip install 'psycopg2-binary'"),
        ("mysql+pymysql://u:hunter22@h/d", "pip install 'pymysql'"),
        ("mysql://h/d?password=hunter22", "pip install 'mysqlclient'"),
        ("mysql+mysqlconnector://h/d?p%61sswd=hunter22", "pip install 'mysql-connector-python'"),
        ("postgresql+asyncpg://u:hunter22@h/d", "asyncpg is asynchronous"),
        ("postgresql://u:hunter22@h:54x/d", "its port is not a number"),
        ("postgresql://u:hunt@hunter22@h/d", "Write %40 for it"),
        ("postgresql://u:hunter22/hunter22@h/d", "pip install"),
        ("postgres://u:hunter22@h/d", "no database of this kind"),
        ("redis://:hunter22@h/0", "no database of this kind"),
        ("sqlite://hunter/s.db", "an SQLite file has no host"),
        ("sqlite:///a?b.db", "write %3F"),
    ],
)
def test_a_url_that_cannot_be_used_is_one_line_without_its_password(
    tmp_path, monkeypatch, capsys, url, what
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "psycopg", None)  # as where it is not installed
    assert main(["show", "s", "--storage", url]) == 2
    line = capsys.readouterr().err
    assert what in line
    assert "hunter22" not in line
    assert line.count("\n") == 1
    assert "Free some space" not in line
    assert not list(tmp_path.iterdir())


class Server:
    """The place of a server's storage, whose driver is not needed for its errors."""

    file, url = None, "postgresql+psycopg://u:hunter22%40x@h:5432/d?sslpassword=hunter33"
    shown = storage_place("sqlite:///x").shown


@pytest.mark.parametrize(
    ("said", "what"),
    [
        ('connection to server at "h" failed: Connection refused', "Start it"),
        ('FATAL: password authentication failed for user "u"', "user and password"),
        ('FATAL: database "d" does not exist', "Create it"),
        ('invalid port number: "99999"', "1 to 65535"),
        ("failed to resolve host 'h'", "URL's host"),
        ("could not extend file: No space left on device", "Free some space there"),
        ("something else altogether", "Check the server"),
        ("invalid dsn: hunter22@x and hunter22%40x and hunter33", "Check the server"),
    ],
)
def test_what_a_server_refuses_has_its_own_remedy(said, what):
    error = sqlalchemy.exc.OperationalError("SELECT", {}, Exception(f"{said}\nSecond line"))
    with pytest.raises(EvomergeError) as raised, storage_errors(Server, "s"):
        raise error
    line = str(raised.value)
    assert what in line
    assert "hunter" not in line
    assert "\n" not in line


@pytest.mark.parametrize(("found", "remedy"), [("v9.9.9.a", "Install"), ("v2.6.0.a", "upgrade")])
@pytest.mark.parametrize("command", ["show", "search"])
def test_another_optunas_tables_are_left_as_they_are(
    pair, tmp_path, capsys, found, remedy, command
):
    begun(f"sqlite:///{tmp_path}/s.db", "tiny")
    with closing(sqlite3.connect(tmp_path / "s.db")) as db, db:
        db.execute("UPDATE alembic_version SET version_num = ?", (found,))
    before = (tmp_path / "s.db").read_bytes()
    subject = str(pair / "study.yaml") if command == "search" else "tiny"
    assert main([command, subject, "--storage", f"sqlite:///{tmp_path}/s.db"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"another version of Optuna than {optuna.__version__} (found: '{found}')" in line
    assert remedy in line
    assert (tmp_path / "s.db").read_bytes() == before


@pytest.fixture
def engine(tmp_path):
    """A database that several processes can reach, as a server's is."""
    return sqlalchemy.create_engine(f"sqlite:///{tmp_path}/shared.db")


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(storage_lease, "BEAT", 0.02)
    monkeypatch.setattr(storage_lease, "PATIENCE", 0.3)


def rows(engine):
    with engine.connect() as connection:
        return connection.execute(sqlalchemy.select(LEASES)).all()


def from_elsewhere(engine):
    """The lease as a process on another machine holds it: nobody can see whether that lives."""
    with engine.begin() as connection:
        (row,) = connection.execute(sqlalchemy.select(LEASES)).all()
        holder = json.loads(row.holder) | {"host": "elsewhere"}
        connection.execute(sqlalchemy.update(LEASES).values(holder=json.dumps(holder)))


def test_a_lease_has_one_holder_who_is_named(engine, hasty):
    lease = StorageLease(engine, "s")
    other = StorageLease(engine, "t")
    with pytest.raises(LockHeld, match=f"pid {os.getpid()} on "):
        StorageLease(engine, "s")
    lease.check()
    lease.release()
    StorageLease(engine, "s").release()
    other.release()
    assert not rows(engine)


def test_many_at_once_leave_one_holder(engine, hasty):
    found = []

    def take():
        try:
            found.append(StorageLease(engine, "s"))
        except LockHeld:
            found.append(None)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (lease,) = [lease for lease in found if lease]
    lease.check()
    lease.release()


def test_a_living_holder_elsewhere_keeps_its_lease(engine, hasty):
    lease = StorageLease(engine, "s")
    from_elsewhere(engine)
    with pytest.raises(LockHeld, match="on elsewhere"):
        StorageLease(engine, "s")
    lease.check()
    lease.release()


HOLD = """
import os, sys, sqlalchemy
from evomerge.searching.records.storage_lease import StorageLease
lease = StorageLease(sqlalchemy.create_engine(sys.argv[1]), "s")
print("taken", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_killed_holder_has_no_lease(engine, hasty, elsewhere):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(engine.url)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
    )
    assert process.stdout.readline() == "taken\n"
    with pytest.raises(LockHeld, match=f"pid {process.pid}"):
        StorageLease(engine, "s")
    process.kill()
    process.communicate()
    if elsewhere:
        from_elsewhere(engine)
    StorageLease(engine, "s").release()


def test_a_holder_whose_lease_was_taken_writes_no_more(engine, hasty, tmp_path):
    ledger = begun(f"sqlite:///{tmp_path}/s.db")
    lease = StorageLease(engine, "s")
    ledger.storage.guard = lease.check
    trial = ledger.start("candidate", [1.0], 0, 1)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.update(LEASES).values(token="another"))
    for write in (
        lambda: ledger.start("candidate", [1.0], 0, 2),
        lambda: ledger.fail(trial, "reason"),
        lambda: ledger.remember("elapsed", 1.0),
    ):
        with pytest.raises(StudyError, match="has taken the study over"):
            write()
    assert len(ledger.storage.trials()) == 2
    lease.release()
    assert rows(engine)[0].token == "another"


@pytest.fixture
def server():
    """A PostgreSQL of one's own, in EVOMERGE_TEST_POSTGRESQL."""
    url = os.environ.get("EVOMERGE_TEST_POSTGRESQL")
    if not url:
        pytest.skip("EVOMERGE_TEST_POSTGRESQL is not set: the URL of an empty database")
    return url


def test_a_study_on_a_server(server):
    with only_worker(server, "s") as guard:
        ledger = begun(server)
        ledger.storage.guard = guard
        ledger.fail(ledger.records()[0], "reason")
        with pytest.raises(StudyError, match="another process"), only_worker(server, "s"):
            pass
    assert open_ledger(server, "s").records()[0].reason == "reason"
    with pytest.raises(InputError, match="There are: s"):
        open_ledger(server, "t")
    optuna.delete_study(study_name="s", storage=server)


@pytest.mark.parametrize(
    "form", ["{}", "sqlite:///{}", "/", ".", "sqlite:////", "sqlite:///.", "/dev/null"]
)
def test_a_storage_is_a_regular_file(tmp_path, form):
    with pytest.raises(InputError, match="--storage"):
        storage_place(form.format(tmp_path))
