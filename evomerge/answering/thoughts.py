"""Where the thoughts in a reply are, and what is left as its answer.

This file needs nothing else: the runner for machines without evomerge has a copy of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass


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


def _blocks(text: str, marks: Marks, opened: bool) -> Iterator[tuple[int, int, bool]]:
    """(begin, after, closed) of each block of thoughts: its place, with the blanks after it."""
    places, ends = _find(text, marks)
    if opened or (ends and ends[0]):
        places.insert(0, 0)
        ends.insert(0, False)
    closing, at, i = _closing(ends), 0, 0
    while i < len(places):
        if ends[i] or not _may_begin(text, places[i], at):
            i += 1
            continue
        begin = places[i]
        i = closing.get(i) or _first_end(ends, i)
        if i == len(places):
            yield begin, len(text), False
            return
        at = places[i] + len(marks.end)
        while at < len(text) and text[at].isspace():
            at += 1
        yield begin, at, True
        i += 1


def _find(text: str, marks: Marks) -> tuple[list[int], list[bool]]:
    """Where the marks in a text are, and which of them are ends."""
    start = marks.start.lstrip()
    # the longer one first: an end mark that is a part of the start mark is none
    either = sorted((start, marks.end), key=len, reverse=True)
    places, ends = [], []
    for match in re.finditer("|".join(map(re.escape, either)), text):
        places.append(match.start())
        ends.append(match[0] == marks.end)
    return places, ends


def _closing(ends: list[bool]) -> dict[int, int]:
    """The number of the mark that closes each start, of those that are closed."""
    closing, begun = {}, []
    for i, is_end in enumerate(ends):
        if not is_end:
            begun.append(i)
        elif begun:
            closing[begun.pop()] = i
    return closing


def _first_end(ends: list[bool], begin: int) -> int:
    """The number of the first end after a start; where there is none, that of the marks."""
    try:
        return ends.index(True, begin)
    except ValueError:
        return len(ends)


def _may_begin(text: str, place: int, at: int) -> bool:
    """Whether a block may begin at a place: only blanks lie between it and `at`, or its line."""
    before = place
    while before > at and text[before - 1].isspace():
        before -= 1
    return before == at or "\n" in text[before:place]
