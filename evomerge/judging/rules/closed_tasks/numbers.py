"""Closed tasks whose answer is a number or a list of numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

from evomerge.judging.rules.closed_tasks.claims import (
    HEDGE,
    MARKER,
    Finding,
    abbreviated,
    after_correction,
    denied,
)
from evomerge.text import CJK, Number, find_numbers, without_list_marks

_DIGITS = r"-?[0-9]++(?:,[0-9]++)*+(?:\.[0-9]++)?+[十百千万億兆]?"
_UNIT = rf"\s*+(?:(?:[A-Za-z°%]++|[{CJK}%℃]{{1,4}})\s*+)?"
BARE_NUMBER = re.compile(rf"^[^\w\d-]{{0,2}}({_DIGITS}){_UNIT}(?:です)?$")
_LIST_SEPARATOR = re.compile(r"(?:[\s,、;<>→・/|]|=>|->|\band\b|\bthen\b|と)++")
# between two: a comma or the like, or white space that holds a blank
_NUMBER_LIST = re.compile(r"\A-?[0-9.]++(?:(?:\s*+[,、;<→]\s*+|(?=[^\S ]*+ )\s++)-?[0-9.]++)++")
_UNIT_WORD = re.compile(rf"\A[\s-]*+([A-Za-z]++|[{CJK}]++)")
_OPTION_GAP = re.compile(
    rf"[^0-9\n]{{0,12}}?(?:{HEDGE}|か)[^0-9\n]{{0,8}}|\s*[,、/;~]\s*(?:and\s*)?|\s+and\s+|\s+"
)
_REASON = re.compile(
    r"\b(?:because|since|as there (?:are|is))\b.*?(?=[.\n]|$)|(?:なぜなら|理由は).*?(?=[。\n]|$)",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[。\n]|\.\s")
_HOW_MANY = re.compile(r"\bhow many (\w+)|何([分時秒日年人個本円文字回枚匹冊歳])", re.IGNORECASE)
_SIMPLE_NUMBER = re.compile(r"-?[0-9]{1,15}(?:\.[0-9]{1,15})?")
# each line: names of one unit
_UNITS = """
s sec second seconds 秒 秒です
min minute minutes 分 分です 分間
h hour hours 時間 時間です
day days 日 日です
week weeks 週間
mm millimeters ミリ
cm centimeters センチ
m meter meters metre metres メートル メートルです
km kilometer kilometers kilometres キロメートル
g gram grams グラム
kg kilogram kilograms キログラム
円 円です yen
ドル dollars dollar
"""
_UNIT_NAMES = {name: i for i, line in enumerate(_UNITS.split("\n")) for name in line.split()}


def number_list(text: str) -> list[str]:
    """The numbers of a reference that is a list of two or more numbers, else []."""
    core = text.strip("[](){} ")
    if not _NUMBER_LIST.fullmatch(core):
        return []
    if re.fullmatch(r"[0-9]{1,3}(?:,[0-9]{3})+", core):  # 1,200 is one number
        return []
    return [n.value for n in find_numbers(core, thousands=False)]


def judge_numbers(question: str, expected: list[str], said: str) -> Finding:
    """Judge several numbers by the last list that is not the question's."""
    text = without_list_marks(said)
    asked = [n.value for n in find_numbers(question, thousands=False)]
    runs = [run for run in _runs(text) if len(run) > 1]
    if re.search(r"→|->|=>", text):
        runs = [_without_prefix(run, asked) for run in runs]
    own = [run for run in runs if run != asked[-len(run) :] or run == expected] or runs
    if not own:
        return Finding(False, 0.0, "gives no list of numbers")
    chosen = own[-1]
    if re.search(HEDGE, text, re.IGNORECASE) and any(run != chosen for run in own):
        return Finding(False, 0.4, "gives several lists to choose from")
    if chosen == expected:
        return Finding(True, 1.0, "gives the expected list in order")
    near = SequenceMatcher(None, chosen[:50], expected[:500], autojunk=False).ratio()
    why = f"the list is {abbreviated(', '.join(chosen))}, not {', '.join(expected)}"
    return Finding(False, near, why)


def _without_prefix(run: list[str], asked: list[str]) -> list[str]:
    """The list after the question's own: "20, 12, 67 → 12, 20, 67"."""
    if len(run) > len(asked) and run[: len(asked)] == asked:
        return run[len(asked) :]
    return run


