"""A study that is killed at random moments ends as one that is not."""

import json
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import pytest

TRIALS = 24


def command(pair, folder):
    storage, results = f"sqlite:///{folder}/s.db", str(folder / "results")
    run = [sys.executable, "-m", "evomerge.cli", "search", str(pair / "study.yaml"), "--trials", str(TRIALS)]
    return [*run, "--storage", storage, "--results", results]


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def complete(folder):
    """(generation, index, role, weights, score) of every complete trial, without its number."""
    out = subprocess.run(
        [sys.executable, "-m", "evomerge.cli", "show", "tiny", "--json", "--storage", f"sqlite:///{folder}/s.db"],
        capture_output=True, text=True, check=True, env=environment(),
    )  # fmt: skip
    shown = json.loads(out.stdout)
    keys = ("generation", "index", "role", "weights", "score", "stderr", "n", "truncated")
    trials = [[t[k] for k in keys] for t in shown["trials"] if t["state"] == "complete"]
    return trials, shown["verdict"]


@pytest.fixture(scope="module")
def whole(pair, tmp_path_factory):
    """The trials and the verdict of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    subprocess.run(command(pair, folder), check=True, env=environment(), capture_output=True)
    return complete(folder)


def finished(folder):
    """How many trials are complete in the database so far."""
    if not (folder / "s.db").exists():
        return 0
    with closing(sqlite3.connect(folder / "s.db", timeout=30)) as db:
        try:
            return db.execute("SELECT COUNT(*) FROM trials WHERE state = 'COMPLETE'").fetchone()[0]
        except sqlite3.OperationalError:  # its tables are not made yet
            return 0


def test_five_kills_change_nothing(pair, whole, tmp_path):
    rng = random.Random(0)
    kills = 0
    for _ in range(5):
        process = subprocess.Popen(command(pair, tmp_path), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        target = finished(tmp_path) + rng.randint(0, 3)
        while finished(tmp_path) < target and process.poll() is None:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.3))  # anywhere in the next trial
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert kills >= 3, "too many runs were over before they were to be killed"
    last = subprocess.run(command(pair, tmp_path), check=True, env=environment(), capture_output=True, text=True)
    assert complete(tmp_path) == whole
    assert "verdict on 20 held-out tasks" in last.stdout


def test_a_full_disk_loses_nothing(pair, whole, tmp_path):
    def no_space():  # the empty database has 115 kB, the finished one 197; without privileges a limit is all there is of a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (155_000, 155_000))

    out = subprocess.run(command(pair, tmp_path), env=environment(), capture_output=True, text=True, preexec_fn=no_space, check=False)
    assert out.returncode == 1
    last = out.stderr.strip().splitlines()[-1]
    assert last.startswith("evomerge: ")
    assert "Free some space" in last or "Free space" in last
    kept, _ = complete(tmp_path)
    assert 3 < len(kept) < TRIALS
    subprocess.run(command(pair, tmp_path), check=True, env=environment(), capture_output=True)
    assert complete(tmp_path) == whole
