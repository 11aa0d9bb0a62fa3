"""A study judged by a server that fails, pauses and is killed ends with the trials of one that was
left alone.
"""

import hashlib
import json
import os
import random
import signal
import sqlite3
import time
from collections import Counter
from contextlib import closing

import pytest
from chat_server import Server, status
from fault_server import ACTIONS, PASSES, answer_of
from process_tools import begin, ended, running

from evomerge.answering.hf.engine import TransformersEngine
from evomerge.cli import main
from evomerge.searching.snapshot import load_snapshot


class Steady(Server):
    """Its grade is a function of the request; a share of its replies fail first."""

    def __init__(self, rate=0.0, seconds=0.0):
        super().__init__(plan=self.next, seconds=seconds)
        self.rate, self.rng, self.given = rate, random.Random(0), Counter()

    def next(self, number, prompt):
        with self.lock:
            if self.rng.random() < self.rate:
                return ACTIONS[self.rng.choice([fault for fault in PASSES if fault != "slow"])]
            self.given[prompt] += 1
        return {
            "text": json.dumps(
                {
                    "reason": "",
                    "grade": 1 + hashlib.sha256(answer_of(prompt).encode()).digest()[0] % 5,
                }
            )
        }


def arguments(pair, folder, url, *settings):
    where = [
        "--storage",
        f"sqlite:///{folder}/s.db",
        "--results",
        str(folder / "results"),
        "--trials",
        "10",
    ]
    judge = ["kind=llm", f"base_url={url}", "model=m", "back_off=0.001", "retries=20", *settings]
    return [
        "search",
        str(pair / "study.yaml"),
        *where,
        *(x for s in judge for x in ("--set", f"judge.{s}")),
    ]


def outcome(folder):
    finished = load_snapshot(f"sqlite:///{folder}/s.db", "tiny")
    done = [r for r in finished.records if r.state == "complete"]
    return [
        (r.role, r.generation, r.index, r.vector, r.score, r.grades) for r in done
    ], finished.verdict


@pytest.fixture(scope="module")
def whole(pair, tmp_path_factory):
    """An undisturbed study, and how often its engine merged."""
    folder, server, merged = tmp_path_factory.mktemp("whole"), Steady(), Counter()
    apply = TransformersEngine.apply
    with pytest.MonkeyPatch.context() as patch, server.running() as url:
        patch.setattr(
            TransformersEngine,
            "apply",
            lambda self, r: (merged.update([r.digest()]), apply(self, r))[1],
        )
        assert main(arguments(pair, folder, url)) == 0
    assert set(server.given.values()) == {1}, "no answer is graded twice"
    return outcome(folder), merged, len(server.given)


def test_what_is_done_ahead_is_what_comes(whole):
    (trials, verdict), merged, _ = whole
    assert [t[1:3] for t in trials if t[0] == "candidate"] == [divmod(i, 4) for i in range(10)]
    assert verdict.n == 20
    # each recipe is merged for its search tasks, the first one before anything is stored, seven
    # finalists once more for the validation tasks, and at most five for the held-out ones
    assert len(trials) <= sum(merged.values()) <= len(trials) + 1 + 7 + 5


def test_pauses_and_faults_change_nothing(pair, whole, tmp_path, capsys):
    server, codes = Steady(rate=0.3), []
    with server.running() as url:
        # a third of the requests give nothing
        for limit in (whole[2] // 4, whole[2] // 2, whole[2], None):
            codes.append(
                main(arguments(pair, tmp_path, url, *([f"max_requests={limit}"] if limit else [])))
            )
            if limit:
                last = capsys.readouterr().err.strip().splitlines()[-1]
                assert last.startswith("evomerge: paused: the judge's budget of")
    assert codes == [3, 3, 3, 0]
    assert outcome(tmp_path) == whole[0]
    assert set(server.given.values()) == {1}


def test_kills_change_nothing(pair, whole, tmp_path):
    server, rng = Steady(rate=0.1, seconds=0.02), random.Random(1)
    with server.running() as url:
        command = arguments(pair, tmp_path, url)
        for _ in range(2):
            before = sum(server.given.values())
            process = begin(command, tmp_path / "log")
            wanted = before + rng.randint(10, 60)
            while sum(server.given.values()) < wanted and running(process):
                time.sleep(0.01)
            os.kill(process, signal.SIGKILL)
            assert ended(process) == -signal.SIGKILL
        assert main(command) == 0
    assert outcome(tmp_path) == whole[0]
    with closing(sqlite3.connect(tmp_path / "tiny.grades.sqlite")) as db:
        votes = db.execute("SELECT count(*) FROM votes").fetchone()[0]
    assert votes == len(server.given), (
        "a kill loses what was on its way at most, which is asked for again"
    )
    assert sum(server.given.values()) <= votes + 2 * 16


def test_a_judge_that_refuses_some_answers_ends_no_search(pair, tmp_path):
    """Refused answers count as the lowest grade; all others have the grades of a whole study."""
    refusal = status(400, body={"error": {"message": "filtered", "code": "content_filter"}})

    class Prudish(Steady):
        def next(self, number, prompt):
            if hashlib.sha256(answer_of(prompt).encode()).digest()[1] % 4 == 0:
                return refusal
            return super().next(number, prompt)

    server = Prudish()
    with server.running() as url:
        assert main(arguments(pair, tmp_path, url)) == 0
    trials, verdict = outcome(tmp_path)
    assert verdict is not None
    assert len([trial for trial in trials if trial[0] == "candidate"]) == 10
    refused = len(server.prompts()) - sum(server.given.values())
    assert refused > 0
