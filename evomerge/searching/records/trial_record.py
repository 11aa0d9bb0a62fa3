"""One trial as the storage holds it.

A trial has the attributes role, generation and index from its first write. Its outcome is the
attribute `result` (format 1). In older studies (format 0) each figure of the result is an attribute
of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

INTERRUPTED = "interrupted"  # the reason of a trial whose process ended before the trial did
REFERENCES = ("parent", "uniform")  # the roles of what a search is compared with
# fields of a TaskGrade that are stored only where they have a value
OPTIONAL = ("length", "likelihood", "objective", "tokens", "thought_tokens")


@dataclass(frozen=True)
class TaskGrade:
    """The value of the answer to one task.

    `grade` is a judge's grade, `score` a document's share of lm-eval's score; `length` is the
    answer's share of its longest allowed length and `likelihood` the reference's log-likelihood in
    nats per token. `objective` is the weighted sum of these parts. `tokens` are the answer's and
    `thought_tokens` those before it; older studies and models without thoughts do not know them.
    """

    correct: bool | None  # None for an open task
    truncated: bool
    grade: float | None = None
    score: float | None = None
    length: float | None = None
    likelihood: float | None = None
    objective: float | None = None
    tokens: int | None = None
    thought_tokens: int | None = None

    def value(self, metric: str) -> float | None:
        """The metric's value: grade, correct (1.0 or 0.0), score or objective."""
        values = {
            "grade": self.grade,
            "correct": self.correct,
            "score": self.score,
            "objective": self.objective,
        }
        value = values[metric]
        return None if value is None else float(value)

    def to_dict(self) -> dict[str, Any]:
        """The stored form, which has either a grade or a score."""
        data: dict[str, Any] = {}
        if self.score is None:
            data["grade"] = self.grade
        else:
            data["score"] = self.score
        data |= {"correct": self.correct, "truncated": self.truncated}
        for key in OPTIONAL:
            value = getattr(self, key)
            if value is not None:
                data[key] = value
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TaskGrade:
        """The inverse of `to_dict`."""
        return cls(**data)


@dataclass(frozen=True)
class Result:
    """The outcome of a trial: `truncated` is a share of the answers, `seconds` are by phase."""

    score: float
    stderr: float | None  # None: there is a single value
    n: int
    truncated: float
    seconds: Mapping[str, float]
    grades: Mapping[str, TaskGrade]  # by the tasks' keys
    tokens: int = 0  # new tokens of all answers, thoughts included
    tokens_per_second: float | None = None  # of the answers that were not in the cache
    parts: Mapping[str, float] = field(default_factory=dict)  # of the objective, or each objective
    # of the score, from drawing some of the search tasks; None: all were answered
    draw_variance: float | None = None
    thought_tokens: int | None = None  # of all answers; None: the model has no thoughts

    def to_dict(self) -> dict[str, Any]:
        """The stored form."""
        data = dict(vars(self))
        if self.thought_tokens is None:
            del data["thought_tokens"]
        data["grades"] = {task: grade.to_dict() for task, grade in self.grades.items()}
        return data


@dataclass(frozen=True)
class TrialRecord:
    """One trial; the fields of `Result` have their meaning there."""

    number: int
    generation: int | None
    index: int | None
    role: str  # candidate, parent, mean or uniform
    state: str  # complete, failed or running
    vector: tuple[float, ...]  # of the genome: weights, densities and other numbers
    score: float | None
    stderr: float | None
    n: int
    truncated: float
    seconds: Mapping[str, float]
    reason: str | None  # of a failure
    grades: Mapping[str, TaskGrade]
    tokens: int | None = None
    tokens_per_second: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    draw_variance: float | None = None
    thought_tokens: int | None = None

    @property
    def weights(self) -> tuple[float, ...]:
        """The vector, by the name that it had up to version 0.2."""
        return self.vector

    @property
    def mean_thought_tokens(self) -> float | None:
        """Thought tokens per answer; None where the model has no thoughts."""
        if self.thought_tokens is None or not self.grades:
            return None
        return self.thought_tokens / len(self.grades)

    @property
    def mean_answer_tokens(self) -> float | None:
        """The tokens that follow the thoughts, per answer; None where the model has no thoughts."""
        if self.thought_tokens is None or self.tokens is None or not self.grades:
            return None
        return (self.tokens - self.thought_tokens) / len(self.grades)

    @property
    def credit(self) -> float:
        """The mean of the judge's grades, which know partial credit; 0 where there are none."""
        grades = []
        for known in self.grades.values():
            if known.grade is not None:
                grades.append(known.grade)
        return sum(grades) / len(grades) if grades else 0.0

    @property
    def slot(self) -> tuple[int | None, int | None]:
        """Generation and index, from 0."""
        return self.generation, self.index

    @property
    def place(self) -> tuple[int | None, int | None]:
        """Generation and candidate as they are shown, from 1.

        A mean belongs to the last generation that it was computed from.
        """
        generation, index = self.slot
        if generation is not None and self.role != "mean":
            generation += 1
        return generation, None if index is None else index + 1


def read_trial(
    number: int,
    state: str,
    score: float | None,
    params: Mapping[str, float],
    names: Sequence[str],
    attributes: Mapping[str, Any],
) -> TrialRecord:
    """A trial from its attributes, in format 0 or 1. `names` order the parameters."""
    data = {**attributes, **attributes.get("result", {})}
    vector = tuple(params[name] for name in names if name in params)
    n = data.get("n", 0)
    return TrialRecord(
        number=number,
        generation=data.get("generation"),
        index=data.get("index"),
        role=data["role"],
        state=state,
        vector=vector,
        score=score,
        stderr=known_error(data.get("stderr"), n),
        n=n,
        truncated=data.get("truncated", 0.0),
        seconds=data.get("seconds", {}),
        reason=data.get("reason"),
        grades={task: TaskGrade.from_dict(g) for task, g in data.get("grades", {}).items()},
        tokens=data.get("tokens"),
        tokens_per_second=data.get("tokens_per_second"),
        parts=data.get("parts", {}),
        draw_variance=data.get("draw_variance"),
        thought_tokens=data.get("thought_tokens"),
    )


def known_error(stored: float | None, n: int) -> float | None:
    """A stored standard error; evomerge 0.1 wrote 0 where a single value has none."""
    if stored == 0 and n <= 1:
        return None
    return stored


def metric_values(grades: Mapping[str, TaskGrade], metric: str) -> dict[str, float]:
    """Task key -> the metric's value; tasks without one are left out (open ones for `correct`)."""
    values = {}
    for task, grade in grades.items():
        value = grade.value(metric)
        if value is not None:
            values[task] = value
    return values
