"""What a study stores about its judge at the verdict, for the report page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class JudgeSide:
    """One grade of a pair; `text` is its own answer, None where both sides share one."""

    name: str  # of the judge, or of the candidate
    grade: float
    reason: str
    text: str | None


@dataclass(frozen=True)
class JudgePair:
    """A task on which two judges of one answer, or two candidates by one judge, differ most.

    `who` gave the answer `text` that both sides are about; both are None where each side has its
    own.
    """

    task_id: int | str
    input: str
    reference: str
    who: str | None
    text: str | None
    sides: tuple[JudgeSide, JudgeSide]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> JudgePair:
        """The inverse of `asdict`, also after JSON."""
        first, second = data["sides"]
        return cls(**{**data, "sides": (JudgeSide(**first), JudgeSide(**second))})


@dataclass(frozen=True)
class JudgeReport:
    """The judge's grades of the `n` held-out tasks, beside the rules judge's.

    `grades` and `rules` are {candidate: [n]}; `rules` is None where the rules judge graded.
    `held_out` is a learned judge's own agreement, as its file has it.
    """

    name: str
    version: str
    n: int
    grades: Mapping[str, list[float]]
    rules: Mapping[str, list[float]] | None
    held_out: Mapping[str, Any] | None
    pairs: tuple[JudgePair, ...]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> JudgeReport:
        """The inverse of `asdict`, also after JSON."""
        pairs = tuple(JudgePair.from_dict(pair) for pair in data["pairs"])
        known = {"rules": None, "held_out": None}
        return cls(**{**known, **data, "pairs": pairs})
