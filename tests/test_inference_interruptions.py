"""Final inference that is killed, out of time or short of memory; and 10,000 tasks."""

import json
import os
import random
import signal
import time
from dataclasses import replace
from functools import partial

import pytest
from process_tools import ended, fork, running
from test_inference import ReversingEngine, expected, marked, rows, some_tasks

from evomerge.answering.engine import Answer
from evomerge.errors import EngineError
from evomerge.inference import run_inference
from evomerge.inference.best_of import BestOf
from evomerge.tasks import Task

COUNT = 60


class Streaming(ReversingEngine):
    """Tells of each answer when it is there, shortest prompts first, and stops at the deadline in
    the middle of one.
    """

    def answer(self, prompts, settings=None, on_answer=None, deadline=None):
        answers = [Answer("", True, 0)] * len(prompts)
        for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
            if deadline is not None and time.monotonic() >= deadline:
                answers[i] = Answer(prompts[i][::-1][:2], True, 2)
                break
            answers[i] = super().answer([prompts[i]])[0]
            on_answer(i, answers[i])
        return answers


def child(out, log, seconds):
    """What the processes below run."""
    run_inference(Streaming(log, seconds), marked(), some_tasks(COUNT), out)
    return 0


def part_of(out):
    return out.with_name(out.name + ".part")


def test_killed_at_20_random_moments_no_task_is_answered_twice(tmp_path):
    out, log, rng = tmp_path / "a.jsonl", tmp_path / "log", random.Random(7)
    kills = 0
    for _ in range(20):
        process = fork(partial(child, out, log, 0.02))
        begun = log.read_text().count("\n") if log.exists() else 0
        limit = time.monotonic() + 60
        while (
            running(process)
            and time.monotonic() < limit
            and (log.read_text().count("\n") if log.exists() else 0) <= begun
        ):
            time.sleep(0.001)
        time.sleep(rng.random() * 0.06)
        os.kill(process, signal.SIGKILL)
        kills += ended(process) == -signal.SIGKILL
        kept = [
            i
            for line in part_of(out).read_bytes().split(b"\n")[1:-1]
            for i in json.loads(line)["batch"]
        ]
        assert len(kept) == len(set(kept))
        if len(kept) > COUNT - 5:
            break
    assert kills >= 12
    run_inference(Streaming(log), marked(), some_tasks(COUNT), out)
    assert rows(out) == expected(some_tasks(COUNT))
    asked = [json.loads(line) for line in log.read_text().splitlines()]
    # only what was under way when it was killed is asked again
    assert len(asked) - len(set(asked)) <= kills
    assert not part_of(out).exists()


def test_the_time_limit_leaves_a_whole_file_and_the_same_command_goes_on(tmp_path):
    tasks, out = some_tasks(COUNT), tmp_path / "a.jsonl"
    done = run_inference(
        Streaming(seconds=0.01), marked(), tasks, out, deadline=time.monotonic() + 0.2
    )
    found = rows(out)
    assert [(r["task_id"], r["input"]) for r in found] == [(t.task_id, t.input) for t in tasks]
    left = [r for r in found if "unfinished" in r]
    assert 0 < len(left) == done.unfinished == COUNT - done.answered < COUNT
    assert {r["unfinished"] for r in left} == {"time limit"}
    assert [r for r in found if r not in left] == [
        e for e, r in zip(expected(tasks), found, strict=True) if r not in left
    ]
    begun = [r for r in left if r["output"]]
    assert len(begun) == done.partial <= 1  # none, where the time was up between two
    assert all(row["output"] == f"|{row['input']}|"[::-1][:2] for row in begun)
    engine = Streaming()
    again = run_inference(engine, marked(), tasks, out)
    assert (again.answered, again.unfinished) == (COUNT, 0)
    assert rows(out) == expected(tasks)
    assert len(engine.prompts) == len(left)
    assert not part_of(out).exists()


def test_under_a_time_limit_cheap_tasks_go_first(tmp_path):
    tasks = [Task(i, "あ" * n) for i, n in enumerate([90, 5, 70, 3, 50, 8, 40, 2])]
    engine = Streaming()
    run_inference(engine, marked(), tasks, tmp_path / "a.jsonl", deadline=time.monotonic() + 60)
    lengths = [len(prompt) for prompt in engine.prompts]
    assert lengths == sorted(lengths)
    assert rows(tmp_path / "a.jsonl") == expected(tasks)


