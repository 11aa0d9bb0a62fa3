"""Closed tasks whose answer is a number or a list of numbers."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

from evomerge.judging.rules.closed_tasks.claims import (
    HEDGE,
    MARKER,
    Finding,
    after_correction,
    denied,
    abbreviated,
)
from evomerge.text import CJK, LIST_MARK, Number, find_numbers

UNIT = rf"\s*(?:[A-Za-z°%]+|[{CJK}%℃]{{1,4}})?"
BARE_NUMBER = re.compile(
    rf"^[^\w\d-]{{0,2}}(-?[0-9]+(?:,[0-9]+)*(?:\.[0-9]+)?[十百千万億兆]?){UNIT}\s*(?:です)?$"
)
_LIST_SEPARATOR = re.compile(r"\s*(?:[,、;<>→・/|]|=>|->|\band\b|\bthen\b|と|\n|\s)+\s*")
_OPTION_GAP = re.compile(
    rf"[^0-9\n]{{0,12}}?(?:{HEDGE}|か)[^0-9\n]{{0,8}}|\s*[,、/;~]\s*(?:and\s*)?|\s+and\s+|\s+"
)
_REASON = re.compile(
    r"\b(?:because|since|as there (?:are|is))\b.*?(?=[.\n]|$)|(?:なぜなら|理由は).*?(?=[。\n]|$)",
    re.IGNORECASE,
)
_UNIT_LINES = (
    "s sec second seconds 秒 秒です|min minute minutes 分 分です 分間|h hour hours 時間 時間です|day days 日 日です|week weeks 週間|"
    "mm millimeters ミリ|cm centimeters センチ|m meter meters metre metres メートル メートルです|"
    "km kilometer kilometers kilometres キロメートル|g gram trigrams グラム|kg kilogram kilograms キログラム|円 円です yen|ドル dollars dollar"
)
_UNIT_NAMES = {name: i for i, names in enumerate(_UNIT_LINES.split("|")) for name in names.split()}


def number_list(text: str) -> list[str]:
    """The numbers of a reference that is a list of two or more numbers, else []."""
    core = text.strip("[](){} ")
    if not re.fullmatch(r"-?[0-9.]+(?:\s*[,、;<→ ]\s*-?[0-9.]+)+", core) or re.fullmatch(
        r"[0-9]{1,3}(?:,[0-9]{3})+", core
    ):
        return []
    return [n.value for n in find_numbers(core, thousands=False)]


def judge_numbers(question: str, expected: list[str], said: str) -> Finding:
    """Several numbers."""
    text = LIST_MARK.sub("", said)
    asked = [n.value for n in find_numbers(question, thousands=False)]
    runs = [run for run in _runs(text, find_numbers(text, thousands=False)) if len(run) > 1]
    if re.search(r"→|->|=>", text):  # "20, 12, 67 → 12, 20, 67": the list after the question's own
        runs = [
            run[len(asked) :] if len(run) > len(asked) and run[: len(asked)] == asked else run
            for run in runs
        ]
    own = [run for run in runs if run != asked[-len(run) :] or run == expected] or runs
    if not own:
        return Finding(False, 0.0, "gives no list of numbers")
    chosen = own[-1]
    distinct = {tuple(run) for run in own}
    if re.search(HEDGE, text, re.IGNORECASE) and len(distinct) > 1:
        return Finding(False, 0.4, "gives several lists to choose from")
    if chosen == expected:
        return Finding(True, 1.0, "gives the expected list in order")
    near = SequenceMatcher(None, chosen[:50], expected, autojunk=False).ratio()
    return Finding(
        False, near, f"the list is {abbreviated(', '.join(chosen))}, not {', '.join(expected)}"
    )


def _runs(text: str, numbers: list[Number]) -> list[list[str]]:
    """Neighbouring numbers with nothing but list separators between them; a new line ends a list
    that stood on one line.
    """
    runs: list[list[str]] = []
    on_one_line = False
    for i, number in enumerate(numbers):
        gap = text[numbers[i - 1].end : number.start] if i else ""
        if i and _LIST_SEPARATOR.fullmatch(gap) and not ("\n" in gap and on_one_line):
            on_one_line = on_one_line or "\n" not in gap
            runs[-1].append(number.value)
        else:
            runs.append([number.value])
            on_one_line = False
    return runs


def judge_number(question: str, expected: str, said: str, unit: str) -> Finding:
    """One number with its unit, as the answer's conclusion."""
    first = said.split("\n", 1)[0].strip().rstrip("。.").strip()
    text = after_correction(_REASON.sub("", said)) if not BARE_NUMBER.match(first) else first
    asked = {n.value for n in find_numbers(question, words=False)} - {expected}
    numbers = [n for n in find_numbers(text) if not denied(text, n.start, n.end)]
    numbers = [n for n in numbers if n.value not in asked] or numbers
    if not numbers:
        return Finding(False, 0.0, "states no number")
    at = _stated(question, text, numbers)
    for i in (at, at + 1):
        gap = text[numbers[i - 1].end : numbers[i].start] if 0 < i < len(numbers) else "."
        if _OPTION_GAP.fullmatch(gap) and numbers[i].value != numbers[i - 1].value:
            return Finding(
                False, 0.4 * any(n.value == expected for n in numbers), "lists several numbers"
            )
    value = numbers[at].value
    given = _unit(text, numbers[at])
    if value == expected and _other_unit(unit or _asked_noun(question), given):
        return Finding(False, 0.4, f"states {expected} {given}, another unit")
    if value == expected:
        return Finding(True, 1.0, f"states {expected}")
    return Finding(False, _closeness(value, expected), f"states {abbreviated(value)}, not {expected}")


def _stated(question: str, text: str, numbers: list[Number]) -> int:
    """Which of the numbers is the answer: a marked one, one with the noun that was asked for, else
    the last.
    """
    noun = _asked_noun(question)
    named = [i for i, n in enumerate(numbers) if noun and _unit(text, n).startswith(noun)]
    for mark in reversed([m.end() for m in MARKER.finditer(text)]):
        after = [
            i
            for i, n in enumerate(numbers)
            if n.start >= mark and not re.search(r"[。\n]|\.\s", text[mark : n.start].strip())
        ]
        if after:
            at = after[0] if text[mark - 1] == "=" else after[-1]
            return (
                named[-1]
                if named and at not in named and _unit(text, numbers[at]) in _UNIT_NAMES
                else at
            )
    return named[-1] if named else len(numbers) - 1


def _asked_noun(question: str) -> str:
    noun = re.search(
        r"\bhow many (\w+)|何([分時秒日年人個本円文字回枚匹冊歳])", question, re.IGNORECASE
    )
    return (noun.group(1) or noun.group(2)).lower() if noun else ""


def _unit(text: str, number: Number) -> str:
    """The word right after a number."""
    word = re.match(rf"[\s-]*([A-Za-z]+|[{CJK}]+)", text[number.end : number.end + 24])
    return word.group(1).lower() if word else ""


def _other_unit(wanted: str, given: str) -> bool:
    """Whether both are units that are known and differ: 80 seconds are not 80 minutes."""
    return (
        wanted in _UNIT_NAMES and given in _UNIT_NAMES and _UNIT_NAMES[wanted] != _UNIT_NAMES[given]
    )


def _closeness(value: str, expected: str) -> float:
    if not all(
        re.fullmatch(r"-?[0-9]{1,15}(?:\.[0-9]{1,15})?", number) for number in (value, expected)
    ):
        return 0.0
    gap = abs(float(value) - float(expected)) / max(1.0, abs(float(expected)))
    return 0.5 * max(0.0, 1 - 2 * gap)
