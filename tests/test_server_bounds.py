"""Bounds of a reply, for answers and for grades: its time, its size, its depth."""
# ruff: noqa: F401  # plain is a fixture

import json
import ssl
import time
import tracemalloc

import pytest
from chat_server import Server, drip, endless, packed, raw, status, usual
from server_tools import engine, fails, infer, plain, write_tasks

pytest.importorskip("openai", reason="the extra `server` is not installed")

from evomerge.answering.engine import Answer
from evomerge.answering.servers import bounded
from evomerge.answering.servers import engine as module
from evomerge.answering.servers.client import OpenAIClient, RetryPolicy, ServerFailure
from evomerge.errors import EvomergeError, JudgePaused
from evomerge.judging.llm.judge import LlmJudge
from evomerge.study import JudgeSection
from evomerge.tasks import Task

CHAT = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
DEEP = b"[" * 100_000 + b"]" * 100_000
NESTED = {
    "alone": DEEP,
    "as an object": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "as choices": b'{"choices": ' + DEEP + b"}",
    "as content": b'{"choices": [{"message": {"content": ' + DEEP + b"}}]}",
    "below the interpreter's limit": b'{"choices": ' + b"[" * 900 + b"]" * 900 + b"}",
    "a number of 5,000 digits": b'{"choices": ' + b"9" * 5000 + b"}",
}


def ask(client):
    return client.request(
        lambda sdk: sdk.chat.completions.create(**CHAT), RetryPolicy(0), lambda *_: True
    )


def judging(url, **settings):
    fast = {"model": "m", "retries": 0, "timeout": 0.5, "concurrency": 1}
    return LlmJudge(JudgeSection(kind="llm", base_url=url, **(fast | settings)))


def grade(judge):
    try:
        return judge.grade(Task(7, "問", "答"), Answer("a", False, 1))
    finally:
        judge.close()


@pytest.mark.parametrize("part", ["head", "body"])
def test_a_timeout_is_for_the_whole_reply(part):
    """A byte every twentieth of a second is never late by itself."""
    with Server(plan=lambda number, prompt: drip(part)).running() as url:
        client = OpenAIClient(f"{url}/v1", 0.5)
        began = time.monotonic()
        with pytest.raises(ServerFailure) as caught:
            ask(client)
        assert 0.4 < time.monotonic() - began < 2
        assert (caught.value.kind, caught.value.passes) == ("timeout", True)


@pytest.mark.parametrize("part", ["head", "body"])
def test_the_judges_timeout_is_for_the_whole_reply(part):
    with Server(plan=lambda number, prompt: drip(part)).running() as url:
        began = time.monotonic()
        with pytest.raises(JudgePaused, match=r"no whole reply within 0\.5 s"):
            grade(judging(url))
        assert time.monotonic() - began < 3


def test_the_servers_timeout_is_for_the_whole_reply(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "READ", 0.5)
    write_tasks(tmp_path, ["a"])
    with Server(plan=lambda number, prompt: drip("body")).running() as url:
        began = time.monotonic()
        fails(capsys, 1, infer(tmp_path, url), "no answer within")
        assert time.monotonic() - began < 6  # it was asked twice


def test_a_list_of_models_that_never_ends_is_late_too():
    with Server(models=drip("body")).running() as url:
        client = OpenAIClient(f"{url}/v1", 0.5)
        began = time.monotonic()
        with pytest.raises(ServerFailure):
            client.models()
        assert time.monotonic() - began < 4


def test_redirects_share_one_clock():
    """Ten redirects of 0.2 s each are not ten timeouts."""

    def turn(h):
        time.sleep(0.2)
        h.reply(307, b"", {"Location": h.path})

    with Server(plan=lambda number, prompt: turn).running() as url:
        client = OpenAIClient(f"{url}/v1", 0.5)
        began = time.monotonic()
        with pytest.raises(ServerFailure) as caught:
            ask(client)
        assert time.monotonic() - began < 1.5
        assert caught.value.kind == "timeout"


def test_a_slow_reply_leaves_the_next_its_own_time():
    """The bounds are of a request: what one has used, the next on the same connection has."""
    server = Server(seconds=0.3)
    with server.running() as url:
        client = OpenAIClient(f"{url}/v1", 0.5)
        for _ in range(4):
            assert ask(client).choices[0].message.content == usual("user: a")


@pytest.mark.parametrize("code", [200, 400, 500])
def test_an_endless_reply_stays_small(monkeypatch, code):
    monkeypatch.setattr(bounded, "LARGEST", 4 * 2**20)
    action = endless(code)
    with Server(plan=lambda number, prompt: action).running() as url:
        client = OpenAIClient(f"{url}/v1", 30)
        tracemalloc.start()
        try:
            with pytest.raises(ServerFailure) as caught:
                ask(client)
            assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
        finally:
            tracemalloc.stop()
        assert "larger than" in caught.value.said
    assert action.sent < 32 * 2**20  # what the system's buffers hold comes on top


