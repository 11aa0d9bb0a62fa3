"""A server as the engine: every way in which it can fail, and that no answer is asked for twice."""
# ruff: noqa: F401  # plain is a fixture

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chat_server import Server, raw, status, torn, usual
from server_tools import SECRET, engine, fails, infer, kept, outputs, plain, write_tasks

pytest.importorskip("openai", reason="the extra `server` is not installed")

from evomerge.answering.servers import engine as module
from evomerge.answering.servers.engine import ServerEngine
from evomerge.cli import main
from evomerge.errors import EngineError, InputError, ModelError
from evomerge.study import GenerationSection

# failures that pass


@pytest.mark.parametrize(
    "failure",
    [status(500), status(503, body="<html>"), torn(), raw(b"{garbage"), raw(b""), raw(b"\xff\xfe")],
)
def test_a_failure_that_passes_costs_no_answer(tmp_path, failure):
    texts = [f"課題{i}" for i in range(6)]
    write_tasks(tmp_path, texts)
    server = Server(plan=lambda number, prompt: failure if number in (1, 4) else None)
    with server.running() as url:
        assert infer(tmp_path, url, "--concurrency", "2") == 0
    assert outputs(tmp_path) == [usual(f"user: {text}") for text in texts]
    assert len(server.prompts()) == 8
    assert set(server.answered.values()) == {1}


def test_too_many_requests_waits_as_told(tmp_path):
    write_tasks(tmp_path, ["a"])
    server = Server(
        plan=lambda number, prompt: status(429, Retry_After="1") if number == 0 else None
    )
    with server.running() as url:
        began = time.monotonic()
        assert infer(tmp_path, url) == 0
        assert time.monotonic() - began >= 1
    assert len(server.prompts()) == 2


# failures that do not pass


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (
            status(500, "CUDA out of memory"),
            ["status 500", "CUDA out of memory", "run the same command again"],
        ),
        (
            status(429, "slow down", Retry_After="0.01"),
            ["status 429", "slow down", "--concurrency"],
        ),
        (
            status(422, body={"detail": "Unexpected fields: {'repetition_penalty'}"}),
            ["status 422", "Set repetition_penalty to 1"],
        ),
        (status(500, body=[1, 2]), ["status 500"]),
        (torn(), ["cannot be reached"]),
        (raw(b"{garbage"), ["contains no answer"]),
        (raw(b"<html>\nsign in</html>", "text/html"), ["contains no answer", "sign in"]),
        (raw(b'{"choices": []}'), ["contains no answer"]),
        (raw(b"[1]"), ["contains no answer"]),
        (raw(b"null"), ["contains no answer"]),
        (raw(b'{"choices": [{"message": {"content": 5}}]}'), ["contains no answer"]),
        (raw(b'{"choices": ["no"]}'), ["contains no answer"]),
    ],
)
def test_a_lasting_failure_is_one_line_and_what_was_answered_is_kept(
    tmp_path, capsys, failure, words
):
    texts = [f"課題{i}" for i in range(10)]
    write_tasks(tmp_path, texts)
    broken = Server(plan=lambda number, prompt: failure if number >= 5 else None)
    with broken.running() as url:
        fails(capsys, 1, infer(tmp_path, url, "--concurrency", "3"), *words)
        assert not (tmp_path / "a.jsonl").exists()
        assert len(kept(tmp_path)) == sum(broken.answered.values()) == 5
        broken.plan = lambda number, prompt: None
        assert infer(tmp_path, url, "--concurrency", "1") == 0  # with fewer at once it goes on
    assert outputs(tmp_path) == [usual(f"user: {text}") for text in texts]
    assert sorted(broken.answered.values()) == [1] * 10
    assert not (tmp_path / "a.jsonl.part").exists()


def test_a_server_that_is_down(tmp_path, capsys):
    write_tasks(tmp_path, ["a"])
    with Server().running() as url:
        pass
    fails(capsys, 1, infer(tmp_path, url, "--model", "m"), "cannot be reached", "refused", url)
    assert [p.name for p in tmp_path.iterdir()] == ["tasks.jsonl"]