def _runs(text: str) -> list[list[str]]:
    """The numbers of a text, as runs with nothing but list separators in between.

    A new line ends a list that was on one line.
    """
    runs: list[list[str]] = []
    on_one_line = False
    end = 0  # of the number before
    for number in find_numbers(text, thousands=False):
        gap = text[end : number.start]
        end = number.end
        if runs and _LIST_SEPARATOR.fullmatch(gap) and not ("\n" in gap and on_one_line):
            on_one_line = on_one_line or "\n" not in gap
            runs[-1].append(number.value)
        else:
            runs.append([number.value])
            on_one_line = False
    return runs


def judge_number(question: str, expected: str, said: str, unit: str) -> Finding:
    """Judge one number with its unit, as the answer's conclusion."""
    text = said.split("\n", 1)[0].strip().rstrip("。.").strip()
    if not BARE_NUMBER.match(text):
        text = after_correction(_REASON.sub("", said))
    asked = {n.value for n in find_numbers(question, words=False)} - {expected}
    numbers = []
    for n in find_numbers(text):
        if not denied(text, n.start, n.end):
            numbers.append(n)
    numbers = [n for n in numbers if n.value not in asked] or numbers
    if not numbers:
        return Finding(False, 0.0, "states no number")
    at = _stated(question, text, numbers)
    if _is_option(text, numbers, at) or _is_option(text, numbers, at + 1):
        named = any(n.value == expected for n in numbers)
        return Finding(False, 0.4 * named, "lists several numbers")
    value = numbers[at].value
    if value != expected:
        why = f"states {abbreviated(value)}, not {expected}"
        return Finding(False, _closeness(value, expected), why)
    given = _unit(text, numbers[at])
    if _other_unit(unit or _asked_noun(question), given):
        return Finding(False, 0.4, f"states {expected} {given}, another unit")
    return Finding(True, 1.0, f"states {expected}")


def _is_option(text: str, numbers: Sequence[Number], i: int) -> bool:
    """Whether number i and the one before are alternatives: "12 or 13"."""
    if not 0 < i < len(numbers) or numbers[i].value == numbers[i - 1].value:
        return False
    return _OPTION_GAP.fullmatch(text[numbers[i - 1].end : numbers[i].start]) is not None


def _stated(question: str, text: str, numbers: Sequence[Number]) -> int:
    """Which number is the answer: a marked one, the last with the noun asked for, or the last."""
    noun = _asked_noun(question)
    named = []
    for i, n in enumerate(numbers):
        if noun and _unit(text, n).startswith(noun):
            named.append(i)
    for match in reversed(list(MARKER.finditer(text))):
        mark = match.end()
        after = []
        for i, n in enumerate(numbers):
            if n.start < mark:
                continue
            if _SENTENCE_END.search(text[mark : n.start].strip()):
                break
            after.append(i)
        if after:
            at = after[-1]
            if text[mark - 1] == "=":
                at = after[0]
            if named and at not in named and _unit(text, numbers[at]) in _UNIT_NAMES:
                return named[-1]
            return at
    if named:
        return named[-1]
    return len(numbers) - 1


def _asked_noun(question: str) -> str:
    noun = _HOW_MANY.search(question)
    if noun:
        return (noun.group(1) or noun.group(2)).lower()
    return ""


def _unit(text: str, number: Number) -> str:
    """The word right after a number."""
    word = _UNIT_WORD.match(text[number.end : number.end + 24])
    if word:
        return word.group(1).lower()
    return ""


def _other_unit(wanted: str, given: str) -> bool:
    """Whether both are known units and differ: 80 seconds are not 80 minutes."""
    if wanted not in _UNIT_NAMES or given not in _UNIT_NAMES:
        return False
    return _UNIT_NAMES[wanted] != _UNIT_NAMES[given]


def _closeness(value: str, expected: str) -> float:
    """0 to 0.5, by the relative distance of two plain numbers."""
    if not _SIMPLE_NUMBER.fullmatch(value) or not _SIMPLE_NUMBER.fullmatch(expected):
        return 0.0
    gap = abs(float(value) - float(expected)) / max(1.0, abs(float(expected)))
    return 0.5 * max(0.0, 1 - 2 * gap)
