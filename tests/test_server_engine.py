"""A server as the engine: what is asked, every way in which it can fail, and that no answer is asked for twice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import openpyxl
import pytest
from chat_server import Server, raw, status, torn, usual

pytest.importorskip("openai", reason="the extra `server` is not installed")

from evomerge.answering import server as module
from evomerge.answering.engine import Answer
from evomerge.answering.prompts import COMPETITION, make_prompter
from evomerge.answering.server import ServerEngine
from evomerge.answering.wire import server_url, whole
from evomerge.cli import main
from evomerge.errors import EngineError, InputError, ModelError
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
    (folder / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def infer(folder, url, *options):
    return main(["infer", "--server", url, "--tasks", str(folder / "tasks.jsonl"), "--out", str(folder / "a.jsonl"), *options])


def outputs(folder):
    return [json.loads(line)["output"] for line in (folder / "a.jsonl").read_bytes().decode().split("\n")[:-1]]


def kept(folder):
    part = folder / "a.jsonl.part"
    return [i for line in part.read_text().splitlines()[1:] for i in json.loads(line)["batch"]] if part.exists() else []


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
    section = PromptSection(format=plan_format, template="<{input}>" if plan_format == "template" else None, system=None)
    asks = ServerEngine(url, model, GenerationSection(**generation), plan_format == "chat", concurrency)
    return asks, make_prompter(asks.tokenizer, section), asks.identity


def turns(*pairs):
    return [{"role": role, "content": text} for role, text in pairs]


# what is asked


def test_chat_sends_turns_and_a_knowledge_base_goes_through(tmp_path, monkeypatch):
    book = openpyxl.Workbook()
    book.active.title = "classes"
    for row in [("class", "system", "template"), ("計算", "先生", "[{examples}]{input}"), ("創作", "", "{input}")]:
        book.active.append(row)
    sheet = book.create_sheet("examples")
    for row in [("class", "input", "output"), ("計算", "3+5はいくつ", "8"), ("創作", "春の詩を書いて", "花")]:
        sheet.append(row)
    book.save(tmp_path / "base.xlsx")
    write_tasks(tmp_path, ["{examples}と3+6はいくつ", "秋の詩を書いて🍎\u2028\n"])
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    server = Server()
    with server.running() as url:
        assert infer(tmp_path, url, "--knowledge", str(tmp_path / "base.xlsx"), "--max-new-tokens", "9") == 0
    asked = sorted((body for path, body, _ in server.asked if path == "/v1/chat/completions"), key=lambda body: -len(body["messages"]))
    assert [body["messages"] for body in asked] == [
        turns(("user", "春の詩を書いて"), ("assistant", "花"), ("user", "秋の詩を書いて🍎\u2028\n")),
        turns(("system", "先生"), ("user", "[指示: 3+5はいくつ\n回答: 8]{examples}と3+6はいくつ")),
    ]
    assert all((body["model"], body["max_tokens"], body["temperature"]) == ("m", 9, 0) for body in asked)
    assert all(headers["authorization"] == f"Bearer {SECRET}" for _, _, headers in server.asked)
    assert outputs(tmp_path)[1] == usual("user: 春の詩を書いて\nassistant: 花\nuser: 秋の詩を書いて🍎\u2028\n")
    assert (tmp_path / "a.classes.jsonl").exists()


def test_each_prompt_goes_with_its_own_settings():
    server = Server()
    sections = [
        GenerationSection(max_new_tokens=3, do_sample=True, temperature=0.5, top_p=0.9, seed=7),
        GenerationSection(max_new_tokens=9, repetition_penalty=1.2, stop=("終",)),
        GenerationSection(max_new_tokens=4, do_sample=True),
    ]
    with server.running() as url:
        asks, prompter, _ = engine(url, max_new_tokens=77)
        texts = [prompter.render(text) for text in "abc"]
        asks.answer(texts, sections)
        sent = {body["messages"][0]["content"]: body for _, body, _ in server.asked[1:]}
        asks.answer(texts[:1])
    assert [{k: v for k, v in sent[text].items() if k not in ("messages", "model")} for text in "abc"] == [
        {"max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "seed": 7},
        {"max_tokens": 9, "temperature": 0.0, "repetition_penalty": 1.2, "stop": ["終"]},
        {"max_tokens": 4, "temperature": 1.0, "top_p": 1.0, "seed": 0},
    ]
    assert (server.asked[-1][1]["max_tokens"], server.asked[-1][1]["temperature"]) == (77, 0)


@pytest.mark.parametrize(("plan_format", "template"), [("competition", COMPETITION), ("template", "<{input}>")])
def test_whole_texts_go_to_the_completions_endpoint(plan_format, template):
    server = Server()
    with server.running() as url:
        asks, prompter, _ = engine(url, plan_format)
        text = template.replace("{input}", "詩を{input}")
        assert [a.text for a in asks.answer([prompter.render("詩を{input}")])] == [usual(text)]
    assert [(path, body["prompt"]) for path, body, _ in server.asked[1:]] == [("/v1/completions", text)]


def test_generation_settings():
    server = Server()
    with server.running() as url:
        asks, prompter, _ = engine(url, do_sample=True, temperature=0.5, top_p=0.9, repetition_penalty=1.1, stop=("終",))
        (answer,) = asks.answer([prompter.render("a")])
    body = server.asked[-1][1]
    assert {k: body[k] for k in ("temperature", "top_p", "repetition_penalty", "stop", "max_tokens")} == {
        "temperature": 0.5,
        "top_p": 0.9,
        "repetition_penalty": 1.1,
        "stop": ["終"],
        "max_tokens": 256,
    }
    assert (answer.tokens, answer.truncated) == (5, False)


def test_as_many_as_asked_for_are_under_way(tmp_path):
    texts = [f"課題{i}" for i in range(12)]
    write_tasks(tmp_path, texts)
    server = Server(seconds=0.1)
    with server.running() as url:
        assert infer(tmp_path, url, "--concurrency", "4") == 0
    assert server.most == 4
    assert outputs(tmp_path) == [usual(f"user: {text}") for text in texts]


def test_batches_hold_what_is_asked_at_once():
    with Server().running() as url:
        assert engine(url)[0].batches("abcdefg") == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1"),
        ("http://localhost:8000/", "http://localhost:8000/v1"),
        ("https://例え.jp/v1/", "https://例え.jp/v1"),
        ("https://host/openai/v1", "https://host/openai/v1"),
    ],
)
def test_addresses(given, taken):
    assert server_url(given) == taken


# what comes back


def test_empty_cut_and_strange_answers():
    texts = ["", None, "cut", "半分\ud83d", "\ud83c\udf4e", "\u2028{input}\x00"]
    server = Server(plan=lambda n, p: {"text": texts[int(p[-1])], "finish_reason": "length" if p[-1] == "2" else "stop"})
    with server.running() as url:
        asks, prompter, _ = engine(url)
        answers = asks.answer([prompter.render(f"{i}") for i in range(6)])
    assert [a.text for a in answers] == ["", "", "cut", "半分\ufffd", "🍎", "\u2028{input}\x00"]
    assert [a.truncated for a in answers] == [False, False, True, False, False, False]


def test_half_a_surrogate_pair_never_reaches_a_file(tmp_path):
    write_tasks(tmp_path, ["a"])
    with Server(plan=lambda n, p: {"text": "\udf4e絵\ud83c"}).running() as url:
        assert infer(tmp_path, url) == 0
    assert outputs(tmp_path) == ["\ufffd絵\ufffd"]


@pytest.mark.parametrize("text", ["", "詩🍎", "a\ud83d", "\udf4e\ud83cb"])
def test_whole_is_utf8_and_leaves_good_texts_alone(text):
    good = whole(text).encode().decode()
    assert len(good) == len(text)
    assert all(g == t or (g == "\ufffd" and "\ud800" <= t <= "\udfff") for g, t in zip(good, text, strict=True))


def test_a_prompt_with_half_a_pair_is_sent_whole():
    with Server().running() as url:
        asks, _, _ = engine(url, "competition")
        assert [a.text for a in asks.answer(["a\ud83d"])] == ["\ufffda"]


def test_an_answer_is_given_when_it_comes():
    """Prompt a takes longer than all others together; what `got` raises ends the asking."""
    server = Server(plan=lambda number, prompt: time.sleep(0.5) if prompt.endswith("a") else None)
    with server.running() as url:
        asks, prompter, _ = engine(url, concurrency=2)
        texts, seen = [prompter.render(text) for text in "abcd"], []
        answers = asks.answer(texts, got=lambda *of: seen.append(of))
        assert [place for place, _ in seen] == [1, 2, 3, 0]
        assert sorted(seen) == list(enumerate(answers))

        def full(place, answer):
            raise OSError("no space")

        with pytest.raises(OSError, match="no space"):
            asks.answer([prompter.render(f"{i}") for i in range(90)], got=full)
        assert len(server.prompts()) < 20
        assert asks.answer(texts) == answers


@pytest.mark.parametrize("slow", ["sleeps", "fails"])
def test_the_deadline_waits_for_no_server(monkeypatch, slow):
    """Prompts of more than two figures have no answer: the server sleeps, or says again and again that it is overloaded."""
    monkeypatch.setattr(module, "RETRIES", 5)
    refusal = status(503, "overloaded", Retry_After="20")

    def plan(number, prompt):
        if len(prompt) > len("user: 99"):
            return time.sleep(30) if slow == "sleeps" else refusal
        return None

    server = Server(plan=plan)
    with server.running() as url:
        asks, prompter, _ = engine(url, concurrency=4)
        texts, seen = [prompter.render(f"{i}") for i in (1, 2, 300, 4, 500, 600, 700, 800)], []
        began = time.monotonic()
        answers = asks.answer(texts, got=lambda *of: seen.append(of), deadline=began + 1.5)
        assert 1.4 < time.monotonic() - began < 2.5
        assert sorted(seen) == [(i, answers[i]) for i in (0, 1, 3)]
        assert [answers[i] for i in (2, 4, 5, 6, 7)] == [Answer("", True, 0)] * 5
        assert len(server.prompts()) == 3 + 4  # the last one was never asked
        assert [a.text for a in asks.answer(texts[:2])] == [usual("user: 1"), usual("user: 2")]
        assert asks.answer(texts[:2], deadline=time.monotonic() - 1) == [Answer("", True, 0)] * 2


def test_what_the_server_cuts_is_truncated_before_any_deadline():
    server = Server(plan=lambda number, prompt: {"text": "途中", "finish_reason": "length"})
    with server.running() as url:
        asks, prompter, _ = engine(url)
        assert asks.answer([prompter.render("a")], deadline=time.monotonic() + 60) == [Answer("途中", True, 5)]


# prompts that are too long: what servers say, by their sources or as their users quote it

LONG = {
    "openai": (400, {"message": "This model's maximum context length is 8 tokens. However, …", "code": "context_length_exceeded"}),
    "openai, code alone": (400, {"message": "Bad.", "type": "invalid_request_error", "code": "context_length_exceeded"}),
    "openai, responses": (400, {"message": "Your input exceeds the context window of this model."}),
    "vllm": (
        400,
        {"message": "This model's maximum context length is 8 tokens. However, your prompt contains 9 input tokens, …", "code": 400},
    ),
    "vllm, prompt": (400, {"message": "Input length (9) exceeds model's maximum context length (8).", "type": "BadRequestError"}),
    "vllm, full": (400, {"message": "max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)", "code": 400}),
    "llama.cpp": (400, {"code": 400, "message": "request (9 tokens) exceeds …", "type": "exceed_context_size_error", "n_ctx": 8}),
    "llama.cpp, older": (500, {"code": 500, "message": "Context size has been exceeded.", "type": "server_error"}),
    "llama-cpp-python": (400, {"message": "Requested tokens (9) exceed context window of 8", "type": "invalid_request_error"}),
    "sglang": (400, {"message": "The input (9 tokens) is longer than the model's context length (8 tokens)."}),
    "sglang, memory": (400, {"message": "Input length (9 tokens) exceeds the maximum allowed length (8 tokens)."}),
    "tgi": (422, {"message": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 8. Given: 7 and 3"}),
    "lm studio": (400, "tokens to keep from the initial prompt is greater than the context length"),
    "gateways": (413, {"message": "prompt is too long: 9 tokens > 8 maximum"}),
}


def refused(server):
    code, error = LONG[server]
    return status(code, body={"error": error})


@pytest.mark.parametrize("server", LONG)
def test_a_shorter_prompt_is_asked_until_it_fits(server):
    """The server takes at most three examples; prompt 1 has none to drop and fits."""
    serving = Server(plan=lambda number, prompt: refused(server) if prompt.count("例") > 3 else None)
    with serving.running() as url:
        asks, _, _ = engine(url, "competition", concurrency=2)
        prompts = ["例" * 6 + "問0", "問1", "例" * 4 + "問2"]
        now, active, most = list(prompts), 0, 0

        def shorter(index):
            nonlocal active, most
            active += 1
            most = max(most, active)
            time.sleep(0.01)
            now[index] = now[index][1:]
            active -= 1
            return now[index]

        found = dict(asks.answer_each(prompts, shorter=shorter))
    assert [found[i].text for i in range(3)] == [usual("例例例問0"), usual("問1"), usual("例例例問2")]
    assert now == ["例例例問0", "問1", "例例例問2"]
    assert most == 1, "called by several threads at once"


@pytest.mark.parametrize(("room", "examples", "tokens"), [("context", 2, 9), ("context, none suffices", 0, 6), ("limit", 5, 4)])
def test_an_answer_that_the_context_cuts_is_asked_again_with_less(room, examples, tokens):
    """The server answers with as many tokens as there is room for beside the examples, or never with more than four."""

    def plan(number, prompt):
        wanted = {"context": 11, "context, none suffices": 6, "limit": 4}[room] - (0 if room == "limit" else prompt.count("例"))
        given = min(wanted, 9)
        return {"text": prompt, "finish_reason": "length", "usage": {"completion_tokens": given}}

    serving, now = Server(plan=plan), ["例" * 5 + "問"]
    with serving.running() as url:
        asks, _, _ = engine(url, "competition", max_new_tokens=9)

        def shorter(index):
            if "例" not in now[0]:
                return None
            now[0] = now[0][1:]
            return now[0]

        assert list(asks.answer_each(now, shorter=shorter)) == [(0, Answer("例" * examples + "問", True, tokens))]
    assert len(serving.prompts()) == {"context": 4, "context, none suffices": 6, "limit": 2}[room]


def test_where_nothing_can_be_dropped_it_is_the_servers_error():
    calls = []
    with Server(plan=lambda number, prompt: refused("vllm")).running() as url:
        asks, _, _ = engine(url, "competition")
        with pytest.raises(EngineError, match=r"status 400: This model's maximum context length is 8.*Shorten the task"):
            list(asks.answer_each(["例問"], shorter=lambda index: calls.append(index) or (None if len(calls) > 1 else "問")))
        assert calls == [0, 0]
        with pytest.raises(EngineError, match="maximum context length"):
            asks.answer(["問"])


@pytest.mark.parametrize(
    "refusal",
    [
        status(400, "unknown field temperature"),
        status(401, "context length: set a key"),
        status(429, "too many tokens per minute", Retry_After="0.01"),
        status(404, "no such page"),
        status(400, "max_tokens is too large: 99. This model supports at most 9 completion tokens"),
    ],
)
def test_other_refusals_shorten_nothing(refusal):
    with Server(plan=lambda number, prompt: refusal).running() as url, pytest.raises(EngineError):
        list(engine(url, "competition")[0].answer_each(["例問"], shorter=lambda index: pytest.fail("asked for a shorter prompt")))


# failures that pass


@pytest.mark.parametrize("failure", [status(500), status(503, body="<html>"), torn(), raw(b"{garbage"), raw(b""), raw(b"\xff\xfe")])
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
    server = Server(plan=lambda number, prompt: status(429, Retry_After="1") if number == 0 else None)
    with server.running() as url:
        began = time.monotonic()
        assert infer(tmp_path, url) == 0
        assert time.monotonic() - began >= 1
    assert len(server.prompts()) == 2


# failures that do not pass


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (status(500, "CUDA out of memory"), ["status 500", "CUDA out of memory", "the same command goes on"]),
        (status(429, "slow down", Retry_After="0.01"), ["status 429", "slow down", "--concurrency"]),
        (status(400, "maximum context length is 8 tokens"), ["status 400", "maximum context length"]),
        (status(422, body={"detail": "Unexpected fields: {'repetition_penalty'}"}), ["status 422", "Set repetition_penalty to 1"]),
        (status(422, body={"detail": [{"msg": "bad\nfield"}]}), ["status 422", "bad"]),
        (status(500, body=[1, 2]), ["status 500"]),
        (torn(), ["cannot be reached"]),
        (raw(b"{garbage"), ["holds no answer"]),
        (raw(b"<html>\nsign in</html>", "text/html"), ["holds no answer", "sign in"]),
        (raw(b'{"choices": []}'), ["holds no answer"]),
        (raw(b"[1]"), ["holds no answer"]),
        (raw(b"null"), ["holds no answer"]),
        (raw(b'{"choices": [{"message": {"content": 5}}]}'), ["holds no answer"]),
        (raw(b'{"choices": ["no"]}'), ["holds no answer"]),
    ],
)
def test_a_lasting_failure_is_one_line_and_what_was_answered_is_kept(tmp_path, capsys, failure, words):
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
        fails(capsys, 1, infer(tmp_path, url, "--concurrency", "3"), "cannot be reached", "the same command goes on")
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
    """Ctrl-C does not wait for a server that hangs; afterwards nothing that was answered is asked again."""
    texts = [f"課題{i}" for i in range(12)]
    write_tasks(tmp_path, texts)
    server = Server()
    server.plan = lambda number, prompt: time.sleep(60) if number >= 5 else None
    with server.running() as url:
        command = [sys.executable, "-m", "evomerge.cli", "infer", "--server", url, "--concurrency", "3"]
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
        fails(capsys, 2, infer(tmp_path, url), "no model", "--model")
    with Server(models=[f"m{i}" for i in range(90)]).running() as url:
        fails(capsys, 2, infer(tmp_path, url), "m19 and 70 more")


def test_a_server_that_lists_nothing_is_asked_by_name(tmp_path, capsys):
    write_tasks(tmp_path, ["a"])
    server = Server(models=None)
    with server.running() as url:
        assert infer(tmp_path, url, "--model", "m") == 0
        capsys.readouterr()
        fails(capsys, 1, infer(tmp_path, url), "status 404")


@pytest.mark.parametrize(
    "refusal",
    [status(404, "The model `typo` does not exist."), status(400, "unknown model typo"), status(404, body={"detail": "Not Found"})],
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
        fails(capsys, 1, infer(tmp_path, url, "--format", "competition"), "--format chat", "/v1/completions")


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
        line = fails(capsys, 1, infer(tmp_path, url, "--concurrency", "1"), "Check the key in OPENAI_API_KEY", "***")
        assert SECRET not in line
        assert server.asked[-1][2]["authorization"] == f"Bearer {SECRET}"
        assert SECRET not in engine(url)[2]
        server.plan = lambda number, prompt: raw(f"<html>{SECRET}</html>".encode(), "text/html")
        assert SECRET not in fails(capsys, 1, infer(tmp_path, url, "--concurrency", "1"), "holds no answer")
    assert kept(tmp_path) == [0]
    assert all(SECRET not in path.read_text() for path in tmp_path.iterdir())


def test_a_key_that_no_header_can_carry(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-鍵")
    with pytest.raises(InputError, match="OPENAI_API_KEY") as caught:
        engine("http://localhost:1")
    assert "鍵" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://host", "http://", "http://h:99999", "http://u:pw@h/v1", "u:pw@h", "http://h/v1?key=pw"]
)
def test_wrong_addresses(tmp_path, capsys, url):
    write_tasks(tmp_path, ["a"])
    assert "pw" not in fails(capsys, 2, infer(tmp_path, url), "--server", "http://HOST:PORT/v1").replace("http://HOST", "")


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
    fails(capsys, 2, main(["infer", "--tasks", str(tmp_path / "tasks.jsonl"), "--out", str(tmp_path / "a.jsonl"), *options]), word)


def test_without_the_package(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    write_tasks(tmp_path, ["a"])
    fails(capsys, 1, infer(tmp_path, "http://h"), "pip install 'evomerge[server]'")


def test_it_merges_nothing():
    with Server().running() as url, pytest.raises(EngineError, match="its own"):
        ServerEngine(url, "m", GenerationSection(), chat=True).apply(None)


def test_no_torch_is_needed(tmp_path):
    write_tasks(tmp_path, ["a"])
    with Server().running() as url:
        code = f"""
import sys
from evomerge.cli import main
main(["infer", "--server", {url!r}, "--tasks", {str(tmp_path / "tasks.jsonl")!r}, "--out", {str(tmp_path / "a.jsonl")!r}])
sys.exit("torch" in sys.modules)
"""
        assert subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}).returncode == 0
    assert outputs(tmp_path) == [usual("user: a")]
