"""A tokenizer's chat template filled in; it comes with the model and can fail in any way."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from evomerge.errors import ModelError


def render_chat(
    tokenizer: Any, turns: list[dict[str, str]], variables: Mapping[str, Any] | None = None
) -> str:
    """The text of the turns, up to the beginning of the answer; `variables` are the template's.

    A system text that the template has no turn for is put above the first user turn. Raises
    ModelError, which names the template: a syntax error, an undefined name, turns that it refuses.
    """
    try:
        return _filled(tokenizer, turns, variables)
    except Exception as error:  # raise_exception, and whatever an expression can raise
        system, *others = turns
        if system["role"] != "system" or not others:
            raise _failed(tokenizer, error) from error
    text = f"{system['content']}\n\n{others[0]['content']}"
    others[0] = {"role": others[0]["role"], "content": text}
    try:
        return _filled(tokenizer, others, variables)
    except Exception as error:
        raise _failed(tokenizer, error) from error


def unread_variables(tokenizer: Any, names: Iterable[str]) -> list[str]:
    """Those of the variables that the tokenizer's chat template does not mention."""
    mentioned = set(re.findall(r"\w+", str(tokenizer.chat_template)))
    return [name for name in names if name not in mentioned]


def _filled(
    tokenizer: Any, turns: list[dict[str, str]], variables: Mapping[str, Any] | None
) -> str:
    text = _rendered(tokenizer, turns, variables)
    asked = turns[-1]["content"].strip()
    if asked in text:
        return text
    # templates of models that read images go through parts of a turn
    in_parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    with suppress(Exception):
        parted = _rendered(tokenizer, in_parts, variables)
        if asked in parted:
            return parted
    return text


def _rendered(
    tokenizer: Any, turns: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None
) -> str:
    more = dict(variables or {})
    return str(
        tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **more)
    )


def _failed(tokenizer: Any, error: Exception) -> ModelError:
    said = str(error) or type(error).__name__
    line = getattr(error, "lineno", None)
    return ModelError(
        f"cannot be filled in: {said[:300]}" + (f" (line {line})" if line else ""),
        where=f"the chat template of {getattr(tokenizer, 'name_or_path', '')}",
        remedy="Mend it in chat_template.jinja or tokenizer_config.json, "
        "or set prompt.format to competition.",
    )
