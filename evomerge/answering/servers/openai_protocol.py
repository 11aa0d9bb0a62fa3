"""The OpenAI protocol as servers speak it: addresses, keys, UTF-8, replies, refusals."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from typing import Any, NoReturn
from urllib.parse import urlsplit

from evomerge.answering.engine import Answer
from evomerge.answering.thoughts import Marks, split_reply
from evomerge.errors import InputError
from evomerge.study import GenerationSection

KEY = "OPENAI_API_KEY"
# How servers say that a prompt is too long: OpenAI, vLLM, llama.cpp, SGLang, TGI, LM Studio,
# Mistral, xAI, Anthropic's and Google's gateways. (transformers' own server accepts any length.)
TOO_LONG_CODES = ("context_length_exceeded", "exceed_context_size_error")
TOO_LONG = re.compile(
    r"context[ _-]?(length|window|size|limit)|maximum (prompt|model|input|sequence) length"
    r"|max_model_len|must be <= ?\d|maximum allowed (input )?length"
    r"|(prompt|input|request) is too (long|large)|too many (input )?tokens"
    r"|`?inputs`? (tokens|must have less than)|input token count"
    # vLLM, of a prompt that fills the context to the last token
    r"|max_tokens must be at least 1, got",
    re.IGNORECASE,
)
# How servers say that a content filter refuses a prompt: OpenAI, Azure, OpenRouter, DashScope,
# Zhipu, DeepSeek, Google's and Anthropic's gateways.
FILTER_CODES = ("content_filter", "content_policy_violation", "data_inspection_failed", "1301")
FILTERED = re.compile(
    r"content[ _-]?(filter|policy|management|moderation|exists risk)"
    r"|(is|was|been|input|prompt|request) (flagged|blocked|rejected) (by|for|due|as|because)"
    r"|requires moderation|moderation (policy|system|error)|inappropriate content"
    r"|safety (system|filter|policy|settings)|usage policy",
    re.IGNORECASE,
)
EXAMINED = 10_000  # characters of a server's message


class FilteredReply(Exception):
    """A content filter took the place of the reply."""


class TurnsAsJson:
    """Takes a tokenizer's place in a Prompter and renders the turns unchanged, as JSON."""

    chat_template = "the server's"

    def apply_chat_template(
        self,
        turns: list[dict[str, str]],
        tokenize: bool,
        add_generation_prompt: bool,
        **variables: object,  # which the request sends apart
    ) -> str:
        return json.dumps(turns, ensure_ascii=False)


def server_url(url: str, where: str = "--server") -> str:
    """The address for the client: `/v1` is added where there is no path. Raises InputError."""
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fine = False
    if "@" in url or "?" in url or "#" in url:  # not shown: it may hold a key
        raise InputError(
            "the address contains more than a host and a path",
            where=where,
            remedy=f"Write http://HOST:PORT/v1; a key belongs in {KEY}.",
        )
    if not fine:
        raise InputError(
            "not a server's address", where=where, found=url, remedy="Write http://HOST:PORT/v1."
        )
    path = parts.path.rstrip("/") or "/v1"
    return f"{parts.scheme}://{parts.netloc}{path}"


def api_key() -> str:
    """The key from the environment, empty if there is none. Raises InputError."""
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise InputError(
            "the key contains characters that are not allowed in a request header",
            where=KEY,
            remedy="Set it again.",
        )
    return key


def whole(text: str) -> str:
    """The text with surrogate pairs joined, and lone surrogates, which UTF-8 lacks, as U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def request_settings(model: str | None, g: GenerationSection) -> dict[str, Any]:
    """What a request of either endpoint says besides its prompt."""
    settings: dict[str, Any] = {
        "model": model,
        "max_tokens": g.max_new_tokens,
        "temperature": g.temperature if g.do_sample else 0.0,
    }
    if g.stop:
        settings["stop"] = list(g.stop)
    if g.do_sample:
        settings |= {"top_p": g.top_p, "seed": g.seed or 0}
    if g.repetition_penalty != 1.0:  # not a field of OpenAI's; vLLM, SGLang and others know it
        settings["extra_body"] = {"repetition_penalty": g.repetition_penalty}
    return settings


def read_reply(reply: Any) -> Answer:
    """The answer in a reply of either endpoint.

    Raises ValueError if it holds none, FilteredReply if a content filter left nothing of it.
    """
    choices = getattr(reply, "choices", None)
    if not isinstance(choices, list) or not choices:
        _no_answer(reply)
    choice = choices[0]
    message = getattr(choice, "message", None)
    if message is None:
        text = getattr(choice, "text", None)
    else:  # the content is None where a model only thought, or called a tool
        text = getattr(message, "content", None)
        text = "" if text is None else text
    if not isinstance(text, str):
        _no_answer(reply)
    ended = getattr(choice, "finish_reason", None)
    if ended == "content_filter" and not text.strip():
        raise FilteredReply("a content filter left nothing of the answer")
    tokens = getattr(getattr(reply, "usage", None), "completion_tokens", None)
    if not isinstance(tokens, int):
        tokens = 0
    return Answer(whole(text), ended == "length", tokens)


def with_thoughts(answer: Answer, reply: Any, marks: Marks | None, prompt: str) -> Answer:
    """The answer of `read_reply` apart from its thoughts, which some servers send as such.

    Their tokens are counted where the server does.
    """
    if marks is None:
        return answer
    usage = getattr(getattr(reply, "usage", None), "completion_tokens_details", None)
    tokens = getattr(usage, "reasoning_tokens", None)
    count = tokens if isinstance(tokens, int) else 0
    message = getattr(reply.choices[0], "message", None)
    for name in ("reasoning_content", "reasoning"):
        thoughts = getattr(message, name, None)
        if isinstance(thoughts, str) and thoughts:
            # a server may take the first block only
            found = split_reply(answer.text, marks)
            text = "".join((whole(thoughts), found.thoughts, found.later))
            return replace(answer, text=found.answer, thoughts=text, thought_tokens=count)
    found = split_reply(answer.text, marks, marks.opened_by(prompt))
    text = found.thoughts + found.later
    if not text:
        return answer
    return replace(answer, text=found.answer, thoughts=text, thought_tokens=count)


def message_of(error: Any) -> str:
    """The server's own words: of {"error": {"message": …}}, {"detail": …} or any other body."""
    body = error.body
    for key in ("error", "message", "detail"):
        if isinstance(body, dict):
            body = body.get(key, body)
    if isinstance(body, str):
        return body[:EXAMINED]
    if not body:
        return "no reason given"
    try:
        return json.dumps(body, ensure_ascii=False, default=str)[:EXAMINED]
    except RecursionError:
        return "a reason that is nested too deeply"


def is_too_long(error: Any) -> bool:
    """Whether a server refuses a request because prompt and answer do not fit its context."""
    status = getattr(error, "status_code", None)
    if status == 413:
        return True
    if status not in (400, 422, 500):  # 500: older llama.cpp
        return False
    codes = {getattr(error, "code", None), getattr(error, "type", None)}
    return bool(codes & set(TOO_LONG_CODES)) or TOO_LONG.search(message_of(error)) is not None


def is_filtered(error: Any) -> bool:
    """Whether a server's content filter refuses the request."""
    if getattr(error, "status_code", None) not in (400, 403, 422, 451):
        return False
    codes = {str(getattr(error, name, None)) for name in ("code", "type")}
    return bool(codes & set(FILTER_CODES)) or FILTERED.search(message_of(error)) is not None


def _no_answer(reply: Any) -> NoReturn:
    raise ValueError(" ".join(str(reply).split())[:80])
