"""Closed tasks (a number, a list, a word, a label): does the answer SAY the expected answer?

The surrounding text does not matter. What an answer says is found by plain rules: a marked answer
("the answer is …", "答えは…") before a bare first line, that before what follows "is", "は" or "=".
Alternatives ("Cairo or Tripoli"), negations ("not 80") and passing mentions ("Alexandria, north of
Cairo") do not count.
"""

from __future__ import annotations

import re
from functools import lru_cache

from evomerge.judging.rules.closed_tasks.claims import Finding
from evomerge.judging.rules.closed_tasks.items import (
    NO,
    YES,
    judge_items,
    judge_letter,
    judge_polarity,
    split_items,
)
from evomerge.judging.rules.closed_tasks.labels import judge_label
from evomerge.judging.rules.closed_tasks.numbers import (
    BARE_NUMBER,
    judge_number,
    judge_numbers,
    number_list,
)
from evomerge.text import CJK, bare, clean, find_numbers

# characters of a cleaned answer that are read; cleaning can make a text longer
LONGEST_CLEANED = 16_000


@lru_cache(maxsize=1024)
def is_closed(reference: str) -> bool:
    """Whether a reference is a number, a list, a word or a label rather than prose."""
    text = clean(reference).strip()
    core = text.rstrip("。.")
    if not core or "\n" in core or "。" in core:
        return False
    if BARE_NUMBER.match(core) or number_list(core):
        return True
    pieces = split_items(core)
    if len(pieces) > 1:
        return len(pieces) <= 12 and all(_is_label(piece) for piece in pieces)
    return _is_label(core)


def _is_label(text: str) -> bool:
    if re.search(r"(?:です|ます|ました|でした|である|だった|ください|ません|ましょう)$", text):
        return False
    if re.search(r"[.!?;]\s", text):
        return False
    if re.search(f"[{CJK}]", text):
        return len(text) <= 16
    return len(text) <= 40 and len(text.split()) <= 4


def judge_closed(question: str, reference: str, answer: str) -> Finding:
    """Whether `answer` says `reference`."""
    expected = clean(reference).strip().rstrip("。.")
    said = clean(answer)[:LONGEST_CLEANED]
    low = bare(reference)
    if bare(answer) == low:
        return Finding(True, 1.0, "says exactly the expected answer")
    numbers = number_list(expected)
    if numbers:
        return judge_numbers(clean(question), numbers, said)
    number = BARE_NUMBER.match(expected)
    if number:
        digits = number.group(1)
        if re.fullmatch(r"0[0-9]+", digits):  # a string of digits rather than a quantity
            value = digits.replace(",", "")
        else:
            value = find_numbers(digits)[0].value
        unit = re.sub(r"[^A-Za-z\u3041-\u9fff]", "", expected[number.end(1) :]).lower()
        return judge_number(clean(question), value, said, unit)
    if low in YES | NO:
        return judge_polarity(low in YES, said)
    if re.fullmatch(r"\(?[A-J]\)?", expected):
        return judge_letter(expected.strip("()"), said)
    pieces = split_items(expected)
    if len(pieces) > 1:
        return judge_items(question, pieces, said)
    return judge_label(clean(question), low, said, capital=expected[:1].isupper())
