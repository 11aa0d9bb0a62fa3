"""What `show`, `search` and `cache` print of a study."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.cli.explaining import fit
from evomerge.console import plus_minus, put, size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from evomerge.api import LoadedStudy
    from evomerge.searching.records.front_record import Front, FrontPoint, FrontValue
    from evomerge.searching.records.trial_record import TrialRecord

WIDTH = 100  # columns of a sentence
NAME, CELL = 16, 23  # columns of the front's table, which has 80
HEADINGS = "trial  gen  idx  role       state     score            n   cut"


def print_trials(found: LoadedStudy) -> None:
    """The trials as a table."""
    from evomerge.reporting.trial_table import mean_tokens

    thinks = any(record.thought_tokens is not None for record in found.records)
    put(HEADINGS + (" think" if thinks else ""))
    for record in found.records:
        mark = " <- winner" if record.number == found.winner.number else ""
        put(trial_line(record) + (_thinking(record) if thinks else "") + mark)
    tokens = mean_tokens(found.records)
    if tokens is not None:
        put(f"tokens per answer: {tokens[0]:,.0f} of thoughts, {tokens[1]:,.0f} of the answer")


def _thinking(r: TrialRecord) -> str:
    """A trial's thought tokens per answer, in 6 columns."""
    mean = r.mean_thought_tokens
    if mean is None:
        return " " * 6
    return f" {mean:>5.0f}"


def trial_line(r: TrialRecord) -> str:
    """A row of the table; a failed trial shows its reason instead of a score.

    Generations and places in them count from 1, trials from 0, as in Optuna.
    """
    score = (r.reason or "")[:15]
    if r.score is not None:
        score = plus_minus(r.score, r.stderr)
    generation, index = ("" if count is None else count for count in r.place)
    return (
        f"{r.number:>5}  {generation:>3}  {index:>3}  {r.role:9}  {r.state:8}  {score:15}  "
        f"{r.n:>3}  {r.truncated:>4.0%}"
    )


def print_verdict(found: LoadedStudy) -> None:
    """The verdict with its paired differences and notes, or the best so far."""
    from evomerge.reporting.sentences import conclusion, short_title

    verdict, winner = found.verdict, found.winner
    named = f"trial {winner.number} ({found.unbeaten or winner.role})"
    if verdict is None:
        put(
            f"best so far: {named}, "
            f"{plus_minus(winner.score or 0.0, winner.stderr)} on its tasks; no verdict yet"
        )
        return
    put(f"verdict on {verdict.n} held-out tasks, metric {verdict.metric}; winner: {named}")
    for line in textwrap.wrap(conclusion(verdict), WIDTH):
        put(line)
    titles = {name: short_title(name) for name in verdict.candidates}
    width = max(12, *map(len, titles.values()))
    for name, c in verdict.candidates.items():
        line = f"  {titles[name]:{width}} {plus_minus(c.mean, c.stderr)}  cut {c.truncated:>4.0%}"
        paired = verdict.leads.get(name)
        if paired:
            interval = "(n = 1)"
            if paired.low is not None:
                interval = f"[{paired.low:+.3f}, {paired.high:+.3f}]"
            line += f"  winner ahead by {paired.diff:+.3f} {interval}"
        put(line)
    for sentence in found.notes:
        for line in textwrap.wrap(sentence, WIDTH):
            put(line)
    if verdict.front is not None:
        put()
        print_front(verdict.front)


def print_front(front: Front) -> None:
    """The front as a table of 80 columns: two objectives to a line."""
    tasks = "held-out tasks" if front.held_out else "search tasks"
    put(f"front of {len(front.points)} on the {tasks}; value and 95 % interval")
    titles = [f"max {name}" for name in front.maximize]
    titles += [f"min {name}" for name in front.minimize]
    _put_row(f"{'point':>5}  {'trial':>5}  {'':{NAME}}", titles)
    for number, point in enumerate(front.points, start=1):
        name = f"{point.name} (knee)" if number == front.knee else point.name
        _put_point(front, str(number), name, point)
    for point in front.compared:
        _put_point(front, "-", point.name, point)


def _put_point(front: Front, number: str, name: str, point: FrontPoint) -> None:
    cells = [value_cell(point.values.get(objective)) for objective in front.objectives]
    _put_row(f"{number:>5}  {point.trial:>5}  {fit(name, NAME)}", cells)


def _put_row(first: str, cells: Sequence[str]) -> None:
    for i in range(0, len(cells), 2):
        row = "  ".join(fit(cell, CELL) for cell in cells[i : i + 2])
        put(f"{first if i == 0 else '':{NAME + 14}}  {row}".rstrip())


def value_cell(value: FrontValue | None) -> str:
    """A value of an objective and its interval in at most 23 columns, or a dash."""
    if value is None:
        return "-"
    text = _figure(value.mean)
    if value.low is None or value.high is None:
        return text
    return f"{text} [{_figure(value.low)}, {_figure(value.high)}]"


def _figure(value: float) -> str:
    """Three decimals, fewer of larger numbers."""
    digits = 3 - min(3, max(0, len(str(int(abs(value)))) - 1))
    return f"{value:.{digits}f}"


def cache_line(path: Path) -> str:
    """The size of an answer cache."""
    from evomerge.answering.cache import cache_size

    found = cache_size(path)
    if found is None:
        return "answer cache: none"
    n_bytes, batches = found
    content = "damaged"
    if batches is not None:
        content = f"{batches} batches"
    return f"answer cache: {size(n_bytes)}, {content}, in {path}"
