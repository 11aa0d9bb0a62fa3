"""Where the thoughts in a reply are, and what is left as its answer.

This file needs nothing else: the runner for machines without evomerge has a copy of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


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


@dataclass(frozen=True)
class SplitReply:
    """A reply in its parts.

    `thoughts` come before the answer, `later` ones amid it; both hold their marks and the blanks
    around them, and are "" where there are none. Without later ones, thoughts and answer together
    are the reply. `is_open` says that the thoughts do not end, which leaves no answer.
    """

    thoughts: str
    answer: str
    is_open: bool = False
    later: str = ""


def split_reply(text: str, marks: Marks, opened: bool = False) -> SplitReply:
    """The thoughts and the answer of a reply; `opened`: the prompt has begun the thoughts.

    A block of thoughts begins with the reply, directly after another block, or with a line; a mark
    elsewhere is a part of the answer. It ends with the mark that closes its first one where blocks
    are nested, and with the first end where no mark does. An end that nothing has begun ends
    thoughts too: the prompt of a model behind a server is unknown, and a merge may drop the first
    mark. vLLM's parsers take a single block, those of transformers every mark.
    """
    thoughts, answer, later = "", "", ""
    at, is_open = 0, False
    for begin, after, closed in _blocks(text, marks, opened):
        if text[at:begin].strip():
            answer += text[at:begin]
            at = begin
        if answer:
            later += text[at:after]
        else:
            thoughts += text[at:after]
        at, is_open = after, not (closed or answer)
    return SplitReply(thoughts, answer + text[at:], is_open, later)


def bare_thoughts(thoughts: str, marks: Marks | None) -> str:
    """Thoughts without the marks around their blocks, to be read."""
    text = thoughts.strip()
    if marks is not None:
        text = text.removeprefix(marks.start).removesuffix(marks.end)
        between = re.escape(marks.end) + r"\s*" + re.escape(marks.start)
        text = re.sub(between, "\n\n", text)
    return text.strip()


class _Mark(NamedTuple):
    begin: int
    after: int
    is_end: bool


def _blocks(text: str, marks: Marks, opened: bool) -> Iterator[tuple[int, int, bool]]:
    """(begin, after, closed) of each block of thoughts: its place, with the blanks after it."""
    found = _find(text, marks)
    if opened or (found and found[0].is_end):
        found.insert(0, _Mark(0, 0, False))
    closing, at, i = _closing(found), 0, 0
    while i < len(found):
        if found[i].is_end or not _may_begin(text, found[i].begin, at):
            i += 1
            continue
        end = closing.get(i) or _first_end(found, i)
        if end is None:
            yield found[i].begin, len(text), False
            return
        at = found[end].after
        while at < len(text) and text[at].isspace():
            at += 1
        yield found[i].begin, at, True
        i = end + 1


def _find(text: str, marks: Marks) -> list[_Mark]:
    """The marks in a text, in their order."""
    start = marks.start.lstrip()
    # the longer one first: an end mark that is a part of the start mark is none
    either = sorted((start, marks.end), key=len, reverse=True)
    found = []
    for match in re.finditer("|".join(map(re.escape, either)), text):
        found.append(_Mark(match.start(), match.end(), match[0] == marks.end))
    return found


def _closing(found: list[_Mark]) -> dict[int, int]:
    """The number of the mark that closes each start, of those that are closed."""
    closing, begun = {}, []
    for i, mark in enumerate(found):
        if not mark.is_end:
            begun.append(i)
        elif begun:
            closing[begun.pop()] = i
    return closing


def _first_end(found: list[_Mark], begin: int) -> int | None:
    for i in range(begin + 1, len(found)):
        if found[i].is_end:
            return i
    return None


def _may_begin(text: str, place: int, at: int) -> bool:
    """Whether a block may begin at a place: only blanks lie between it and `at`, or its line."""
    before = place
    while before > at and text[before - 1].isspace():
        before -= 1
    return before == at or "\n" in text[before:place]
