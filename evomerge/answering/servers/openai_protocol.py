"""What goes between us and a server: its address, the key, texts that UTF-8 can hold, and replies
that may be anything.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any, NoReturn
from urllib.parse import urlsplit

from evomerge.answering.engine import Answer
from evomerge.errors import InputError

KEY = "OPENAI_API_KEY"
# How servers say that a prompt is too long: OpenAI, vLLM, llama.cpp, SGLang, TGI, LM Studio,
# Mistral, xAI, Anthropic's and Google's gateways. (transformers' own server refuses no length.)
TOO_LONG_CODES = ("context_length_exceeded", "exceed_context_size_error")
TOO_LONG = re.compile(
    r"context[ _-]?(length|window|size|limit)|maximum (prompt|model|input|sequence) length|max_model_len"
    r"|maximum allowed (input )?length|(prompt|input|request) is too (long|large)|too many (input )?tokens"
    r"|`?inputs`? (tokens|must have less than)|input token count"
    # vLLM, of a prompt that fills the context to the last token
    r"|max_tokens must be at least 1, got",
    re.IGNORECASE,
)


class TurnsAsJson:
    """Stands where a tokenizer stands in a Prompter: the turns stay turns."""

    chat_template = "the server's"

    def apply_chat_template(
        self, turns: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool
    ) -> str:
        return json.dumps(turns, ensure_ascii=False)


def server_url(url: str, where: str = "--server") -> str:
    """The address that the client takes: `/v1` is added where there is no path. Raises InputError."""
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fine = False
    if "@" in url or "?" in url or "#" in url:  # not shown: it may hold a key
        raise InputError(
            "the address holds more than host and path",
            where=where,
            remedy=f"Write http://HOST:PORT/v1; a key belongs in {KEY}.",
        )
    if not fine:
        raise InputError(
            "no address of a server", where=where, found=url, remedy="Write http://HOST:PORT/v1."
        )
    path = parts.path.rstrip("/") or "/v1"
    return f"{parts.scheme}://{parts.netloc}{path}"


def api_key() -> str:
    """The key of the environment, empty where there is none. Raises InputError."""
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise InputError(
            "the key holds characters that no request can carry", where=KEY, remedy="Set it again."
        )
    return key


def whole(text: str) -> str:
    """The text with halves of surrogate pairs joined, or replaced by U+FFFD: JSON can hold what
    UTF-8 cannot.
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def read_reply(reply: Any) -> Answer:
    """The answer of a reply of either endpoint. Raises ValueError when there is none in it."""
    choices = getattr(reply, "choices", None)
    if not isinstance(choices, list) or not choices:
        _no_answer(reply)
    message = getattr(choices[0], "message", None)
    text = (
        getattr(choices[0], "text", None) if message is None else getattr(message, "content", None)
    )
    if text is None and message is not None:
        text = ""  # a model that only thought, or called a tool
    if not isinstance(text, str):
        _no_answer(reply)
    tokens = getattr(getattr(reply, "usage", None), "completion_tokens", None)
    return Answer(
        whole(text),
        getattr(choices[0], "finish_reason", None) == "length",
        tokens if isinstance(tokens, int) else 0,
    )


def message_of(error: Any) -> str:
    """The server's own words, of {"error": {"message": …}}, {"detail": …} or any other body."""
    body = error.body
    for key in ("error", "message", "detail"):
        body = body.get(key, body) if isinstance(body, dict) else body
    return (
        body
        if isinstance(body, str)
        else json.dumps(body, ensure_ascii=False, default=str)
        if body
        else "no reason given"
    )


def is_too_long(error: Any) -> bool:
    """Whether a client's error is a refusal because prompt and answer do not fit the context."""
    status = getattr(error, "status_code", None)
    if status not in (400, 413, 422, 500):  # 500: older llama.cpp
        return False
    codes = {getattr(error, "code", None), getattr(error, "type", None)}
    return bool(codes & set(TOO_LONG_CODES)) or TOO_LONG.search(message_of(error)) is not None


def _no_answer(reply: Any) -> NoReturn:
    raise ValueError(" ".join(str(reply).split())[:80])