@pytest.mark.parametrize("who", ["answers", "grades"])
def test_an_endless_reply_is_one_line(tmp_path, capsys, monkeypatch, who):
    monkeypatch.setattr(bounded, "LARGEST", 2**20)
    write_tasks(tmp_path, ["a"])
    with Server(plan=lambda number, prompt: endless()).running() as url:
        if who == "answers":
            fails(capsys, 1, infer(tmp_path, url), "contains no answer", "larger than")
        else:
            with pytest.raises(JudgePaused, match="cannot be read: the reply is larger than"):
                grade(judging(url, timeout=30))


def test_a_packed_reply_is_not_unpacked():
    """2 GB of blanks are 2 MB as gzip."""
    data = json.dumps({"choices": [{"message": {"content": " " * 10**7}}]}).encode()
    server = Server(plan=lambda number, prompt: packed(data))
    with server.running() as url:
        client = OpenAIClient(f"{url}/v1", 5)
        with pytest.raises(ServerFailure) as caught:
            ask(client)
    assert "packed (gzip)" in caught.value.said
    assert server.asked[0][2]["accept-encoding"] == "identity"


@pytest.mark.parametrize("name", NESTED)
@pytest.mark.parametrize("who", ["answers", "grades", "models"])
def test_deep_json_is_one_line(tmp_path, capsys, who, name):
    write_tasks(tmp_path, ["a"])
    reply = raw(NESTED[name])
    if who == "models":
        with Server(models=reply).running() as url:
            fails(capsys, 2, infer(tmp_path, url), "the server lists no models")
        return
    with Server(plan=lambda number, prompt: reply).running() as url:
        if who == "answers":
            fails(capsys, 1, infer(tmp_path, url), "contains no answer")
        else:
            with pytest.raises(JudgePaused, match="cannot be read") as caught:
                grade(judging(url))
            assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("body", [DEEP, b'{"error": {"message": ' + DEEP + b"}}", b"x" * 10**6])
def test_a_strange_reason_is_one_line(tmp_path, capsys, body):
    write_tasks(tmp_path, ["a"])

    def refuse(h):
        h.reply(422, body, {"Content-Type": "application/json"})

    with Server(plan=lambda number, prompt: refuse).running() as url:
        assert len(fails(capsys, 1, infer(tmp_path, url), "status 422")) < 1000


def test_three_hundred_thousand_models_are_one_line_soon(tmp_path, capsys):
    write_tasks(tmp_path, ["a"])
    with Server(models=[f"model-{i}" for i in range(300_000)]).running() as url:
        began = time.monotonic()
        fails(capsys, 2, infer(tmp_path, url), "300000 models", "and 299980 more")
        with pytest.raises(EvomergeError, match="300000 models") as caught:
            judging(url, model=None, timeout=20)
        assert len(str(caught.value)) < 2000
        assert time.monotonic() - began < 15


def test_long_names_of_models_are_cut(tmp_path, capsys):
    write_tasks(tmp_path, ["a"])
    with Server(models=["n" * 10**6, "m" * 10**6]).running() as url:
        assert len(fails(capsys, 2, infer(tmp_path, url), "2 models")) < 2000


@pytest.mark.parametrize(
    "models",
    [raw(b"[]"), raw(b"null"), raw(b'{"data": 5}'), raw(b'{"data": [5, {"id": 7}, {}]}')],
)
def test_a_list_of_another_shape_is_no_list(models):
    with Server(models=models).running() as url:
        assert OpenAIClient(f"{url}/v1", 5).models() == []


def test_counts_beyond_all_measure_are_not_believed():
    usage = {"prompt_tokens": 10**4000, "completion_tokens": 10**400}
    plan = {"text": '{"grade": 4, "reason": "x"}', "usage": usage}
    with Server(plan=lambda number, prompt: plan).running() as url:
        judge = judging(url, timeout=10, max_cost=1.0, input_price=1.0, output_price=1.0)
        assert grade(judge).value == 4.0
        assert judge.spent.prompt_tokens < 10**6


def test_proxies_are_bounded_too(monkeypatch):
    """A proxy from the environment: it drips as a server does."""
    with Server(plan=lambda number, prompt: None).running() as url:
        monkeypatch.setenv("http_proxy", url)
        monkeypatch.setenv("HTTP_PROXY", url)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        client = OpenAIClient("http://example.invalid/v1", 0.5)
        pools = [t._pool for t in client.sdk._client._mounts.values() if t is not None]
        assert pools
        assert all(isinstance(p._network_backend, bounded.BoundedBackend) for p in pools)


def test_clients_share_one_context_that_checks_certificates():
    openai, contexts = pytest.importorskip("openai"), []
    for _ in range(2):
        client = bounded.bounded_http(openai.DefaultHttpxClient)
        contexts.append(client._transport._pool._ssl_context)
        client.close()
    assert contexts[0] is contexts[1]
    assert contexts[0].verify_mode == ssl.CERT_REQUIRED
    assert contexts[0].check_hostname
