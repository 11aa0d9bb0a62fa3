"""The rule-based judge: offline, deterministic, 1 to 5 from the task's input, reference and grading points.

Closed tasks are right or wrong (judging/closed.py); open ones are graded by overlap with the reference and by what
can be checked: language, repetition, cut-off, number of items, length.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from evomerge.answering.engine import Answer
from evomerge.judging.closed import is_closed, judge_closed
from evomerge.judging.grade import Grade
from evomerge.judging.text import (
    bigrams,
    clean,
    count_items,
    language,
    named_count,
    overlap,
    repetition,
)
from evomerge.tasks import Task

LONGEST = 20_000  # characters that are read; what comes after tells nothing new

# An open answer's place between 1 and 5 before its faults: round numbers, not fitted.
BASE, F1_WEIGHT, RECALL_WEIGHT, POINTS_WEIGHT = 0.2, 0.6, 0.5, 0.2


class RulesJudge:
    """Grades by rules alone; `correct` is None for open tasks."""

    name = "rules"
    version = "1"

    def grade(self, task: Task, answer: Answer) -> Grade:
        """Grade one answer, 1.0 to 5.0; never raises on any text."""
        text = answer.text[:LONGEST]
        closed = is_closed(task.output)
        if not re.search(r"\w", text):
            return Grade(1.0, False if closed else None, "empty answer" if not text.strip() else "answer without a word")
        if not closed:
            return _grade_open(task, text, answer.truncated)
        finding = judge_closed(task.input, task.output, text)
        if finding.correct:
            looping = repetition(text) > 0.5
            return Grade(4.0 if looping else 5.0, True, f"right: {finding.why}" + (", then repeats itself" if looping else ""))
        return Grade(round(1 + 2 * min(1.0, finding.nearness), 2), False, f"wrong: {finding.why}")


@dataclass(frozen=True)
class _Expected:
    """What an open task's reference and input tell, worked out once a task."""

    bigrams: Counter[str]
    length: int
    language: str
    items: int | None
    repetition: float
    terms: tuple[str, ...]


@lru_cache(maxsize=1024)
def _expected(question: str, reference: str, points: str) -> _Expected:
    text = clean(reference)
    other_language = re.search(r"translat|英語|英訳|翻訳|中国語|in (?:english|japanese)|コード|code", question, re.IGNORECASE)
    spoken = language(text) or ("" if other_language else language(clean(question)))
    items = named_count(clean(question))
    listed = count_items(text)
    if items is not None and listed and listed != items:
        items = None  # the reference itself understands the number otherwise
    # The grading points' words that the reference uses too: what a good answer names, rather than how points are lost.
    words = dict.fromkeys(re.findall("[\u30a1-\u30ff]{2,}|[\u3400-\u9fff々]{2,}|[A-Za-z]{3,}|[0-9]{2,}", clean(points)))
    terms = tuple(word for word in words if word in text)
    return _Expected(bigrams(text), len(text), spoken, items, repetition(text), terms)


def _grade_open(task: Task, raw: str, truncated: bool) -> Grade:
    expected, text = _expected(task.input, task.output, task.eval_aspect), clean(raw)
    faults: list[tuple[float, str]] = []
    spoken = language(text)
    if spoken and expected.language and spoken != expected.language:
        faults.append((2.0, f"language is {spoken}, not {expected.language}"))
    looping = repetition(text) - expected.repetition
    if looping > 0.2:
        faults.append((min(2.5, 4 * looping), f"repeats itself ({looping:.0%})"))
    if truncated:
        faults.append((0.75, "cut off"))
    listed = count_items(text)
    if expected.items is not None and listed and listed != expected.items:
        faults.append((1.0, f"{listed} items instead of {expected.items}"))
    if not expected.length:
        return _with_faults(3.0, "no reference to compare with", faults)
    ratio = len(text) / expected.length
    if ratio < 0.4:
        faults.append((1.0 * (1 - ratio / 0.4), f"short ({ratio:.1f} of the reference's length)"))
    elif ratio > 4:
        faults.append((min(1.0, 0.2 * (ratio / 4)), f"long ({ratio:.1f} times the reference's length)"))
    precision, recall = overlap(bigrams(text), expected.bigrams)
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    named = sum(term in text for term in expected.terms) / len(expected.terms) if expected.terms else recall
    value = 1 + 4 * min(1.0, BASE + F1_WEIGHT * f1 + RECALL_WEIGHT * recall + POINTS_WEIGHT * named)
    points = f", {named:.0%} of the grading points' terms" if expected.terms else ""
    return _with_faults(value, f"overlap {f1:.2f} with the reference{points}", faults)


def _with_faults(value: float, what: str, faults: list[tuple[float, str]]) -> Grade:
    value = round(min(5.0, max(1.0, value - sum(cost for cost, _ in faults))), 2)
    return Grade(value, None, "; ".join([what, *(why for _, why in faults)]))
