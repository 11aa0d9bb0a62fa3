"""A study that is killed at random moments ends as one that is not."""

import json
import os
import random
import signal
import sqlite3
import time
from contextlib import closing

import pytest
from process_tools import begin, ended

from evomerge.searching.ledger import open_ledger
from evomerge.searching.snapshot import load_snapshot

TRIALS = 12
RANKINGS = {
    "all": ["search.ranking=all"],
    "subset": ["search.ranking=subset", "search.subset=6", "split.validation=0.3"],
    "race": ["search.ranking=race", "search.subset=16", "split.validation=0.2"],
}


def arguments(pair, folder, ranking="all"):
    where = [
        "--storage",
        f"sqlite:///{folder}/s.db",
        "--results",
        str(folder / "results"),
        "--trials",
        str(TRIALS),
    ]
    settings = ["generation.max_new_tokens=6", *RANKINGS[ranking]]
    return [
        "search",
        str(pair / "study.yaml"),
        *where,
        *(x for s in settings for x in ("--set", s)),
    ]


def outcome(folder):
    """What every complete trial was and gave, without its number, and the verdict."""
    finished = load_snapshot(f"sqlite:///{folder}/s.db", "tiny")
    keys = (
        "generation",
        "index",
        "role",
        "weights",
        "score",
        "stderr",
        "n",
        "truncated",
        "tokens",
        "grades",
    )
    return [
        [getattr(r, k) for k in keys] for r in finished.records if r.state == "complete"
    ], finished.verdict


@pytest.fixture(scope="module")
def whole(pair, tmp_path_factory):
    """ranking -> the trials and the verdict of an uninterrupted run, and how long it took."""
    found = {}

    def run(ranking):
        if ranking not in found:
            folder, began = tmp_path_factory.mktemp("whole"), time.monotonic()
            assert ended(begin(arguments(pair, folder, ranking), folder / "log")) == 0, (
                folder / "log"
            ).read_text()
            found[ranking] = outcome(folder), time.monotonic() - began
        return found[ranking]

    return run


@pytest.mark.parametrize("ranking", RANKINGS)
def test_kills_change_nothing(pair, whole, tmp_path, ranking):
    expected, seconds = whole(ranking)
    rng, kills = random.Random(0), 0
    command, log = arguments(pair, tmp_path, ranking), tmp_path / "log"
    for _ in range(5):
        child = begin(command, log)
        time.sleep(rng.uniform(0.05, 0.2 * seconds))
        if os.waitpid(child, os.WNOHANG) == (0, 0):
            os.kill(child, signal.SIGKILL)
            kills += ended(child) == -signal.SIGKILL
    assert kills >= 2, "too many runs were over before they were to be killed"
    assert ended(begin(command, log)) == 0, log.read_text()
    assert outcome(tmp_path) == expected
    assert "verdict on 20 held-out tasks" in log.read_text()


def test_a_full_disk_loses_nothing(pair, whole, tmp_path):
    # the empty database has 115 kB, the finished one more; without privileges a limit is all there
    # is of a full disk
    log = tmp_path / "log"
    assert ended(begin(arguments(pair, tmp_path), log, limit=135_000)) == 1
    last = log.read_text().strip().splitlines()[-1]
    assert last.startswith("evomerge: ")
    assert "Free some space, then run the same command." in last
    assert "Traceback" not in log.read_text()
    kept, _ = outcome(tmp_path)
    assert 3 < len(kept) < TRIALS
    assert ended(begin(arguments(pair, tmp_path), log)) == 0
    assert outcome(tmp_path) == whole("all")[0]


def test_an_older_study_goes_on(pair, whole, tmp_path):
    """Each figure of a result was an attribute of its own before."""
    log = tmp_path / "log"
    assert ended(begin([*arguments(pair, tmp_path), "--trials", "6"], log)) == 0
    new = open_ledger(f"sqlite:///{tmp_path}/s.db", "tiny").records()
    with closing(sqlite3.connect(tmp_path / "s.db")) as db, db:
        rows = db.execute(
            "SELECT trial_id, value_json FROM trial_user_attributes WHERE key = 'result'"
        ).fetchall()
        attributes = [
            (t, key, json.dumps(value))
            for t, result in rows
            for key, value in json.loads(result).items()
        ]
        db.executemany(
            "INSERT INTO trial_user_attributes (trial_id, key, value_json) VALUES (?, ?, ?)",
            attributes,
        )
        db.execute("DELETE FROM trial_user_attributes WHERE key = 'result'")
    old = open_ledger(f"sqlite:///{tmp_path}/s.db", "tiny")
    attributes = [t.user_attrs for t in old.storage.trials()]
    assert all("result" not in a and "grades" in a for a in attributes)
    assert old.records() == new
    assert ended(begin(arguments(pair, tmp_path), log)) == 0, log.read_text()
    found, verdict = outcome(tmp_path)
    expected, expected_verdict = whole("all")[0]
    # the mean after 6 trials is one more
    assert [t for t in found if t[0] != 1 or t[2] != "mean"] == expected
    assert verdict == expected_verdict