def test_a_server_that_goes_down_and_comes_back(tmp_path, capsys):
    texts = [f"課題{i}" for i in range(20)]
    write_tasks(tmp_path, texts)

    def stop(number, prompt):
        if number == 7:
            server.http.socket.close()  # nobody listens from now on
        return torn() if number >= 7 else None

    server = Server(plan=stop)
    with server.running() as url:
        fails(
            capsys,
            1,
            infer(tmp_path, url, "--concurrency", "3"),
            "cannot be reached",
            "run the same command again",
        )
    assert len(kept(tmp_path)) == 7
    first = server.answered.copy()
    server.plan = lambda number, prompt: None
    with server.running(server.port) as url:
        assert infer(tmp_path, url, "--concurrency", "3") == 0
    assert outputs(tmp_path) == [usual(f"user: {text}") for text in texts]
    assert set(first.values()) == set(server.answered.values()) == {1}


def test_no_answer_in_time(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "READ", 1.0)
    write_tasks(tmp_path, ["a"])
    server = Server(seconds=4)
    with server.running() as url:
        fails(capsys, 1, infer(tmp_path, url), "no answer within")
    assert len(server.prompts()) == 2  # it was asked again once


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_stopped_by_hand(tmp_path, stop):
    """Ctrl-C does not wait for a server that hangs; afterwards nothing that was answered is asked
    again.
    """
    texts = [f"課題{i}" for i in range(12)]
    write_tasks(tmp_path, texts)
    server = Server()
    server.plan = lambda number, prompt: time.sleep(60) if number >= 5 else None
    with server.running() as url:
        command = [
            sys.executable,
            "-m",
            "evomerge",
            "infer",
            "--server",
            url,
            "--concurrency",
            "3",
        ]
        command += ["--tasks", str(tmp_path / "tasks.jsonl"), "--out", str(tmp_path / "a.jsonl")]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while len(kept(tmp_path)) < 5 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(stop)
        _, err = process.communicate(timeout=30)
        if stop == signal.SIGINT:
            assert process.returncode == 130
            *progress, last = err.strip().splitlines()
            assert last.startswith("evomerge: interrupted")
            assert all(line.startswith("answered ") for line in progress)  # on a slow machine
        before = server.answered.copy()
        assert sum(before.values()) == len(kept(tmp_path)) == 5
        server.plan = lambda number, prompt: None
        assert infer(tmp_path, url) == 0
    assert outputs(tmp_path) == [usual(f"user: {text}") for text in texts]


# models, keys, wrong words


def test_the_only_model_is_taken_and_several_are_named(tmp_path, capsys):
    write_tasks(tmp_path, ["a"])
    with Server(models=("only/one",)).running() as url:
        assert engine(url)[0].model == "only/one"
    with Server(models=("one", "two")).running() as url:
        fails(capsys, 2, infer(tmp_path, url), "2 models", "--model", "one, two")
        assert infer(tmp_path, url, "--model", "two") == 0
    capsys.readouterr()
    with Server(models=()).running() as url:
        fails(capsys, 2, infer(tmp_path, url, "--overwrite"), "no model", "--model")
    with Server(models=[f"m{i}" for i in range(90)]).running() as url:
        fails(capsys, 2, infer(tmp_path, url, "--overwrite"), "m19 and 70 more")


def test_a_server_that_lists_nothing_is_asked_by_name(tmp_path, capsys):
    write_tasks(tmp_path, ["a"])
    server = Server(models=None)
    with server.running() as url:
        assert infer(tmp_path, url, "--model", "m") == 0
        capsys.readouterr()
        fails(capsys, 1, infer(tmp_path, url, "--overwrite"), "status 404")


@pytest.mark.parametrize(
    "refusal",
    [
        status(404, "The model `typo` does not exist."),
        status(400, "unknown model typo"),
        status(404, body={"detail": "Not Found"}),
    ],
)
def test_a_wrong_model_name(tmp_path, capsys, refusal):
    write_tasks(tmp_path, ["a", "b", "c"])
    with Server(models=("big", "small"), known=(("big", "small"), refusal)).running() as url:
        fails(capsys, 2, infer(tmp_path, url, "--model", "typo"), "'typo'", "big, small")
        with pytest.raises(ModelError):
            engine(url, model="typo")[0].answer(['[{"role": "user", "content": "a"}]'])


