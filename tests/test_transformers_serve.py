"""Beside a server that we did not write: `transformers serve` gives the answers of our own engine
on the same folder.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from evomerge.cli import main

MISSING = [
    name for name in ("openai", "fastapi", "uvicorn") if importlib.util.find_spec(name) is None
]
pytestmark = pytest.mark.skipif(
    bool(MISSING),
    reason=f"transformers serve needs {', '.join(MISSING)}: pip install 'transformers[serving]'",
)


@pytest.fixture(scope="module")
def url(pair, tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [
        sys.executable,
        "-m",
        "transformers.cli.transformers",
        "serve",
        str(pair / "base"),
        "--host",
        "127.0.0.1",
    ]
    with log.open("w") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [*command, "--port", str(port), "--device", "cpu"],
            stdout=file,
            stderr=file,
            env=environment,
        )
    try:
        deadline = time.monotonic() + 90
        while not healthy(port):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.skip(f"transformers serve does not start here: {log.read_text()[-300:]}")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def healthy(port):
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except OSError:
        return False


@pytest.mark.parametrize("form", ["chat", "competition"])
def test_same_answers_as_the_model_in_its_folder(pair, url, form, tmp_path):
    lines = (pair / "tasks.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    (tmp_path / "tasks.jsonl").write_text("\n".join(lines), encoding="utf-8")
    run = [
        "infer",
        "--tasks",
        str(tmp_path / "tasks.jsonl"),
        "--format",
        form,
        "--max-new-tokens",
        "12",
    ]
    assert (
        main(
            [
                *run,
                "--server",
                url,
                "--model",
                str(pair / "base"),
                "--out",
                str(tmp_path / "server.jsonl"),
                "--concurrency",
                "4",
            ]
        )
        == 0
    )
    assert (
        main(
            [
                *run,
                "--model",
                str(pair / "base"),
                "--out",
                str(tmp_path / "own.jsonl"),
                "--batch-size",
                "1",
            ]
        )
        == 0
    )
    server, own = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("server", "own")
    )
    assert len({row["output"] for row in own}) > 1
    assert server == own


def test_as_a_judge_it_gives_grades_or_none(pair, url, tmp_path):
    """What a random model says is hardly ever a grade, and none is invented."""
    from evomerge.answering.engine import Answer
    from evomerge.errors import JudgePaused
    from evomerge.judging.llm.judge import LlmJudge
    from evomerge.study import JudgeSection
    from evomerge.tasks import Task

    section = JudgeSection(
        kind="llm",
        base_url=url,
        model=str(pair / "base"),
        reply_tokens=8,
        asks=2,
        concurrency=2,
        timeout=60,
    )
    judge = LlmJudge(section, tmp_path / "grades.sqlite")
    tasks, answers = (
        [Task(i, "あ" * (i + 1), "い") for i in range(3)],
        [Answer("うえ", False, 1)] * 3,
    )
    said = ""
    try:
        assert all(grade.value in (1, 2, 3, 4, 5) for grade in judge.grade_all(tasks, answers))
    except JudgePaused as error:
        said = str(error)
    judge.close()
    assert not said or ("run the same command" in said and "no grade" in said)
    assert judge.spent.requests >= 3
    assert judge.spent.prompt_tokens > 0
    assert judge.spent.reply_tokens > 0
