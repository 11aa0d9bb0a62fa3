"""Measures of an answer to an open task, from which its grade is computed.

Each number has a meaning by itself, and none is specific to one task.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache

from evomerge.judging.rules.open_tasks.checks import checks_for
from evomerge.judging.rules.open_tasks.kinds import is_polar, kind_of
from evomerge.judging.rules.open_tasks.parsed_text import (
    Check,
    ParsedText,
    key_words,
    weighted_share,
)
from evomerge.judging.rules.open_tasks.points import read_points
from evomerge.text import (
    TERM,
    clean,
    count_items,
    f1,
    foreign_letters,
    language,
    named_count,
    repetition,
    trigrams,
)

_OTHER_LANGUAGE = re.compile(
    r"translat|英語|英訳|翻訳|中国語|in (?:english|japanese)|コード|code", re.IGNORECASE
)
_REFUSES = re.compile(
    r"申し訳|できません|[分わ]かりません|お答えできない"
    r"|AI(?:として|アシスタント|なので|言語)|言語モデル|\bI (?:cannot|can't)\b"
)
_MID_SENTENCE = re.compile(r"[、,はがをにと]$")
# an answer in another language shares no more n-grams with the reference than this
_FAR_FROM_REFERENCE = 0.05


@dataclass(frozen=True)
class Expected:
    """What an open task's question, reference and grading points imply, computed once per task."""

    question: str
    reference: str
    kind: str
    trigrams: frozenset[str]
    question_trigrams: frozenset[str]
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
    """The measures of an answer by name, and what the reasons of its grade need.

    `listed` is how many items it lists, `language` its language where that was looked at,
    `findings` are the words of the checks.
    """

    values: dict[str, float]
    listed: int
    language: str
    findings: tuple[str, ...]


@lru_cache(maxsize=1024)
def expected_of(question: str, reference: str, points: str) -> Expected:
    """Read a task. Without a reference there is nothing to compare with."""
    question = clean(question)
    text = clean(reference)
    kind = kind_of(question)
    parsed = ParsedText(text)
    read = read_points(clean(points), text)
    checks: tuple[Check, ...] = ()
    if text:
        checks = checks_for(question, parsed, read.right, kind, polar=is_polar(question))
    return Expected(
        question=question,
        reference=text,
        kind=kind,
        trigrams=trigrams(text),
        question_trigrams=trigrams(question),
        language=_expected_language(question, text),
        items=_expected_items(question, text),
        repetition=repetition(text),
        refuses=bool(_REFUSES.search(text)),
        facts={word: 1.0 for word in dict.fromkeys(TERM.findall(text)) if word not in question},
        conclusion=key_words(parsed.conclusion, question),
        points=dict.fromkeys(read.wanted, 1.0),
        checks=checks,
    )


def _expected_language(question: str, reference: str) -> str:
    """The reference's language, or else the question's unless it requests another one."""
    spoken = language(reference)
    if spoken or _OTHER_LANGUAGE.search(question):
        return spoken
    return language(question)


def _expected_items(question: str, reference: str) -> int | None:
    """How many items the question asks for; None where the reference lists another number."""
    items = named_count(question)
    listed = count_items(reference)
    if listed and listed != items:
        return None
    return items


def measure(task: Expected, raw: str, text: str, *, truncated: bool) -> Measured:
    """Measure a raw answer, whose cleaned form is `text`; a measure without meaning here is 0."""
    said = trigrams(text)
    parsed = ParsedText(text)
    overlap = f1(said, task.trigrams)
    results = [check(parsed) for check in task.checks]
    listed = 0
    if task.items is not None:
        listed = count_items(text)
    spoken = ""
    if overlap < _FAR_FROM_REFERENCE:
        spoken = language(text)
    values = {
        "overlap": overlap,
        "overlap, unchecked": overlap,
        "facts": weighted_share(task.facts, text),
        "conclusion": weighted_share(task.conclusion, text),
        "points": weighted_share(task.points, text),
        "check": 0.0,
        "lines": math.log1p(min(30, text.count("\n"))),
        "copied": len(said & task.question_trigrams) / max(1, len(said)),
        "echo": float(overlap < 0.7 and f1(said, task.question_trigrams) > 0.9),
        "repetition": max(0.0, repetition(text) - task.repetition),
        "foreign letters": len(foreign_letters(raw, task.reference + task.question)[:4]) / 4,
        "language": float(bool(spoken and task.language and spoken != task.language)),
        "items": float(listed > 0 and listed != task.items),
        "refusal": float(not task.refuses and bool(_REFUSES.search(text, 0, 300))),
        "short": 0.0,
        "cut off": 1.0 if truncated else 0.4 * bool(_MID_SENTENCE.search(text[-2:])),
    }
    if results:
        values["overlap, unchecked"] = 0.0
        values["check"] = sum(value for value, _ in results) / len(results)
    elif task.reference:
        values["short"] = max(0.0, 1 - len(text) / (0.25 * len(task.reference)))
    return Measured(values, listed, spoken, tuple(why for _, why in results))
