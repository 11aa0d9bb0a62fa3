"""What a model thinks before it answers: which marks it uses, and where its answer begins.

A reply is thoughts, if there are any, followed by an answer; the thoughts end with a mark. They
begin with one too, which the prompt may hold already: some chat templates end with `<think>`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from evomerge.study import ReasoningSection

Wanted: TypeAlias = "ReasoningSection | Literal['auto'] | None"  # generation.reasoning


@dataclass(frozen=True)
class Marks:
    """The texts around thoughts."""

    start: str
    end: str

    def opened_by(self, prompt: str) -> bool:
        """Whether the prompt itself begins the thoughts."""
        return prompt.rstrip().endswith(self.start)

    def closed(self, prompt: str) -> str:
        """The prompt with thoughts that it begins ended, so that an answer can follow."""
        if not self.opened_by(prompt):
            return prompt
        return f"{prompt.rstrip()}\n\n{self.end}\n\n"


# the most common marks are also those that a server's replies are searched for
THINK = Marks("<think>", "</think>")
# Those of Qwen, DeepSeek and most others; of Magistral; and of gpt-oss, which names the two parts.
KNOWN = (
    THINK,
    Marks("[THINK]", "[/THINK]"),
    Marks("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)


@dataclass(frozen=True)
class SplitReply:
    """A reply in two parts, which together are its text.

    `thoughts` hold their marks and the blanks around them; "" where there are none. `is_open` says
    that they do not end, which leaves no answer.
    """

    thoughts: str
    answer: str
    is_open: bool = False


def split_reply(text: str, marks: Marks, opened: bool = False) -> SplitReply:
    """Where the answer begins in a reply; `opened`: the prompt has begun the thoughts.

    Thoughts come first or not at all: a mark within the answer is a part of it. A mark that ends
    thoughts which nothing has begun ends them too: the prompt of a model behind a server is
    unknown, and a merge may drop the first mark.
    """
    at = len(text) - len(text.lstrip())
    begins = text.startswith(marks.start.lstrip(), at)
    # an end mark that is a part of the start mark is none
    end = text.find(marks.end, at + len(marks.start.lstrip()) if begins else 0)
    if not (begins or opened):
        start = text.find(marks.start)
        if end < 0 or 0 <= start < end:
            return SplitReply("", text)
    if end < 0:
        return SplitReply(text, "", is_open=True)
    answer = text[end + len(marks.end) :].lstrip()
    return SplitReply(text[: len(text) - len(answer)], answer)


def bare_thoughts(thoughts: str, marks: Marks | None) -> str:
    """Thoughts without their marks, to be read."""
    text = thoughts.strip()
    if marks is not None:
        text = text.removeprefix(marks.start).removesuffix(marks.end)
    return text.strip()


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
