"""Tasks in, answers out: order, exact texts, and going on after a kill at any moment."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import openpyxl
import pytest

from evomerge.answering.engine import Answer
from evomerge.answering.prompts import Prompter
from evomerge.errors import EngineError, InputError, OutputError, TaskError
from evomerge.inference import run_inference
from evomerge.knowledge.chooser import Chooser
from evomerge.knowledge.read_base import read_knowledge
from evomerge.study import PromptSection
from evomerge.tasks import Task, load_tasks

HERE = Path(__file__).resolve()
COUNT, SIZE = 23, 4


class ReversingEngine:
    """Answers a prompt with its characters reversed, longest prompts first, and logs each one
    before it answers.
    """

    def __init__(self, log=None, seconds=0.0, fail_at=None):
        self.log, self.seconds, self.fail_at, self.prompts = log, seconds, fail_at, []
        self.limits, self.context = {}, None

    def apply(self, recipe):
        raise AssertionError("inference merges nothing")

    def batches(self, prompts, settings=None):
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
        return [order[at : at + SIZE] for at in range(0, len(order), SIZE)]

    def answer(self, prompts, settings=None, on_answer=None, deadline=None):
        if self.fail_at is not None and len(self.prompts) >= self.fail_at:
            raise EngineError("out of memory")
        self.prompts += prompts
        if self.log is not None:
            with open(self.log, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(prompt) + "\n" for prompt in prompts)
        time.sleep(self.seconds)
        return [Answer(prompt[::-1], truncated=False, tokens=len(prompt)) for prompt in prompts]


def marked(end="|", chooser=None):
    """Prompts between marks."""
    return Prompter(
        None, PromptSection(format="template", template="|{input}" + end), chooser=chooser
    )


def some_tasks(count=COUNT):
    return tuple(Task(i, f"課題{i}「{'あ' * (i * 7 % 5)}」") for i in range(count))


def expected(tasks):
    return [{"task_id": t.task_id, "input": t.input, "output": f"|{t.input}|"[::-1]} for t in tasks]


def rows(path):
    return [json.loads(line) for line in path.read_bytes().decode().split("\n")[:-1]]


def child(out, log):
    """What the subprocesses below run."""
    run_inference(ReversingEngine(log, seconds=0.15), marked(), some_tasks(), out)


def start_child(out, log, **options):
    code = (
        f"import sys; sys.path.insert(0, {str(HERE.parent)!r}); import test_inference as t; "
        f"t.child({str(out)!r}, {str(log)!r})"
    )
    paths = {"PYTHONPATH": str(HERE.parents[1])}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | paths,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def kept(out):
    part = out.with_name(out.name + ".part")
    whole = part.read_bytes().split(b"\n")[1:-1] if part.exists() else []
    return {i for line in whole for i in json.loads(line)["batch"]}


def test_input_order_exact_texts_and_unescaped_utf8(tmp_path):
    text = "\ufeff"  # a byte-order mark
    text += '{"task_id": 7, "input": "改行\\nと\\r\\nと { } {input} \\u2028 \\"引用\\" 🍎 "}\r\n'
    text += '{\r\n "task_id": "b",\r\n "input": "二行"\r\n}\r\n'
    (tmp_path / "tasks.jsonl").write_bytes(text.encode())
    tasks = load_tasks(tmp_path / "tasks.jsonl")
    done = []
    run_inference(
        ReversingEngine(),
        marked(),
        tasks,
        tmp_path / "new" / "a.jsonl",
        progress=lambda *at: done.append(at),
    )
    assert tasks[0].input == '改行\nと\r\nと { } {input} \u2028 "引用" 🍎 '
    assert rows(tmp_path / "new" / "a.jsonl") == expected(tasks)
    data = (tmp_path / "new" / "a.jsonl").read_text(encoding="utf-8")
    assert "🍎" in data
    assert "\\u" not in data
    assert list(rows(tmp_path / "new" / "a.jsonl")[0]) == ["task_id", "input", "output"]
    assert done == [(0, 2), (2, 2)]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.jsonl"]


def test_knowledge_fills_prompts_and_writes_the_side_file(tmp_path):
    book = openpyxl.Workbook()
    book.active.title = "classes"
    for row in [
        ("class", "system", "template"),
        ("計算", "先生", "[{examples}]{input}"),
        ("創作", "", "{input}"),
    ]:
        book.active.append(row)
    sheet = book.create_sheet("examples")
    for row in [
        ("class", "input", "output"),
        ("計算", "3+5はいくつ", "8"),
        ("創作", "春の詩を書いて", "花"),
    ]:
        sheet.append(row)
    book.save(tmp_path / "base.xlsx")
    tasks = (Task(0, "{examples}と3+6はいくつ"), Task(1, "秋の詩を書いて"))
    engine = ReversingEngine()
    run_inference(
        engine,
        marked(chooser=Chooser(read_knowledge(tmp_path / "base.xlsx"))),
        tasks,
        tmp_path / "a.jsonl",
    )
    prompts = [
        "先生\n\n|[指示: 3+5はいくつ\n回答: 8]{examples}と3+6はいくつ|",
        "|春の詩を書いて|花\n\n|秋の詩を書いて|",
    ]
    assert sorted(engine.prompts) == sorted(prompts)
    assert [row["output"][::-1] for row in rows(tmp_path / "a.jsonl")] == prompts
    assert [row["input"] for row in rows(tmp_path / "a.jsonl")] == [t.input for t in tasks]
    side = rows(tmp_path / "a.classes.jsonl")
    assert [(r["task_id"], r["class"], r["examples"]) for r in side] == [
        (0, "計算", [2]),
        (1, "創作", [3]),
    ]
    assert all(0 < r["similarity"] < 1 for r in side)


@pytest.mark.parametrize("batches_before", [0, 1, 2, 4, 5])
def test_a_killed_run_goes_on(tmp_path, batches_before):
    out, log = tmp_path / "a.jsonl", tmp_path / "log"
    process = start_child(out, log)
    deadline = time.monotonic() + 60
    while (
        time.monotonic() < deadline
        and (log.read_text().count("\n") if log.exists() else 0) < batches_before * SIZE
    ):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not out.exists()
    survived, before = kept(out), log.read_text().split("\n")[:-1] if log.exists() else []
    assert len(survived) >= SIZE * (batches_before - 1)
    engine = ReversingEngine()
    run_inference(engine, marked(), some_tasks(), out)
    assert rows(out) == expected(some_tasks())
    assert sorted(engine.prompts) == sorted(
        f"|{t.input}|" for i, t in enumerate(some_tasks()) if i not in survived
    )
    assert len(before) + len(engine.prompts) <= COUNT + SIZE  # at most the batch that was under way
    assert not kept(out)


def test_a_part_cut_at_any_byte_goes_on(tmp_path):
    tasks, out, part = some_tasks(10), tmp_path / "a.jsonl", tmp_path / "a.jsonl.part"
    with pytest.raises(EngineError):
        run_inference(ReversingEngine(fail_at=8), marked(), tasks, out)
    whole = part.read_bytes()
    for size in [*range(0, len(whole), 11), len(whole) - 1, len(whole)]:
        part.write_bytes(whole[:size])
        survived = kept(out)
        engine = ReversingEngine()
        run_inference(engine, marked(), tasks, out)
        assert rows(out) == expected(tasks)
        assert len(engine.prompts) == len(tasks) - len(survived)
    assert len(survived) == 8


def test_killed_after_the_last_batch(tmp_path):
    def stop(done, total):
        if done == total:
            raise KeyboardInterrupt

    out = tmp_path / "a.jsonl"
    out.write_text("older answers\n")
    with pytest.raises(KeyboardInterrupt):
        run_inference(ReversingEngine(), marked(), some_tasks(), out, progress=stop)
    assert out.read_text() == "older answers\n"
    run_inference(ReversingEngine(fail_at=0), marked(), some_tasks(), out)
    assert rows(out) == expected(some_tasks())


def test_a_part_of_something_else_is_refused(tmp_path):
    out = tmp_path / "a.jsonl"
    with pytest.raises(EngineError):
        run_inference(ReversingEngine(fail_at=8), marked(), some_tasks(), out, model="m1")
    before = (tmp_path / "a.jsonl.part").read_bytes()
    others = {
        "differ from this run in model": (marked(), some_tasks(), "m2"),
        "differ from this run in prompts": (marked("!"), some_tasks(), "m1"),
        "differ from this run in tasks": (marked(), some_tasks()[:-1], "m1"),
    }
    for what, (prompter, tasks, model) in others.items():
        with pytest.raises(InputError, match=what) as caught:
            run_inference(ReversingEngine(), prompter, tasks, out, model=model)
        assert caught.value.exit_code == 2
    assert (tmp_path / "a.jsonl.part").read_bytes() == before
    assert not out.exists()
    run_inference(ReversingEngine(), marked(), some_tasks(), out, model="m1")


@pytest.mark.parametrize("content", [b"my own notes\n", b"[1]\n", b'{"task_id": 0}\n'])
def test_a_strange_part_is_left_alone(tmp_path, content):
    (tmp_path / "a.jsonl.part").write_bytes(content)
    with pytest.raises(InputError, match="line 1: contains no readable unfinished answers"):
        run_inference(ReversingEngine(), marked(), some_tasks(), tmp_path / "a.jsonl")
    assert (tmp_path / "a.jsonl.part").read_bytes() == content


@pytest.mark.parametrize("limit", [20, 500, 900])
def test_a_full_disk_keeps_what_was_answered(tmp_path, limit):
    """A limit on the size of files fails a write as a full disk does: in its middle."""
    out, log = tmp_path / "a.jsonl", tmp_path / "log"
    code = f"""
