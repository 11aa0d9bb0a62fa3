"""A study that is killed at random moments ends as one that is not."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

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
    """An uninterrupted run: (its trials and verdict, its seconds)."""
    folder = tmp_path_factory.mktemp("whole")
    began = time.monotonic()
    subprocess.run(command(pair, folder), check=True, env=environment(), capture_output=True)
    return complete(folder), time.monotonic() - began


def test_five_kills_change_nothing(pair, whole, tmp_path):
    killed = tmp_path / "killed"
    killed.mkdir()
    wanted, length = whole
    rng = random.Random(0)
    kills = 0
    for _ in range(5):
        process = subprocess.Popen(command(pair, killed), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.3, 0.9) * length)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert kills, "every run was over before it was to be killed"
    last = subprocess.run(command(pair, killed), check=True, env=environment(), capture_output=True, text=True)
    assert complete(killed) == wanted
    assert "verdict on 20 held-out tasks" in last.stdout


def test_a_full_disk_loses_nothing(pair, whole, tmp_path):
    full = tmp_path / "full"
    full.mkdir()

    def no_space():  # a limit on file sizes is what a process without privileges can have of a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (180_000, 180_000))

    out = subprocess.run(command(pair, full), env=environment(), capture_output=True, text=True, preexec_fn=no_space, check=False)
    assert out.returncode == 1
    last = out.stderr.strip().splitlines()[-1]
    assert last.startswith("evomerge: ")
    assert "Free some space" in last or "Free space" in last
    kept, _ = complete(full)
    assert 3 < len(kept) < TRIALS
    subprocess.run(command(pair, full), check=True, env=environment(), capture_output=True)
    assert complete(full) == whole[0]
