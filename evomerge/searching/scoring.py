"""From answers and grades to what is maximised: a value for each task, and a candidate's score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evomerge.errors import StudyFileError
from evomerge.searching.examine import Examined
from evomerge.searching.ledger import Result, TrialRecord
from evomerge.searching.racing import corrected
from evomerge.searching.verdict import mean_and_error, metric_values, stratified_error
from evomerge.study import Study
from evomerge.tasks import Split, Task


@dataclass(frozen=True)
class Scorer:
    """`shares` say what a task's value counts beside another's, by task_id: 1 where a study names
    no weights.

    `longest` gives the most tokens that a task's answer may have.
    """

    study: Study
    shares: Mapping[str, float]
    longest: Callable[[Task], int]

    @property
    def group(self) -> Callable[[str], str] | None:
        """The source of a task by its id, where sources have weights of their own."""
        return (lambda task: task.partition("-")[0]) if self.shares else None

    def by_task(self, examined: Examined) -> dict[str, dict[str, Any]]:
        """task_id -> grade (or lm-eval's score), correct, truncated, and with an objective its
        parts and their weighted sum.
        """
        found: dict[str, dict[str, Any]] = {}
        for i, (task, answer, grade) in enumerate(
            zip(examined.tasks, examined.answers, examined.grades, strict=True)
        ):
            record: dict[str, Any] = {
                examined.figure: grade.value,
                "correct": grade.correct,
                "truncated": answer.truncated,
            }
            if self.study.metric == "objective":
                record["length"] = answer.tokens / self.longest(task)
                if examined.likelihoods is not None:
                    record["likelihood"] = examined.likelihoods[i]
                record["objective"] = self._objective(str(task.task_id), record)
            found[str(task.task_id)] = record
        return found

    def _objective(self, task_id: str, record: Mapping[str, Any]) -> float | None:
        o = self.study.objective
        graded = record[self.study.judge.metric]
        if graded is None:
            return None
        known = record.get("likelihood")
        if o.likelihood and known is None:  # a task without a reference
            return None
        total = (
            o.grade * float(graded) + o.length * record["length"] + o.likelihood * (known or 0.0)
        )
        return float(self.shares.get(task_id, 1.0) * total)

    def result(self, examined: Examined, levels: Mapping[str, float]) -> Result:
        """A trial's result. `levels` are the search tasks' mean values by the references: they
        correct for the tasks it saw.
        """
        grades = self.by_task(examined)
        values = metric_values(grades, self.study.metric)
        if not values:
            raise StudyFileError(
                "no search task is closed, so none can be right or wrong",
                where="judge.metric",
                found="correct",
                remedy="Use grade.",
            )
        partial = len(values) < len(levels) and values.keys() <= levels.keys()
        score, error = (
            corrected(values, levels) if partial else mean_and_error(list(values.values()))
        )
        if self.group is not None and not partial:
            error = stratified_error(values, self.group)
        cut = float(np.mean([answer.truncated for answer in examined.answers]))
        tokens = sum(answer.tokens for answer in examined.answers)
        rate = examined.tokens_per_second
        return Result(
            score,
            error,
            len(values),
            cut,
            examined.seconds,
            grades,
            tokens,
            rate,
            parts(grades, self.study.judge.metric),
        )


def parts(grades: Mapping[str, Mapping[str, Any]], metric: str) -> dict[str, float]:
    """The objective's parts, each as its mean over the tasks that have it; nothing for a study
    without an objective.
    """
    records = list(grades.values())
    if not records or "objective" not in records[0]:
        return {}
    named = {"grade": metric, "length": "length", "likelihood": "likelihood"}
    found = {
        part: [float(r[key]) for r in records if r.get(key) is not None]
        for part, key in named.items()
    }
    return {part: float(np.mean(values)) for part, values in found.items() if values}


def task_levels(records: Sequence[TrialRecord], metric: str) -> dict[str, float]:
    """task_id -> its mean value by the references, which answer every search task."""
    references = [
        metric_values(r.grades, metric)
        for r in records
        if r.role in ("parent", "uniform") and r.state == "complete"
    ]
    return {
        task: float(np.mean([values[task] for values in references if task in values]))
        for task in (references or [{}])[0]
    }


def task_shares(study: Study, split: Split) -> dict[str, float]:
    """task_id -> what it counts: with weights W of the sources, the mean over a part of the split
    of share times value is sum(W * mean over the source's tasks) / sum(|W|). Empty where all
    weights are the same.
    """
    weights = [source.weight for source in study.tasks]
    if study.lm_eval or len(set(weights)) < 2:
        return {}
    shares: dict[str, float] = {}
    for part in (split.search, split.held_out, split.validation):
        sources = {str(task.task_id): int(str(task.task_id).partition("-")[0]) for task in part}
        counts = Counter(sources.values())
        total = sum(abs(weights[source]) for source in counts) or 1.0
        shares |= {
            task: weights[source] * len(part) / (counts[source] * total)
            for task, source in sources.items()
        }
    return shares
