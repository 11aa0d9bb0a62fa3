"""A study that is killed at random moments ends as one that is not."""

import json
import os
import random
import signal
import subprocess
import sys
import time

TRIALS = 40


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


def test_five_kills_change_nothing(pair, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    began = time.monotonic()
    subprocess.run(command(pair, whole), check=True, env=environment(), capture_output=True)
    length = time.monotonic() - began
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
    assert complete(killed) == complete(whole)
    assert "verdict on 20 held-out tasks" in last.stdout