def test_under_a_time_limit_an_error_leaves_a_file_too(tmp_path):
    engine = Streaming(fail_at=10)
    with pytest.raises(EngineError):
        run_inference(
            engine, marked(), some_tasks(), tmp_path / "a.jsonl", deadline=time.monotonic() + 60
        )
    found = rows(tmp_path / "a.jsonl")
    assert len(found) == len(some_tasks())
    assert sum("unfinished" not in row for row in found) == 10
    assert {row["unfinished"] for row in found if "unfinished" in row} == {"error"}
    run_inference(Streaming(), marked(), some_tasks(), tmp_path / "a.jsonl")
    assert rows(tmp_path / "a.jsonl") == expected(some_tasks())


def test_a_time_that_is_over_still_leaves_a_file(tmp_path):
    engine = Streaming()
    done = run_inference(
        engine, marked(), some_tasks(3), tmp_path / "a.jsonl", deadline=time.monotonic() - 1
    )
    assert (done.answered, done.unfinished, done.partial, engine.prompts) == (0, 3, 0, [])
    assert [(r["output"], r["unfinished"]) for r in rows(tmp_path / "a.jsonl")] == [
        ("", "time limit")
    ] * 3


def test_what_memory_has_forced_is_known_after_a_kill(tmp_path):
    class Short(Streaming):
        def answer(self, prompts, *rest):
            self.limits["batch_tokens"] = 64 - len(self.prompts)
            if len(self.prompts) >= 8:
                raise KeyboardInterrupt
            return super().answer(prompts, *rest)

    with pytest.raises(KeyboardInterrupt):
        run_inference(Short(), marked(), some_tasks(), tmp_path / "a.jsonl")
    engine = Streaming()
    run_inference(engine, marked(), some_tasks(), tmp_path / "a.jsonl")
    assert engine.limits == {"batch_tokens": 60}
    assert rows(tmp_path / "a.jsonl") == expected(some_tasks())


def test_ten_thousand_tasks(tmp_path):
    class Quick(ReversingEngine):
        def batches(self, prompts, settings=None):
            return [
                list(range(at, min(at + 256, len(prompts)))) for at in range(0, len(prompts), 256)
            ]

    lines = "".join(
        json.dumps({"task_id": f"t{i}", "input": f"第{i}問\r\n続き"}, ensure_ascii=False) + "\r\n"
        for i in range(10_000)
    )
    (tmp_path / "tasks.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    from evomerge.tasks import load_tasks

    tasks = load_tasks(tmp_path / "tasks.jsonl")
    run_inference(Quick(), marked(), tasks, tmp_path / "a.jsonl")
    found = rows(tmp_path / "a.jsonl")
    assert [r["task_id"] for r in found] == [f"t{i}" for i in range(10_000)]
    assert found == expected(tasks)


def test_a_time_that_is_up_while_asking_again_keeps_what_is_there(tmp_path):
    """Best of 3: the limit strikes in its rounds; the same command then asks only for the rest."""
    tasks, out = some_tasks(12), tmp_path / "a.jsonl"
    engine = Streaming(seconds=0.05)  # 36 answers take 1.8 s
    done = run_inference(
        engine, marked(), tasks, out, deadline=time.monotonic() + 1.3, refine=[BestOf(3)]
    )
    first = len(engine.prompts)
    assert 12 < first < 36
    assert (done.answered, done.unfinished) == (12, 0)
    assert "run the same command again" in done.told[-1]
    assert part_of(out).exists()
    again = Streaming()
    run_inference(again, marked(), tasks, out, refine=[BestOf(3)])
    assert len(again.prompts) == 36 - first
    assert not part_of(out).exists()
    assert rows(out) == expected(tasks)


def test_a_round_of_other_settings_is_asked_anew(tmp_path):
    """Answers that were asked again for one reason are not taken for those of another."""
    tasks, out = some_tasks(6), tmp_path / "a.jsonl"

    def asks(penalty, stop=False):
        def step(run, chosen):
            asked = {
                i: replace(p, settings=p.settings.replace(repetition_penalty=penalty))
                for i, p in enumerate(run.prompts)
            }
            run.ask(asked, "check 1")
            if stop:
                raise KeyboardInterrupt
            return ""

        return step

    with pytest.raises(KeyboardInterrupt):
        run_inference(Streaming(), marked(), tasks, out, refine=[asks(1.1, stop=True)])
    engine = Streaming()
    run_inference(engine, marked(), tasks, out, refine=[asks(1.1), asks(1.2)])
    assert len(engine.prompts) == 6