import sys; sys.path.insert(0, {str(HERE.parent)!r})
import test_inference as t
from evomerge.errors import OutputError
try: t.child({str(out)!r}, "/dev/null")
except OutputError as error: sys.exit(str(error))
"""
    done = subprocess.run(
        [sys.executable, "-B", "-c", code],
        env=os.environ | {"PYTHONPATH": str(HERE.parents[1])},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
    )
    survived = kept(out)
    assert done.returncode == 1, done.stderr
    assert "answers cannot be written: File too large" in done.stderr
    assert (f"{len(survived)} of {COUNT} answers are kept" in done.stderr) == bool(survived)
    assert bool(survived) == (limit > 20)
    engine = ReversingEngine(log)
    run_inference(engine, marked(), some_tasks(), out)
    assert rows(out) == expected(some_tasks())
    assert len(engine.prompts) == COUNT - len(survived)


def test_no_space_for_the_final_file_keeps_the_part(tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "a.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(OutputError, match=f"{COUNT} of {COUNT} answers are kept"):
            run_inference(ReversingEngine(), marked(), some_tasks(), out)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl.part"]
    run_inference(ReversingEngine(fail_at=0), marked(), some_tasks(), out)
    assert rows(out) == expected(some_tasks())


def test_two_runs_never_write_the_same_answers(tmp_path):
    class Nested(ReversingEngine):
        def answer(self, prompts, settings=None, on_answer=None, deadline=None):
            with pytest.raises(OutputError, match="another run"):
                run_inference(ReversingEngine(), marked(), some_tasks(), tmp_path / "a.jsonl")
            return super().answer(prompts)

    run_inference(Nested(), marked(), some_tasks(), tmp_path / "a.jsonl")
    assert rows(tmp_path / "a.jsonl") == expected(some_tasks())


def test_wrong_places_and_texts_are_refused_before_any_answer(tmp_path):
    (tmp_path / "file").write_text("")
    engine = ReversingEngine(fail_at=0)
    for out in (tmp_path, tmp_path / "file" / "a.jsonl"):
        with pytest.raises(OutputError) as caught:
            run_inference(engine, marked(), some_tasks(), out)
        assert str(tmp_path) in str(caught.value)
    with pytest.raises(TaskError, match=r"task 3: .*surrogate"):
        run_inference(engine, marked(), [Task(3, "半分\ud83d")], tmp_path / "a.jsonl")
