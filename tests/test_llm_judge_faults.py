"""Whatever the server does: each grade that it gave is kept once, none is invented, and the run is
complete or paused.
"""

import random
import sqlite3
import statistics
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from fault_server import LATE, FaultServer

from evomerge.answering.engine import Answer
from evomerge.errors import JudgePaused
from evomerge.judging.llm.judge import LlmJudge
from evomerge.study import JudgeSection
from evomerge.tasks import Task

FAST = {"back_off": 0.001, "timeout": LATE / 2}


def kept(path):
    """grades in the file, as a sorted list; how many requests it says were paid for."""
    with closing(sqlite3.connect(path)) as db:
        grades = sorted(grade for (grade,) in db.execute("SELECT grade FROM votes"))
        return grades, db.execute("SELECT requests FROM spent").fetchone()[0]


def make(url, path, **settings):
    return LlmJudge(JudgeSection(kind="llm", base_url=url, model="m", **(FAST | settings)), path)


def grade(judge, tasks, answers):
    """The grades, or None where the run paused, in one line."""
    try:
        return judge.grade_all(tasks, answers)
    except JudgePaused as error:
        line = str(error)
    assert "\n" not in line
    assert "run the same command" in line or "Raise judge." in line
    return None


def run_schedule(seed, folder):
    """One schedule to its end; how often the run paused."""
    rng = random.Random(seed)
    n, votes = rng.randint(2, 5), rng.choice([1, 1, 2, 3])
    tasks = [Task(i, f"課題{i}", "正解", "観点") for i in range(n)]
    answers = [Answer(f"回答 {seed}/{i}", False, 1) for i in range(n)]
    settings = {
        "votes": votes,
        "retries": rng.randint(0, 3),
        "asks": rng.randint(1, 3),
        "concurrency": rng.choice([1, 4, 16]),
    }
    if rng.random() < 0.3:
        settings["max_requests"] = rng.randint(1, 2 * n)
    server, path, pauses = (
        FaultServer(seed, rng.choice([0.0, 0.1, 0.3, 0.6]), down_after=rng.choice([None, None, n])),
        folder / f"{seed}",
        0,
    )
    with server.running() as url:
        judge = make(url, path, **settings)
        for _ in range(3):
            grades = grade(judge, tasks, answers)
            in_file, requests = kept(path)
            assert in_file == sorted(g for replies in server.given.values() for g in replies), (
                "kept once, and nothing else"
            )
            assert server.count <= requests == judge.spent.requests, "one may be lost on the way"
            assert requests <= settings.get("max_requests", requests)
            if grades is not None:
                break
            pauses += 1
        judge.close()
        # the causes go: the server is well again, the budget raised
        server.rate, server.down_after = 0.0, None
        judge = make(url, path, **(settings | {"max_requests": None}))
        count = server.count
        final = grade(judge, tasks, answers)
        judge.close()
        assert grades is None or (final, server.count) == (grades, count), (
            "all of it came from the file"
        )
        assert [g.value for g in final] == [
            statistics.median(server.given[a.text]) for a in answers
        ]
        assert all(len(server.given[a.text]) == votes for a in answers), (
            "no vote was paid for twice"
        )
    return pauses


@pytest.mark.parametrize("block", range(10))
def test_two_hundred_fault_schedules(block, tmp_path):
    seeds = range(20 * block, 20 * block + 20)
    with ThreadPoolExecutor(4) as pool:  # most of a schedule's time is waiting
        pauses = list(pool.map(lambda seed: run_schedule(seed, tmp_path), seeds))
    assert 0 in pauses, "some are complete at once"
    assert max(pauses) > 0, "and some pause"
