"""The keys for models that think: in study files, prompts, servers' requests and identities."""

import json
from types import SimpleNamespace

import pytest
from reasoning_tools import thinker

import evomerge
from evomerge.answering.cache import cache_scope
from evomerge.answering.chat_template import unread_variables
from evomerge.answering.engine import Answer
from evomerge.answering.prompts import make_prompter
from evomerge.answering.reasoning import (
    THINK,
)
from evomerge.errors import StudyFileError
from evomerge.study import (
    GenerationSection,
    PromptSection,
    Study,
    as_begun,
    changed_keys,
    read_study,
)
from evomerge.study.messages import validated


def study(**sections):
    data = {
        "study": "s",
        "genome": {"base_model": "a", "models": ["b"], "merge_method": "task_arithmetic"},
        "tasks": [{"file": "t"}],
    }
    return validated(Study, data | sections, "file")


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"prompt": {"chat_template_kwargs": 3}}, ["chat_template_kwargs`", "mapping", "3"]),
        ({"prompt": {"chat_template_kwargs": [1]}}, ["mapping"]),
        ({"prompt": {"chat_template_kwargs": {"messages": []}}}, ["cannot set `messages`"]),
        ({"prompt": {"chat_template_kwargs": {"tokenize": True}}}, ["cannot set `tokenize`"]),
        (
            {"prompt": {"chat_template_kwargs": {"add_generation_prompt": False}}},
            ["add_generation_prompt"],
        ),
        ({"prompt": {"chat_template_kwargs": {"a b": 1}}}, ["no variable", "'a b'"]),
        ({"prompt": {"chat_template_kwargs": {1: 1}}}, ["no variable"]),
        ({"prompt": {"chat_template_kwargs": {"a": float("nan")}}}, ["JSON"]),
        (
            {"prompt": {"format": "competition", "chat_template_kwargs": {"a": 1}}},
            ["applies only to `format: chat`"],
        ),
        ({"generation": {"reasoning": "yes"}}, ["generation.reasoning`", "'yes'", "auto"]),
        ({"generation": {"reasoning": {"start": "a"}}}, ["start and an end"]),
        ({"generation": {"reasoning": {"start": "a", "end": "a"}}}, ["same start and end"]),
        ({"generation": {"reasoning": {"start": "a", "stop": "b"}}}, ["unknown key", "stop"]),
        ({"generation": {"reasoning": {"start": " ", "end": "b"}}}, ["start and an end"]),
        ({"generation": {"reasoning": True}}, ["generation.reasoning`"]),
    ],
)
def test_bad_values_are_one_line(section, words):
    with pytest.raises(StudyFileError) as error:
        study(**section)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_the_keys_are_stored_and_make_another_study():
    marks = {"start": "<a>", "end": "</a>"}
    own = study(
        prompt={"chat_template_kwargs": {"enable_thinking": True, "n": [1, {"x": None}]}},
        generation={"reasoning": marks},
    )
    stored = own.to_dict()
    assert Study.from_dict(json.loads(json.dumps(stored))) == own
    assert stored["generation"]["reasoning"] == marks
    changed = changed_keys(study().to_dict(), stored)
    assert any(key.startswith("prompt.chat_template_kwargs") for key in changed)
    assert any(key.startswith("generation.reasoning") for key in changed)


def test_a_variable_in_a_kwarg_is_stored_as_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("DATE", "today")
    file = tmp_path / "s.yaml"
    file.write_text(
        "genome: {base_model: ./a, models: [./b], merge_method: task_arithmetic}\n"
        "tasks: [{file: t.jsonl}]\nprompt: {chat_template_kwargs: {date: '${DATE}'}}\n"
    )
    own = read_study(file)
    assert own.prompt.chat_template_kwargs == {"date": "today"}
    assert own.to_dict()["prompt"]["chat_template_kwargs"] == {"date": "${DATE}"}


