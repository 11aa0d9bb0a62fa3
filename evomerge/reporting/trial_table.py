"""The trials as a table, and what they cost."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from evomerge.sheets.delimited import inert

if TYPE_CHECKING:
    from evomerge.searching.records.trial_record import TrialRecord

PHASES = ("merge", "answer", "judge")
# of every trial, also in `evomerge show --json`
FIELDS = ("role", "state", "score", "stderr", "n", "truncated")
COLUMNS = ("number", "generation", "index", *FIELDS)
Cell = str | int | float | None


@dataclass(frozen=True)
class PhaseTime:
    """Seconds of one phase: per complete trial, in total, and as a share of all phases."""

    name: str
    mean: float
    total: float
    share: float


@dataclass(frozen=True)
class Truncation:
    """Shares of answers that ended at `max_new_tokens`, and the trial with the highest."""

    mean: float
    worst: float
    trial: int


def trial_rows(trials: Sequence[TrialRecord], slices: Sequence[str]) -> list[dict[str, Cell]]:
    """One row per trial: its figures, seconds by phase, reason of failure, weights and parts.

    Columns: those of COLUMNS, seconds_merge, seconds_answer, seconds_judge, reason, `weight LABEL`
    for each of `slices`, and `part NAME` for each part of an objective; of a model that thinks also
    tokens and thought_tokens of all answers.
    """
    parts = _part_names(trials)
    headings = _headings(slices, parts, _think(trials))
    rows = []
    for t in trials:
        row: dict[str, Cell] = dict.fromkeys(headings)
        row |= shown_fields(t)
        for phase in PHASES:
            row[f"seconds_{phase}"] = t.seconds.get(phase)
        row["reason"] = t.reason
        for label, weight in zip(slices, t.vector, strict=False):
            row[f"weight {label}"] = weight
        for part in parts:
            row[f"part {part}"] = t.parts.get(part)
        rows.append(row)
    return rows


def shown_fields(trial: TrialRecord) -> dict[str, Cell]:
    """The columns of COLUMNS: generation and index from 1."""
    generation, index = trial.place
    row: dict[str, Cell] = {"number": trial.number, "generation": generation, "index": index}
    row |= {name: getattr(trial, name) for name in FIELDS}
    if trial.thought_tokens is not None:
        row |= {"tokens": trial.tokens, "thought_tokens": trial.thought_tokens}
    return row


def write_trials_csv(out: Path, trials: Sequence[TrialRecord], slices: Sequence[str]) -> Path:
    """Write `trial_rows` as CSV."""
    rows = trial_rows(trials, slices)
    headings = _headings(slices, _part_names(trials), _think(trials))
    with out.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, headings)
        table.writerow({heading: inert(heading) for heading in headings})
        for row in rows:
            table.writerow({key: _inert(value) for key, value in row.items()})
    return out


def _inert(value: Cell) -> Cell:
    """A text, such as the reason of a failure, that no spreadsheet runs; numbers as they are."""
    return inert(value) if isinstance(value, str) else value


def seconds_by_phase(trials: Sequence[TrialRecord]) -> list[PhaseTime]:
    """The seconds of each phase over the complete trials."""
    done = [t for t in trials if t.state == "complete"]
    totals: dict[str, float] = {}
    for t in done:
        for phase, seconds in t.seconds.items():
            totals[phase] = totals.get(phase, 0.0) + seconds
    everything = sum(totals.values()) or 1.0
    order = [phase for phase in PHASES if phase in totals]
    order += [phase for phase in totals if phase not in PHASES]
    phases = []
    for phase in order:
        total = totals[phase]
        phases.append(PhaseTime(phase, total / len(done), total, total / everything))
    return phases


def truncation(trials: Sequence[TrialRecord]) -> Truncation | None:
    """How many answers of the complete trials ended at `max_new_tokens`."""
    done = [t for t in trials if t.state == "complete"]
    if not done:
        return None
    worst = max(done, key=lambda t: t.truncated)
    mean = sum(t.truncated for t in done) / len(done)
    return Truncation(mean, worst.truncated, worst.number)


def _headings(slices: Sequence[str], parts: Sequence[str], thinks: bool) -> list[str]:
    """The columns of the table."""
    headings = list(COLUMNS)
    if thinks:
        headings += ["tokens", "thought_tokens"]
    headings += [f"seconds_{phase}" for phase in PHASES]
    headings.append("reason")
    headings += [f"weight {label}" for label in slices]
    headings += [f"part {part}" for part in parts]
    return headings


def _think(trials: Sequence[TrialRecord]) -> bool:
    """Whether the model thinks before it answers."""
    return any(trial.thought_tokens is not None for trial in trials)


def mean_tokens(trials: Sequence[TrialRecord]) -> tuple[float, float] | None:
    """Tokens per answer over the complete trials, of thoughts and of the answer itself.

    None where the model has no thoughts.
    """
    thoughts, answers = [], []
    for trial in trials:
        thought, answer = trial.mean_thought_tokens, trial.mean_answer_tokens
        if trial.state == "complete" and thought is not None and answer is not None:
            thoughts.append(thought)
            answers.append(answer)
    return (fmean(thoughts), fmean(answers)) if thoughts else None


def _part_names(trials: Sequence[TrialRecord]) -> list[str]:
    """The objective's parts, in the order of their first appearance."""
    names: dict[str, None] = {}
    for trial in trials:
        names |= dict.fromkeys(trial.parts)
    return list(names)
