"""A study whose files are cut short, locked or in a read-only folder: one clear line, nothing lost,
and then the same trials.
"""

import ctypes
import shutil
import sqlite3
from contextlib import closing

import pytest
from process_tools import begin, ended
from test_llm_judge_study import Steady

from evomerge import sqlite_file
from evomerge.answering.hf.engine import TransformersEngine
from evomerge.cli import main
from evomerge.errors import OutputError
from evomerge.judging.llm.grades_cache import GradesCache, Usage
from evomerge.judging.llm.judge_prompt import Vote
from evomerge.searching.ledger import Ledger
from evomerge.searching.snapshot import load_snapshot


def arguments(pair, folder, trials=8):
    where = [
        "--storage",
        f"sqlite:///{folder}/s.db",
        "--results",
        str(folder / "results"),
        "--trials",
        str(trials),
    ]
    return [
        "search",
        str(pair / "study.yaml"),
        *where,
        "--set",
        "generation.max_new_tokens=4",
        "--set",
        "search.ranking=all",
    ]


def outcome(folder):
    finished = load_snapshot(f"sqlite:///{folder}/s.db", "tiny")
    keys = ("role", "generation", "index", "weights", "score", "grades")
    return [
        [getattr(r, k) for k in keys] for r in finished.records if r.state == "complete"
    ], finished.verdict


@pytest.fixture(scope="module")
def whole(pair, tmp_path_factory):
    """The folder of an undisturbed study."""
    folder = tmp_path_factory.mktemp("whole")
    assert main(arguments(pair, folder)) == 0
    return folder


@pytest.fixture(scope="module")
def stopped(pair, tmp_path_factory):
    """A study that stopped in its second generation, as a full disk would leave it: its folder."""
    folder = tmp_path_factory.mktemp("stopped")
    finish, done = Ledger.finish, []

    def stop(self, trial, result):
        finish(self, trial, result)
        done.append(trial)
        if len(done) == 8:
            raise OutputError("stopped")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "finish", stop)
        assert main(arguments(pair, folder)) == 1
    return folder


@pytest.fixture
def under_way(stopped, whole, tmp_path):
    """A copy of that folder, which the test may change."""
    return shutil.copytree(stopped, tmp_path / "study")


def complaint(capsys, command, code=1):
    """The last line that a failing command says."""
    capsys.readouterr()
    assert main(command) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err.strip().splitlines()[-1]


@pytest.mark.parametrize("keep", [0.99, 0.5, 0.02, "garbage"])
def test_a_damaged_study_is_named_and_its_answers_are_found_again(
    pair, whole, tmp_path, capsys, monkeypatch, keep
):
    folder = tmp_path / "study"
    shutil.copytree(whole, folder)
    file = folder / "s.db"
    data = file.read_bytes()
    file.write_bytes(b"no database " * 1000 if keep == "garbage" else data[: int(keep * len(data))])
    damaged = file.read_bytes()
    for command in (arguments(pair, folder), ["show", "tiny", "--storage", f"sqlite:///{file}"]):
        line = complaint(capsys, command)
        assert line.startswith(f"evomerge: {file}: the study tiny is damaged or cut short")
        assert (
            "tiny.answers.sqlite: move s.db away, and `evomerge search` starts over with them"
            in line
        )
    assert file.read_bytes() == damaged
    file.rename(folder / "away")
    monkeypatch.delattr(TransformersEngine, "answer")  # whatever is not in the cache stops the run
    assert main(arguments(pair, folder)) == 0
    assert outcome(folder) == outcome(whole)


@pytest.mark.parametrize("text", ['{"score": ', b"\xff\xfe"])
def test_a_record_that_is_no_json(whole, tmp_path, capsys, text):
    """The file is sound, what it holds is not."""
    shutil.copy(whole / "s.db", tmp_path)
    with closing(sqlite3.connect(tmp_path / "s.db")) as db, db:
        db.execute(
            "UPDATE trial_user_attributes SET value_json = CAST(? AS TEXT) WHERE key = 'result'",
            (text,),
        )
    line = complaint(capsys, ["show", "tiny", "--storage", f"sqlite:///{tmp_path}/s.db"])
    assert line.startswith(f"evomerge: {tmp_path / 's.db'}: the study tiny is damaged or cut short")


