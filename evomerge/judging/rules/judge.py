"""The rule-based judge: offline, deterministic, 1 to 5 from the task's input, reference and grading
points.

Closed tasks are right or wrong (judging/closed.py). An open task's grade is a sum of a few measures
(judging/prose.py)
with weights that are the same for every task: how far the answer comes to the reference's
conclusion, says its facts and shares its wording, and what spoils it. docs/JUDGES.md says how far
that agrees with strong judges.
"""

from __future__ import annotations

import re

from evomerge.answering.engine import Answer
from evomerge.judging.grade import Grade
from evomerge.judging.rules.closed_tasks.grading import is_closed, judge_closed
from evomerge.judging.rules.open_tasks.measures import Expected, Measured, expected_of, measure
from evomerge.tasks import Task
from evomerge.text import clean, repetition

LONGEST = 8_000  # characters that are read; what comes after tells nothing new

# Grade points for a measure of 1. Least squares with fixed signs on GPT-4-turbo's and Athene-V2's
# grades of the models of some families, rounded; the other families were kept for measuring. The
# last four are set by hand: the answers that were graded hardly hold such, and an answer in English
# shares no wording with a Japanese reference as it is.
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


class RulesJudge:
    """Grades by rules alone; `correct` is None for open tasks."""

    name = "rules"
    version = "2"

    def grade(self, task: Task, answer: Answer) -> Grade:
        """Grade one answer, 1.0 to 5.0; never raises on any text."""
        closed = is_closed(task.output)
        text = answer.text[:LONGEST]
        # an open task may ask for brackets alone
        if not re.search(r"\w" if closed else r"[\w\[\](){}<>+*/=]", text):
            return Grade(
                1.0,
                False if closed else None,
                "empty answer" if not text.strip() else "answer without a word",
            )
        if not closed:
            return _grade_open(task, text, truncated=answer.truncated)
        finding = judge_closed(task.input, task.output, text)
        if finding.correct:
            looping = repetition(text) > 0.5
            return Grade(
                4.0 if looping else 5.0,
                True,
                f"right: {finding.why}" + (", then repeats itself" if looping else ""),
            )
        return Grade(round(1 + 2 * min(1.0, finding.nearness), 2), False, f"wrong: {finding.why}")


def _grade_open(task: Task, raw: str, *, truncated: bool) -> Grade:
    expected, text = expected_of(task.input, task.output, task.eval_aspect), clean(raw)
    found = measure(expected, raw, text, truncated=truncated)
    if expected.reference:
        merits = sum(weight * found.values[name] for name, weight in MERITS.items())
        # capped first: a fault always shows
        value, reasons = min(5.0, BASE + merits), _merits(expected, found)
    else:
        value, reasons = WITHOUT_REFERENCE, ["no reference to compare with"]
    value -= sum(weight * found.values[name] for name, weight in FAULTS.items())
    reasons += _faults(expected, found)
    return Grade(round(min(5.0, max(1.0, value)), 2), None, "; ".join(reasons))


def _merits(expected: Expected, found: Measured) -> list[str]:
    """What the answer shares with the reference, in words."""
    values = found.values
    reasons = [f"{expected.kind}: {', '.join(found.findings)}" if found.findings else expected.kind]
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
    return [why for name, why in told.items() if FAULTS[name] * values[name] >= 0.04]
