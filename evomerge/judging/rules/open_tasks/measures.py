"""Measures of an answer to an open task, from which its grade is made: each is a number with a
meaning, none belongs to one task.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache

from evomerge.judging.rules.open_tasks.checks import Check, checks_for
from evomerge.judging.rules.open_tasks.parsed_text import ParsedText, key_words, weighted_share
from evomerge.judging.rules.open_tasks.kinds import is_polar, kind_of
from evomerge.judging.rules.open_tasks.points import read_points
from evomerge.text import (
    TERM,
    clean,
    count_items,
    f1,
    foreign_letters,
    trigrams,
    language,
    named_count,
    repetition,
)

_OTHER_LANGUAGE = re.compile(
    r"translat|英語|英訳|翻訳|中国語|in (?:english|japanese)|コード|code", re.IGNORECASE
)
_REFUSES = re.compile(
    r"申し訳|できません|[分わ]かりません|お答えできない|AI(?:として|アシスタント|なので|言語)|言語モデル|\bI (?:cannot|can't)\b"
)
_MID_SENTENCE = re.compile(r"[、,はがをにと]$")
# an answer in another language shares no more n-trigrams with the reference than this
_FAR_FROM_REFERENCE = 0.05


@dataclass(frozen=True)
class Expected:
    """What an open task's question, reference and grading points tell, worked out once a task."""

    question: str
    reference: str
    kind: str
    trigrams: frozenset[str]
    question_grams: frozenset[str]
    language: str
    items: int | None
    repetition: float
    refuses: bool
    facts: dict[str, float]
    conclusion: dict[str, float]
    points: dict[str, float]
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class Measured:
    """The measures of an answer by name, how many items it lists, its language where that was
    looked at, what the checks found.
    """

    values: dict[str, float]
    listed: int
    language: str
    findings: tuple[str, ...]


@lru_cache(maxsize=1024)
def expected_of(question: str, reference: str, points: str) -> Expected:
    """Read a task. The reference may be empty: then there is nothing to compare with."""
    question, text = clean(question), clean(reference)
    kind, reading = kind_of(question), ParsedText(text)
    spoken = language(text) or ("" if _OTHER_LANGUAGE.search(question) else language(question))
    items, listed = named_count(question), count_items(text)
    if items is not None and listed and listed != items:
        items = None  # the reference itself understands the number otherwise
    read = read_points(clean(points), text)
    return Expected(
        question=question,
        reference=text,
        kind=kind,
        trigrams=trigrams(text),
        question_grams=trigrams(question),
        language=spoken,
        items=items,
        repetition=repetition(text),
        refuses=bool(_REFUSES.search(text)),
        facts={word: 1.0 for word in dict.fromkeys(TERM.findall(text)) if word not in question},
        conclusion=key_words(reading.conclusion, question),
        points=dict.fromkeys(read.wanted, 1.0),
        checks=checks_for(question, reading, read.right, kind, polar=is_polar(question))
        if text
        else (),
    )


def measure(task: Expected, raw: str, text: str, *, truncated: bool) -> Measured:
    """Measure a raw answer, of which `text` is the cleaned form. What has no meaning for a task is
    0.
    """
    said, reading = trigrams(text), ParsedText(text)
    overlap = f1(said, task.grams)
    verdicts = [check(reading) for check in task.checks]
    listed = count_items(text) if task.items is not None else 0
    spoken = language(text) if overlap < _FAR_FROM_REFERENCE else ""
    values = {
        "overlap": overlap,
        "overlap, unchecked": 0.0 if verdicts else overlap,
        "facts": weighted_share(task.facts, text),
        "conclusion": weighted_share(task.conclusion, text),
        "points": weighted_share(task.points, text),
        "check": sum(value for value, _ in verdicts) / len(verdicts) if verdicts else 0.0,
        "lines": math.log1p(min(30, text.count("\n"))),
        "copied": len(said & task.question_grams) / max(1, len(said)),
        "echo": float(overlap < 0.7 and f1(said, task.question_grams) > 0.9),
        "repetition": max(0.0, repetition(text) - task.repetition),
        "foreign letters": len(foreign_letters(raw, task.reference + task.question)[:4]) / 4,
        "language": float(bool(spoken and task.language and spoken != task.language)),
        "items": float(listed > 0 and listed != task.items),
        "refusal": float(not task.refuses and bool(_REFUSES.search(text, 0, 300))),
        "short": 0.0
        if verdicts or not task.reference
        else max(0.0, 1 - len(text) / (0.25 * len(task.reference))),
        "cut off": 1.0 if truncated else 0.4 * bool(_MID_SENTENCE.search(text[-2:])),
    }
    return Measured(values, listed, spoken, tuple(why for _, why in verdicts))
