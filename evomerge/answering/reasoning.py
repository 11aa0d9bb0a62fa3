"""What a model thinks before it answers: which marks it uses. `thoughts.py` finds them in a reply.

A reply is thoughts, if there are any, followed by an answer; the thoughts end with a mark. They
begin with one too, which the prompt may hold already: some chat templates end with `<think>`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from evomerge.answering.thoughts import Marks

if TYPE_CHECKING:
    from evomerge.study import ReasoningSection

Wanted: TypeAlias = "ReasoningSection | Literal['auto'] | None"  # generation.reasoning


# the most common marks are also those that a server's replies are searched for
THINK = Marks("<think>", "</think>")
# Those of Qwen, DeepSeek and most others; of Magistral; and of gpt-oss, which names the two parts.
KNOWN = (
    THINK,
    Marks("[THINK]", "[/THINK]"),
    Marks("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)


def find_marks(wanted: Wanted, tokenizer: Any, unknown: Marks | None = None) -> Marks | None:
    """The marks of `generation.reasoning`; auto: the first of KNOWN that the tokenizer has.

    Each of the two is a token, or in the chat template. None: replies hold no thoughts. `unknown`
    are the marks where there is no tokenizer to ask: behind a server.
    """
    if wanted is None:
        return None
    if wanted != "auto":
        return Marks(wanted.start, wanted.end)
    if tokenizer is None:
        return unknown
    template = getattr(tokenizer, "chat_template", None) or ""
    if isinstance(template, Mapping):  # several, by name
        template = "\n".join(map(str, template.values()))
    for marks in KNOWN:
        if all(mark in template or is_token(tokenizer, mark) for mark in (marks.start, marks.end)):
            return marks
    return None


def is_token(tokenizer: Any, text: str) -> bool:
    """Whether a text is one token: some tokenizers have an unknown token for all others."""
    number = tokenizer.convert_tokens_to_ids(text)
    return number is not None and tokenizer.convert_ids_to_tokens(number) == text