def test_no_completions_endpoint(tmp_path, capsys):
    write_tasks(tmp_path, ["a"])
    with Server(plan=lambda n, p: status(404, "Not Found")).running() as url:
        fails(
            capsys,
            1,
            infer(tmp_path, url, "--format", "competition"),
            "--format chat",
            "/v1/completions",
        )


@pytest.mark.parametrize("code", [401, 403])
def test_the_key_is_never_written_or_printed(tmp_path, capsys, monkeypatch, code):
    write_tasks(tmp_path, ["a", "b", "c"])
    refusal = status(code, f"Incorrect API key provided: {SECRET}. See our page.")
    server = Server(plan=lambda number, prompt: refusal if number >= 1 else None)
    with server.running() as url:
        fails(capsys, 1, infer(tmp_path, url, "--concurrency", "1"), "Set OPENAI_API_KEY")
        (tmp_path / "a.jsonl.part").unlink()
        monkeypatch.setenv("OPENAI_API_KEY", f" {SECRET}\n")
        server.asked.clear()
        line = fails(
            capsys,
            1,
            infer(tmp_path, url, "--concurrency", "1"),
            "Check the key in OPENAI_API_KEY",
            "***",
        )
        assert SECRET not in line
        assert server.asked[-1][2]["authorization"] == f"Bearer {SECRET}"
        assert SECRET not in engine(url)[2]
        server.plan = lambda number, prompt: raw(f"<html>{SECRET}</html>".encode(), "text/html")
        assert SECRET not in fails(
            capsys, 1, infer(tmp_path, url, "--concurrency", "1"), "contains no answer"
        )
    assert kept(tmp_path) == [0]
    assert all(SECRET not in path.read_text() for path in tmp_path.iterdir())


def test_a_key_that_no_header_can_carry(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-鍵")
    with pytest.raises(InputError, match="OPENAI_API_KEY") as caught:
        engine("http://localhost:1")
    assert "鍵" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "ftp://host",
        "http://",
        "http://h:99999",
        "http://u:pw@h/v1",
        "u:pw@h",
        "http://h/v1?key=pw",
    ],
)
def test_wrong_addresses(tmp_path, capsys, url):
    write_tasks(tmp_path, ["a"])
    assert "pw" not in fails(
        capsys, 2, infer(tmp_path, url), "--server", "http://HOST:PORT/v1"
    ).replace("http://HOST", "")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ([], "--model, --recipe, --study and --server"),
        (["--model", "a", "--study", "b"], "--model, --recipe, --study and --server"),
        (["--server", "http://h", "--study", "b"], "--study"),
        (["--server", "http://h", "--batch-size", "2"], "--batch-size"),
        (["--model", "a", "--concurrency", "2"], "--batch-size"),
        (["--server", "http://h", "--concurrency", "0"], "--concurrency"),
        (["--server", "http://h", "--max-new-tokens", "0"], "--max-new-tokens"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, capsys, options, word):
    write_tasks(tmp_path, ["a"])
    fails(
        capsys,
        2,
        main(
            [
                "infer",
                "--tasks",
                str(tmp_path / "tasks.jsonl"),
                "--out",
                str(tmp_path / "a.jsonl"),
                *options,
            ]
        ),
        word,
    )


def test_without_the_package(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    write_tasks(tmp_path, ["a"])
    fails(capsys, 1, infer(tmp_path, "http://h"), "pip install 'evomerge[server]'")


def test_it_merges_nothing():
    with Server().running() as url, pytest.raises(EngineError, match="cannot be replaced"):
        ServerEngine(url, "m", GenerationSection(), chat=True).apply(None)


def test_no_torch_is_needed(tmp_path):
    write_tasks(tmp_path, ["a"])
    with Server().running() as url:
        code = f"""
import sys
from evomerge.cli import main
files = ["--tasks", {str(tmp_path / "tasks.jsonl")!r}, "--out", {str(tmp_path / "a.jsonl")!r}]
main(["infer", "--server", {url!r}, *files])
sys.exit("torch" in sys.modules)
"""
        assert (
            subprocess.run(
                [sys.executable, "-c", code],
                env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
            ).returncode
            == 0
        )
    assert outputs(tmp_path) == [usual("user: a")]
