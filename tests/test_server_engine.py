"""A server as the engine: what is asked, what comes back, and deadlines."""
# ruff: noqa: F401  # plain is a fixture

import time

import openpyxl
import pytest
from chat_server import Server, status, usual
from server_tools import SECRET, engine, fails, infer, outputs, plain, turns, write_tasks

pytest.importorskip("openai", reason="the extra `server` is not installed")

from evomerge.answering.engine import Answer
from evomerge.answering.prompts import COMPETITION
from evomerge.answering.servers import engine as module
from evomerge.answering.servers.openai_protocol import server_url, whole
from evomerge.errors import EngineError
from evomerge.study import GenerationSection

# what is asked


def test_chat_sends_turns_and_a_knowledge_base_goes_through(tmp_path, monkeypatch):
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
    write_tasks(tmp_path, ["{examples}と3+6はいくつ", "秋の詩を書いて🍎\u2028\n"])
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    server = Server()
    with server.running() as url:
        assert (
            infer(
                tmp_path, url, "--knowledge", str(tmp_path / "base.xlsx"), "--max-new-tokens", "9"
            )
            == 0
        )
    asked = sorted(
        (body for path, body, _ in server.asked if path == "/v1/chat/completions"),
        key=lambda body: -len(body["messages"]),
    )
    assert [body["messages"] for body in asked] == [
        turns(
            ("user", "春の詩を書いて"), ("assistant", "花"), ("user", "秋の詩を書いて🍎\u2028\n")
        ),
        turns(("system", "先生"), ("user", "[指示: 3+5はいくつ\n回答: 8]{examples}と3+6はいくつ")),
    ]
    assert all(
        (body["model"], body["max_tokens"], body["temperature"]) == ("m", 9, 0) for body in asked
    )
    assert all(headers["authorization"] == f"Bearer {SECRET}" for _, _, headers in server.asked)
    assert outputs(tmp_path)[1] == usual(
        "user: 春の詩を書いて\nassistant: 花\nuser: 秋の詩を書いて🍎\u2028\n"
    )
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
    assert [
        {k: v for k, v in sent[text].items() if k not in ("messages", "model")} for text in "abc"
    ] == [
        {"max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "seed": 7},
        {"max_tokens": 9, "temperature": 0.0, "repetition_penalty": 1.2, "stop": ["終"]},
        {"max_tokens": 4, "temperature": 1.0, "top_p": 1.0, "seed": 0},
    ]
    assert (server.asked[-1][1]["max_tokens"], server.asked[-1][1]["temperature"]) == (77, 0)


@pytest.mark.parametrize(
    ("plan_format", "template"), [("competition", COMPETITION), ("template", "<{input}>")]
)
def test_whole_texts_go_to_the_completions_endpoint(plan_format, template):
    server = Server()
    with server.running() as url:
        asks, prompter, _ = engine(url, plan_format)
        text = template.replace("{input}", "詩を{input}")
        assert [a.text for a in asks.answer([prompter.render("詩を{input}")])] == [usual(text)]
    assert [(path, body["prompt"]) for path, body, _ in server.asked[1:]] == [
        ("/v1/completions", text)
    ]


def test_generation_settings():
    server = Server()
    with server.running() as url:
        asks, prompter, _ = engine(
            url, do_sample=True, temperature=0.5, top_p=0.9, repetition_penalty=1.1, stop=("終",)
        )
        (answer,) = asks.answer([prompter.render("a")])
    body = server.asked[-1][1]
    assert {
        k: body[k] for k in ("temperature", "top_p", "repetition_penalty", "stop", "max_tokens")
    } == {
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
    server = Server(
        plan=lambda n, p: {
            "text": texts[int(p[-1])],
            "finish_reason": "length" if p[-1] == "2" else "stop",
        }
    )
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
    assert all(
        g == t or (g == "\ufffd" and "\ud800" <= t <= "\udfff")
        for g, t in zip(good, text, strict=True)
    )


def test_a_prompt_with_half_a_pair_is_sent_whole():
    with Server().running() as url:
        asks, _, _ = engine(url, "competition")
        assert [a.text for a in asks.answer(["a\ud83d"])] == ["\ufffda"]


def test_an_answer_is_given_when_it_comes():
    """Prompt a takes longer than all others together; what `on_answer` raises ends the asking."""
    server = Server(plan=lambda number, prompt: time.sleep(0.5) if prompt.endswith("a") else None)
    with server.running() as url:
        asks, prompter, _ = engine(url, concurrency=2)
        texts, seen = [prompter.render(text) for text in "abcd"], []
        answers = asks.answer(texts, on_answer=lambda *of: seen.append(of))
        assert [place for place, _ in seen] == [1, 2, 3, 0]
        assert sorted(seen) == list(enumerate(answers))

        def full(place, answer):
            raise OSError("no space")

        with pytest.raises(OSError, match="no space"):
            asks.answer([prompter.render(f"{i}") for i in range(90)], on_answer=full)
        assert len(server.prompts()) < 20
        assert asks.answer(texts) == answers


@pytest.mark.parametrize("slow", ["sleeps", "fails"])
def test_the_deadline_waits_for_no_server(monkeypatch, slow):
    """Prompts of more than two figures have no answer: the server sleeps, or says again and again
    that it is overloaded.
    """
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
        answers = asks.answer(texts, on_answer=lambda *of: seen.append(of), deadline=began + 1.5)
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
        assert asks.answer([prompter.render("a")], deadline=time.monotonic() + 60) == [
            Answer("途中", True, 5)
        ]


# prompts that are too long: what servers say, by their sources or as their users quote it

LONG = {
    "openai": (
        400,
        {
            "message": "This model's maximum context length is 8 tokens. However, …",
            "code": "context_length_exceeded",
        },
    ),
    "openai, code alone": (
        400,
        {"message": "Bad.", "type": "invalid_request_error", "code": "context_length_exceeded"},
    ),
    "openai, responses": (400, {"message": "Your input exceeds the context window of this model."}),
    "vllm": (
        400,
        {
            "message": (
                "This model's maximum context length is 8 tokens. However, your prompt contains "
                "9 input tokens, …"
            ),
            "code": 400,
        },
    ),
    "vllm, prompt": (
        400,
        {
            "message": "Input length (9) exceeds model's maximum context length (8).",
            "type": "BadRequestError",
        },
    ),
    "vllm, full": (
        400,
        {
            "message": "max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)",
            "code": 400,
        },
    ),
    "llama.cpp": (
        400,
        {
            "code": 400,
            "message": "request (9 tokens) exceeds …",
            "type": "exceed_context_size_error",
            "n_ctx": 8,
        },
    ),
    "llama.cpp, older": (
        500,
        {"code": 500, "message": "Context size has been exceeded.", "type": "server_error"},
    ),
    "llama-cpp-python": (
        400,
        {
            "message": "Requested tokens (9) exceed context window of 8",
            "type": "invalid_request_error",
        },
    ),
    "sglang": (
        400,
        {"message": "The input (9 tokens) is longer than the model's context length (8 tokens)."},
    ),
    "sglang, memory": (
        400,
        {"message": "Input length (9 tokens) exceeds the maximum allowed length (8 tokens)."},
    ),
    "tgi": (
        422,
        {
            "message": (
                "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 8. "
                "Given: 7 and 3"
            )
        },
    ),
    "lm studio": (400, "tokens to keep from the initial prompt is greater than the context length"),
    "gateways": (413, {"message": "prompt is too long: 9 tokens > 8 maximum"}),
}


def refused(server):
    code, error = LONG[server]
    return status(code, body={"error": error})


@pytest.mark.parametrize("server", LONG)
def test_a_shorter_prompt_is_asked_until_it_fits(server):
    """The server takes at most three examples; prompt 1 has none to drop and fits."""
    serving = Server(
        plan=lambda number, prompt: refused(server) if prompt.count("例") > 3 else None
    )
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
    assert [found[i].text for i in range(3)] == [
        usual("例例例問0"),
        usual("問1"),
        usual("例例例問2"),
    ]
    assert now == ["例例例問0", "問1", "例例例問2"]
    assert most == 1, "called by several threads at once"


@pytest.mark.parametrize(
    ("room", "examples", "tokens"),
    [("context", 2, 9), ("context, none suffices", 0, 6), ("limit", 5, 4)],
)
def test_an_answer_that_the_context_cuts_is_asked_again_with_less(room, examples, tokens):
    """The server answers with as many tokens as there is room for beside the examples, or never
    with more than four.
    """

    def plan(number, prompt):
        wanted = {"context": 11, "context, none suffices": 6, "limit": 4}[room] - (
            0 if room == "limit" else prompt.count("例")
        )
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

        assert list(asks.answer_each(now, shorter=shorter)) == [
            (0, Answer("例" * examples + "問", True, tokens))
        ]
    assert len(serving.prompts()) == {"context": 4, "context, none suffices": 6, "limit": 2}[room]


def test_where_nothing_can_be_dropped_it_is_the_servers_error():
    calls = []
    with Server(plan=lambda number, prompt: refused("vllm")).running() as url:
        asks, _, _ = engine(url, "competition")
        with pytest.raises(
            EngineError,
            match=r"status 400: This model's maximum context length is 8.*Shorten the task",
        ):
            list(
                asks.answer_each(
                    ["例問"],
                    shorter=lambda index: calls.append(index) or (None if len(calls) > 1 else "問"),
                )
            )
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
        list(
            engine(url, "competition")[0].answer_each(
                ["例問"], shorter=lambda index: pytest.fail("asked for a shorter prompt")
            )
        )