def test_older_studies_go_on_without_looking_for_thoughts():
    stored = study().to_dict()
    del stored["generation"]["reasoning"], stored["prompt"]["chat_template_kwargs"]
    assert Study.from_dict(stored).generation.reasoning is None
    assert as_begun(study(), stored).generation.reasoning is None
    assert changed_keys(stored, as_begun(study(), stored).to_dict()) == []


def test_only_what_is_given_or_found_changes_keys():
    plain, off = study(), study(generation={"reasoning": None})
    scope = cache_scope(plain, {"a": "1"})
    assert cache_scope(off, {"a": "1"}) == scope
    assert cache_scope(plain, {"a": "1"}, marks=THINK) != scope
    told = study(prompt={"chat_template_kwargs": {"enable_thinking": False}})
    assert cache_scope(told, {"a": "1"}) != scope
    assert repr(off.generation) == repr(plain.generation)
    assert "reasoning" not in repr(plain.generation)
    assert "chat_template_kwargs" not in repr(plain.prompt)


def test_the_template_gets_its_variables():
    tokenizer = thinker()
    section = PromptSection(chat_template_kwargs={"enable_thinking": False})
    assert make_prompter(tokenizer, section).render("い") == "い\n<think>\n\n</think>\n\n"
    assert make_prompter(tokenizer, PromptSection()).render("い") == "い\n"


def test_variables_that_a_template_does_not_mention_are_named():
    assert unread_variables(thinker(), ["enable_thinking", "thinking"]) == ["thinking"]


def test_references_follow_thoughts_that_are_closed():
    assert THINK.closed("い\n<think>\n") == "い\n<think>\n\n</think>\n\n"
    assert THINK.closed("い\n") == "い\n"


def test_a_server_gets_the_variables_and_its_thoughts_are_kept_apart():
    pytest.importorskip("openai", reason="the extra `server` is not installed")
    from chat_server import Server

    from evomerge.answering.servers.engine import ServerEngine

    replies = {
        "1": {"text": "<think>hm</think>\n42"},
        "2": {"text": "hm</think>42"},
        "3": {"text": "Write <think> here."},
        "4": {"text": "<think>hm", "finish_reason": "length"},
    }
    server = Server(plan=lambda number, prompt: replies[prompt[-1]])
    with server.running() as url:
        section = GenerationSection()
        asks = ServerEngine(url, None, section, True, 1, {"enable_thinking": True})
        prompts = [json.dumps([{"role": "user", "content": name}]) for name in replies]
        found = asks.answer(prompts)
    assert [answer.text for answer in found] == ["42", "42", "Write <think> here.", ""]
    assert [answer.thoughts for answer in found] == [
        "<think>hm</think>\n",
        "hm</think>",
        "",
        "<think>hm",
    ]
    assert found[3].truncated
    bodies = [body for path, body, _ in server.asked if path == "/v1/chat/completions"]
    assert all(body["chat_template_kwargs"] == {"enable_thinking": True} for body in bodies)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thoughts_that_a_server_sends_apart_are_kept(name):
    from evomerge.answering.servers.openai_protocol import read_reply, with_thoughts

    message = SimpleNamespace(content="42", **{name: "hm"})
    usage = SimpleNamespace(
        completion_tokens=9, completion_tokens_details=SimpleNamespace(reasoning_tokens=6)
    )
    reply = SimpleNamespace(
        choices=[SimpleNamespace(message=message, finish_reason="stop")], usage=usage
    )
    found = with_thoughts(read_reply(reply), reply, THINK, "")
    assert found == Answer("42", False, 9, "hm", 6)
    assert with_thoughts(read_reply(reply), reply, None, "") == Answer("42", False, 9)


def test_thought_tokens_need_a_model_that_thinks(pair, tmp_path):
    with pytest.raises(StudyFileError, match="a model that thinks"):
        evomerge.search(
            pair / "study.yaml",
            storage=tmp_path / "s.db",
            results=tmp_path / "results",
            overrides={"objective": {"maximize": ["grade"], "minimize": ["thought_tokens"]}},
        )
