"""Closed tasks whose answer is yes or no, a lettered option, or a list of words."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from functools import lru_cache

from evomerge.judging.rules.closed_tasks.claims import (
    HEDGE,
    MARKER,
    Finding,
    abbreviated,
    whole_word,
)
from evomerge.text import CJK, bare, without_list_marks

YES = {"はい", "yes", "true", "正しい", "真", "ok", "正", "yeah"}
NO = {"いいえ", "no", "false", "正しくない", "偽", "誤り", "誤"}
_YES_OR_NO = re.compile(
    "|".join(
        rf"\b{word}\b" if word.isascii() else word
        for word in sorted(YES | NO, key=len, reverse=True)
    ),
    re.IGNORECASE,
)
_LETTER = re.compile(r"(?<![A-Za-z])([A-J])(?![A-Za-z'])")
_SEPARATOR = re.compile(r"[\s,、;.・/\-と\"'「」]*(?:and\s*[\"']?)?")
_LEFT_OPEN = re.compile(rf"\A\s*+(?:{HEDGE}|と|か)", re.IGNORECASE)
_SEVERAL_LETTERS = re.compile(rf"\n[^\S\n]*+\(?[A-J][).]|^.{{0,40}}{HEDGE}\s*\(?[A-J]\b")
_ITEM_END = re.compile(r"[,、;・\n]|\s{1,20}and\s+")
# What makes a list go on: with newlines as separators, or with a comma or a word.
_GOES_ON = r"(?:(?=[^\S\n]*+\n)\s++|\s*+(?:[,、・/]|\band\b|と)\s*+)(?:and\s*+)?"
_WORDS = rf"(?:[{CJK}]{{1,8}}|[a-z]++(?:\s[a-z]++)?)"
_STOPS = r"\s*(?:$|[,、.。\n・])"
_JOINED = r"\s*+(?:[,、・/]|\band)\s*+$"
_WORDS_FOLLOW = re.compile(rf"\A{_GOES_ON}{_WORDS}{_STOPS}")
_WORDS_PRECEDE = re.compile(rf"(?:^|[\s:は]){_WORDS}{_JOINED}")
_LETTER_FOLLOWS = re.compile(rf"\A(?:{_GOES_ON}\w{_STOPS}|\s++\w(?:$|\W))")
_LETTER_PRECEDES = re.compile(rf"(?:^|[\s:は])\w{_JOINED}")
_IN_ORDER = re.compile(r"\bsort|\border\b|\beach\b|順|並|それぞれ", re.IGNORECASE)
_FARTHEST = 200  # characters before a list in which another item of it begins

Span = tuple[int, int, str]  # start, end, expected item


def judge_polarity(yes: bool, said: str) -> Finding:
    """Judge yes or no by the word after the last marked answer, or else the first such word."""
    found = _after_mark(_YES_OR_NO, said) or _YES_OR_NO.search(said)
    if found is None:
        return Finding(False, 0.0, "says neither yes nor no")
    if _LEFT_OPEN.match(said[found.end() :]):
        return Finding(False, 0.4, "leaves it open")
    if (found.group().lower() in YES) == yes:
        return Finding(True, 1.0, f"says {found.group()}")
    return Finding(False, 0.0, f"says {found.group()}, the opposite of the expected answer")


def judge_letter(expected: str, said: str) -> Finding:
    """Judge one of the options A to J."""
    letters = {m.group(1) for m in _LETTER.finditer(said)}
    chosen = _chosen_letter(said, letters)
    if not chosen:
        return Finding(False, 0.4 * (expected in letters), "chooses no single option")
    if chosen == expected:
        return Finding(True, 1.0, f"chooses {chosen}")
    return Finding(False, 0.0, f"chooses {chosen}, not {expected}")


def _chosen_letter(said: str, letters: set[str]) -> str:
    """The letter of the last marked answer, or of the first line, or the only one; else ""."""
    lead = re.match(r"\(?([A-Ja-j])(?:[).:]|\s*$|\s*\n)", said)
    if lead and _SEVERAL_LETTERS.search(said):
        return ""
    after = _after_mark(_LETTER, said)
    if after:
        return after.group(1)
    if lead:
        return lead.group(1).upper()
    if len(letters) == 1:
        return "".join(letters)
    return ""


def _after_mark(pattern: re.Pattern[str], said: str) -> re.Match[str] | None:
    """The first match after the last marked answer, if any is marked."""
    marks = list(MARKER.finditer(said))
    if marks:
        return pattern.search(said, marks[-1].end())
    return None


def split_items(text: str) -> list[str]:
    """The items of a list of words, each bare; single letters may be separated by spaces alone."""
    if re.fullmatch(r"(?:\w )+\w", text):
        return text.casefold().split(" ")
    pieces = _ITEM_END.split(text.strip("[](){}"))
    return list(filter(None, map(bare, pieces)))


def judge_items(question: str, expected: list[str], said: str) -> Finding:
    """Judge a list: every expected item, and no other."""
    text = without_list_marks(said).casefold()
    letters = all(re.fullmatch("[a-z0-9\u3041-\u30ff]", item) for item in expected)
    ordered = letters or _IN_ORDER.search(question)
    runs = _item_runs(text, expected)
    if not runs and letters and bare(said).replace(" ", "") == "".join(expected):
        return Finding(True, 1.0, "gives the expected letters in order")
    best = 0.0
    why = "names none of the expected items"
    for run in reversed(runs):
        names = [name for _, _, name in run]
        same = names == expected
        if not ordered:
            same = sorted(names) == sorted(expected)
        extra = _extra(text, run[0][0], run[-1][1], letters=letters)
        if same and not extra:
            return Finding(True, 1.0, "gives the expected items")
        most = 0.95
        if extra:
            most = 0.8
        near = _nearness(tuple(names[:50]), tuple(expected)) * most
        if near > best:
            best = near
            others = ""
            if extra:
                others = " and others"
            why = f"gives {abbreviated(', '.join(names))}{others}, not {', '.join(expected)}"
    if letters:  # "garden: g, button: b": the single letters, in order
        alone = re.findall(r"(?<![\w'])\w(?![\w'])", text)
        if alone == expected:
            return Finding(True, 1.0, "gives the expected letters in order")
    return Finding(False, best, why)


@lru_cache(maxsize=1024)
def _nearness(names: tuple[str, ...], expected: tuple[str, ...]) -> float:
    """How alike two lists are, 0 to 1; an answer may name the same few items thousands of times."""
    return SequenceMatcher(None, names, expected, autojunk=False).ratio()


def _item_runs(text: str, expected: list[str]) -> list[list[Span]]:
    """The expected items in a text, as runs with nothing but separators in between."""
    spans = []
    for item in set(expected):
        for m in whole_word(item).finditer(text):
            spans.append((m.start(), m.end(), item))
    runs: list[list[Span]] = []
    for span in sorted(spans):
        gap = ""
        if runs:
            gap = text[runs[-1][-1][1] : span[0]]
        if gap and _SEPARATOR.fullmatch(gap):
            runs[-1].append(span)
        else:
            runs.append([span])
    return runs


def _extra(text: str, start: int, end: int, *, letters: bool) -> bool:
    """Whether the list extends before or after the span with items that are not expected."""
    follows, precedes = _WORDS_FOLLOW, _WORDS_PRECEDE
    if letters:
        follows, precedes = _LETTER_FOLLOWS, _LETTER_PRECEDES
    if follows.match(text[end:]):
        return True
    return precedes.search(text, max(0, start - _FARTHEST), start) is not None