@pytest.mark.parametrize(
    ("name", "what"), [("s.db", "the study tiny"), ("tiny.answers.sqlite", "the answer cache")]
)
def test_a_locked_file_is_waited_for_and_named(
    pair, whole, under_way, capsys, monkeypatch, name, what
):
    monkeypatch.setattr(sqlite_file, "WAIT", 0.2)
    with closing(sqlite3.connect(under_way / name, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        line = complaint(capsys, arguments(pair, under_way))
    assert line.startswith(
        f"evomerge: {under_way / name}: {what} is in use by another process: database is "
        "locked. Wait"
    )
    assert f"`fuser {under_way / name}`" in line
    assert main(arguments(pair, under_way)) == 0
    assert outcome(under_way) == outcome(whole)


def test_a_lock_in_mid_run_loses_nothing(pair, whole, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sqlite_file, "WAIT", 0.2)
    answer, calls = TransformersEngine.answer, []
    with (
        closing(sqlite3.connect(tmp_path / "s.db", isolation_level=None)) as other,
        pytest.MonkeyPatch.context() as patch,
    ):

        def locking(self, prompts, *rest):
            calls.append(prompts)
            if len(calls) == 20:
                other.execute("BEGIN EXCLUSIVE")
            return answer(self, prompts, *rest)

        patch.setattr(TransformersEngine, "answer", locking)
        line = complaint(capsys, arguments(pair, tmp_path))
    assert "the study tiny is in use by another process" in line
    assert main(arguments(pair, tmp_path)) == 0
    assert outcome(tmp_path) == outcome(whole)


@pytest.mark.parametrize("keep", [0.6, 0.05])
def test_a_damaged_answer_cache_costs_its_answers_alone(pair, whole, under_way, capsys, keep):
    file = under_way / "tiny.answers.sqlite"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data))])
    line = complaint(capsys, arguments(pair, under_way))
    assert line.startswith(f"evomerge: {file}: the answer cache is damaged or cut short")
    assert "Finished trials are stored in the study: move the file away" in line
    file.rename(under_way / "away")
    assert main(arguments(pair, under_way)) == 0
    assert outcome(under_way) == outcome(whole)


def forget_privileges():
    """Root is bound by permissions, too: no CAP_DAC_OVERRIDE, no CAP_DAC_READ_SEARCH in this
    process.
    """
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.capget(header, data)
    for word in range(3):
        data[word] &= ~0b110
    assert libc.capset(header, data) == 0


@pytest.mark.parametrize("begun", [True, False])
def test_a_read_only_folder(pair, whole, under_way, tmp_path, begun):
    folder = under_way if begun else tmp_path / "new"
    folder.mkdir(exist_ok=True)
    log = tmp_path / "log"
    modes = {path: path.stat().st_mode for path in [*folder.iterdir(), folder]}
    try:
        for path, mode in modes.items():
            path.chmod(mode & ~0o222)
        assert ended(begin(arguments(pair, folder), log, first=forget_privileges)) == 1
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
    line = log.read_text().strip().splitlines()[-1]
    assert line.startswith(f"evomerge: {folder / 's.db'}: the study")
    assert "Change the permissions of file and folder, then run the same command." in line
    assert main(arguments(pair, folder)) == 0
    assert outcome(folder) == outcome(whole)


def test_a_damaged_or_locked_grades_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(sqlite_file, "WAIT", 0.1)
    file = tmp_path / "g.sqlite"
    cache = GradesCache(file)
    cache.db.execute("PRAGMA synchronous = OFF")
    for i in range(400):
        cache.put(Usage(1, 2, 3), f"key {i}", 0, Vote(4, "a reason " * 10))
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        for use in (
            lambda: cache.get(["key 0"], 1),
            lambda: cache.spent,
            lambda: cache.put(Usage()),
            lambda: GradesCache(file),
        ):
            with pytest.raises(OutputError, match="the grades cache is in use by another process"):
                use()
    assert cache.spent == Usage(400, 800, 1200)
    cache.close()
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(
        OutputError,
        match=(
            r"the grades cache is damaged or cut short.*move the file away"
            r".*requests the remaining grades"
        ),
    ):
        GradesCache(file)


def test_a_damaged_or_locked_grades_cache_in_a_study(pair, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sqlite_file, "WAIT", 0.2)
    calm, folder = tmp_path / "calm", tmp_path / "study"
    with Steady().running() as url:

        def command(where, *more):
            settings = ["kind=llm", f"base_url={url}", "model=m", *more]
            return [
                *arguments(pair, where, 4),
                *(x for s in settings for x in ("--set", f"judge.{s}")),
            ]

        assert main(command(calm)) == 0
        assert main(command(folder, "max_requests=20")) == 3
        file = folder / "tiny.grades.sqlite"
        with closing(sqlite3.connect(file, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            line = complaint(capsys, command(folder))
        assert line.startswith(f"evomerge: {file}: the grades cache is in use by another process")
        data = file.read_bytes()
        file.write_bytes(data[: len(data) // 2])
        line = complaint(capsys, command(folder))
        assert line.startswith(f"evomerge: {file}: the grades cache is damaged or cut short")
        file.rename(folder / "away")
        assert main(command(folder)) == 0
    assert outcome(folder) == outcome(calm)
