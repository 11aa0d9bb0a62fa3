"""The rule-based judge: offline, deterministic, 1 to 5 from the task alone.

Closed tasks are right or wrong (closed_tasks/grading.py). An open task's grade is a sum of a few
measures (open_tasks/measures.py) with weights that are the same for every task: how near the answer
comes to the reference's conclusion, how many of its facts and how much of its wording it shares,
and what spoils it. docs/JUDGES.md reports how far that agrees with strong judges.
"""

from __future__ import annotations

import re
from dataclasses import replace

from evomerge.answering.engine import Answer
from evomerge.judging.grade import Grade
from evomerge.judging.rules.closed_tasks.grading import LONGEST_CLEANED, is_closed, judge_closed
from evomerge.judging.rules.open_tasks.measures import Expected, Measured, expected_of, measure
from evomerge.tasks import Task
from evomerge.text import clean, repetition

LONGEST = 8_000  # characters of an answer that are read; what follows adds nothing
LONGEST_INPUT = 200_000  # characters of a task's input
LONGEST_REFERENCE = 20_000  # characters of its reference, and of its grading points

# Grade points for a measure of 1. Least squares with fixed signs on GPT-4-turbo's and Athene-V2's
# grades of the models of some families, rounded; the other families were kept for measuring. The
# last four are set manually: the graded answers hardly contain such cases, and an answer in English
# shares no wording with a Japanese reference anyway.
BASE = 2.6
MERITS = {
    "overlap": 1.1,
    "overlap, unchecked": 2.3,
    "facts": 0.6,
    "conclusion": 0.5,
    "points": 0.2,
    "check": 1.3,
    "lines": 0.12,
}
FAULTS = {
    "repetition": 1.8,
    "foreign letters": 0.8,
    "items": 0.5,
    "copied": 0.4,
    "refusal": 0.1,
    "echo": 1.0,
    "language": 0.2,
    "short": 0.2,
    "cut off": 0.75,
}
WITHOUT_REFERENCE = 3.0  # minus the faults
_WORD = re.compile(r"\w")
_WORD_OR_SYMBOL = re.compile(r"[\w\[\](){}<>+*/=]")  # an open task may ask for brackets alone


class RulesJudge:
    """Grades by rules alone; `correct` is None for open tasks."""

    name = "rules"
    version = "2"

    def grade(self, task: Task, answer: Answer) -> Grade:
        """Grade one answer, 1.0 to 5.0; never raises, whatever the text."""
        text = answer.text[:LONGEST]
        task = _shortened(task)
        if is_closed(task.output):
            return _grade_closed(task, text)
        return _grade_open(task, text, truncated=answer.truncated)


def _shortened(task: Task) -> Task:
    """The task with texts that can be compared with thousands of answers."""
    texts = (task.input, task.output, task.eval_aspect)
    if len(max(texts, key=len)) <= LONGEST_REFERENCE:
        return task
    return replace(
        task,
        input=task.input[:LONGEST_INPUT],
        output=task.output[:LONGEST_REFERENCE],
        eval_aspect=task.eval_aspect[:LONGEST_REFERENCE],
    )


def _grade_closed(task: Task, text: str) -> Grade:
    if not _WORD.search(text):
        return Grade(1.0, False, _empty_reason(text))
    finding = judge_closed(task.input, task.output, text)
    if not finding.correct:
        return Grade(round(1 + 2 * min(1.0, finding.nearness), 2), False, f"wrong: {finding.why}")
    if repetition(text) > 0.5:
        return Grade(4.0, True, f"right: {finding.why}, then repeats itself")
    return Grade(5.0, True, f"right: {finding.why}")


def _grade_open(task: Task, raw: str, *, truncated: bool) -> Grade:
    if not _WORD_OR_SYMBOL.search(raw):
        return Grade(1.0, None, _empty_reason(raw))
    expected = expected_of(task.input, task.output, task.eval_aspect)
    found = measure(expected, raw, clean(raw)[:LONGEST_CLEANED], truncated=truncated)
    if expected.reference:
        # capped first: a fault always shows
        value = min(5.0, BASE + _weighted_sum(MERITS, found))
        reasons = _merits(expected, found)
    else:
        value = WITHOUT_REFERENCE
        reasons = ["no reference to compare with"]
    value -= _weighted_sum(FAULTS, found)
    reasons += _faults(expected, found)
    return Grade(round(min(5.0, max(1.0, value)), 2), None, "; ".join(reasons))


def _weighted_sum(weights: dict[str, float], found: Measured) -> float:
    return sum(weight * found.values[name] for name, weight in weights.items())


def _empty_reason(text: str) -> str:
    if text.strip():
        return "answer without a word"
    return "empty answer"


def _merits(expected: Expected, found: Measured) -> list[str]:
    """What the answer shares with the reference, in words."""
    values = found.values
    reasons = [expected.kind]
    if found.findings:
        reasons = [f"{expected.kind}: {', '.join(found.findings)}"]
    reasons.append(f"overlap {values['overlap']:.2f} with the reference")
    if expected.facts:
        reasons.append(f"{values['facts']:.0%} of its facts")
    if expected.conclusion:
        reasons.append(f"{values['conclusion']:.0%} of its conclusion's words")
    if expected.points:
        reasons.append(f"{values['points']:.0%} of the grading points' terms")
    return reasons


def _faults(expected: Expected, found: Measured) -> list[str]:
    """What spoils the answer, in words; what costs next to nothing is left out."""
    values = found.values
    told = {
        "language": f"language is {found.language}, not {expected.language}",
        "repetition": f"repeats itself ({values['repetition']:.0%})",
        "foreign letters": "letters of another script",
        "items": f"{found.listed} items instead of {expected.items}",
        "copied": f"copies the task ({values['copied']:.0%})",
        "echo": "is the task itself",
        "refusal": "declines or doubts",
        "short": "far shorter than the reference",
        "cut off": "cut off",
    }
    reasons = []
    for name, why in told.items():
        if FAULTS[name] * values[name] >= 0.04:
            reasons.append(why)
    return reasons
