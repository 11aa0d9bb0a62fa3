"""Files written whole, and locks that a killed process does not leave."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from evomerge.errors import OutputError
from evomerge.files import ExclusiveLock, LockHeld, replace_file
from evomerge.merging.checkpoints.new_folder import HELPER_LOCK, new_folder

ROOT = Path(__file__).parents[1]
HOLD = """
import pathlib, sys
from evomerge.files import ExclusiveLock
lock = ExclusiveLock(pathlib.Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path/x.lock until it is killed."""
    process = hold(tmp_path / "x.lock")
    yield process
    process.kill()
    process.communicate()


def hold(path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
    )
    assert process.stdout.readline() == "locked\n"
    return process


def test_a_lock_has_one_holder_who_is_named(tmp_path, holder):
    with pytest.raises(LockHeld) as held:
        ExclusiveLock(tmp_path / "x.lock")
    assert held.value.holder == f"pid {holder.pid}"
    with ExclusiveLock(tmp_path / "y.lock"):
        with pytest.raises(LockHeld) as held:
            ExclusiveLock(tmp_path / "y.lock")
        assert held.value.holder == f"pid {os.getpid()}"
    with ExclusiveLock(tmp_path / "y.lock"):
        pass
    assert not list(tmp_path.glob("y*"))


def test_what_a_killed_process_leaves_is_no_lock(tmp_path, holder):
    holder.kill()
    holder.communicate()
    assert (tmp_path / "x.lock").exists()
    with ExclusiveLock(tmp_path / "x.lock"):
        assert (tmp_path / "x.lock.pid").read_text() == f"pid {os.getpid()}"
    assert not list(tmp_path.iterdir())


def test_a_folder_that_a_helper_still_fills_is_not_removed(tmp_path):
    """The process that began it was killed, mergekit is still writing."""
    hidden = tmp_path / ".out.merging-abc"
    (hidden / "model").mkdir(parents=True)
    helper = hold(hidden / HELPER_LOCK)
    try:
        with new_folder(tmp_path / "out"):
            pass
        assert (hidden / "model").is_dir()
    finally:
        helper.kill()
        helper.communicate()
    (tmp_path / "out").rmdir()
    with new_folder(tmp_path / "out"):
        assert not hidden.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_many_processes_never_take_a_living_folder_for_dead(tmp_path):
    code = (
        "import pathlib, sys\n"
        "from evomerge.merging.checkpoints.new_folder import new_folder\n"
        "for i in range(60):\n"
        "    try:\n"
        "        with new_folder(pathlib.Path(sys.argv[1])) as unfinished:\n"
        "            (unfinished.path / 'file').write_text('x')\n"
        "            assert (unfinished.path / 'file').read_text() == 'x'\n"
        "            raise KeyError\n"
        "    except KeyError:\n"
        "        pass\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(5)
    ]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 5, said
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path):
    path = tmp_path / "a" / "b.txt"
    replace_file(path, lambda file: file.write_text("one"))

    def full(file):
        file.write_text("two")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match="cannot be written: No space left on device"):
        replace_file(path, full)
    assert path.read_text() == "one"
    assert [entry.name for entry in path.parent.iterdir()] == ["b.txt"]
    assert path.stat().st_mode & 0o777 == 0o644


WRITE = """
import os, pathlib, signal, sys
from evomerge.files import replace_file
def write(path):
    path.write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
replace_file(pathlib.Path(sys.argv[1]), write)
"""


def test_what_a_killed_writer_left_is_removed_by_the_next_one(tmp_path):
    """Not what a living one still writes, nor another file's; names may hold a pattern."""
    path, other = tmp_path / "a[b]*.txt", tmp_path / "a[b]*.txt2"
    writers = []
    for target in (path, path, other):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITE, str(target)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            text=True,
        )
        assert process.stdout.readline() == "writing\n"
        writers.append(process)
    dead, living, elsewhere = writers
    try:
        for process in (dead, elsewhere):
            process.kill()
            process.communicate()
        assert len(list(tmp_path.iterdir())) == 3
        replace_file(path, lambda file: file.write_text("whole"))
        assert path.read_text() == "whole"
        left = [entry for entry in tmp_path.iterdir() if entry != path]
        assert sorted(entry.read_text() for entry in left) == ["half", "half"]
        assert sum(entry.name.startswith(f".{other.name}") for entry in left) == 1
        living.communicate()
        assert living.returncode == 0
        assert path.read_text() == "half"
    finally:
        living.kill()
        living.communicate()
    assert sum(entry.name.startswith(f".{path.name}.") for entry in tmp_path.iterdir()) == 0


def test_many_processes_replace_one_file(tmp_path):
    """None takes another's unfinished file for a dead one's."""
    code = (
        "import pathlib, sys\n"
        "from evomerge.files import replace_file\n"
        "for i in range(100):\n"
        "    replace_file(pathlib.Path(sys.argv[1]), lambda path: path.write_text('x' * 1000))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
