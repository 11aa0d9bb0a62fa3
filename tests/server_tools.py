"""What the tests of the server engine share: the command, its files, and one-line failures."""

import json

import pytest

pytest.importorskip("openai", reason="the extra `server` is not installed")

from evomerge.answering.prompts import make_prompter
from evomerge.answering.servers import engine as module
from evomerge.answering.servers.engine import ServerEngine
from evomerge.cli import main
from evomerge.study import GenerationSection, PromptSection

SECRET = "sk-verysecret0123456789"


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """No proxies and no key from outside, and failures that do not take long."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "RETRIES", 1)


def write_tasks(folder, texts):
    rows = [{"task_id": i, "input": text} for i, text in enumerate(texts)]
    (folder / "tasks.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )


def infer(folder, url, *options):
    return main(
        [
            "infer",
            "--server",
            url,
            "--tasks",
            str(folder / "tasks.jsonl"),
            "--out",
            str(folder / "a.jsonl"),
            *options,
        ]
    )


def outputs(folder):
    return [
        json.loads(line)["output"]
        for line in (folder / "a.jsonl").read_bytes().decode().split("\n")[:-1]
    ]


def kept(folder):
    part = folder / "a.jsonl.part"
    return (
        [i for line in part.read_text().splitlines()[1:] for i in json.loads(line)["batch"]]
        if part.exists()
        else []
    )


def fails(capsys, code, got, *words):
    """The command ended with this code and one line on stderr that holds the words."""
    err = capsys.readouterr().err
    assert got == code, err
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("evomerge: ")
    for word in words:
        assert word in lines[0]
    return lines[0]


def engine(url, plan_format="chat", concurrency=3, model=None, **generation):
    section = PromptSection(
        format=plan_format, template="<{input}>" if plan_format == "template" else None, system=None
    )
    asks = ServerEngine(
        url, model, GenerationSection(**generation), plan_format == "chat", concurrency
    )
    return asks, make_prompter(asks.tokenizer, section), asks.identity


def turns(*pairs):
    return [{"role": role, "content": text} for role, text in pairs]
