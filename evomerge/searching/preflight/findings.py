"""The findings of a check."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from evomerge.errors import EvomergeError
from evomerge.masking import masked


@dataclass(frozen=True)
class PreflightFinding:
    """One finding.

    `level` is ok, low (it may not suffice), unknown (it could not be reached) or wrong.
    """

    level: str
    subject: str
    text: str


@dataclass
class Findings:
    """Collects findings."""

    lines: list[PreflightFinding] = field(default_factory=list)

    @property
    def all_well(self) -> bool:
        """Whether nothing is wrong so far."""
        return all(line.level != "wrong" for line in self.lines)

    def add(self, level: str, subject: str, text: str) -> None:
        """Add one finding."""
        self.lines.append(PreflightFinding(level, subject, masked(text)))

    @contextmanager
    def refusals(self, subject: str) -> Iterator[None]:
        """What a search would refuse within the block becomes a finding."""
        try:
            yield
        except EvomergeError as error:
            self.add("wrong", subject, str(error))
