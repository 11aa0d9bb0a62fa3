"""What `show`, `search` and `cache` print of a study."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.console import plus_minus, put, size

if TYPE_CHECKING:
    from evomerge.api import LoadedStudy
    from evomerge.searching.records.trial_record import TrialRecord

WIDTH = 100  # columns of a sentence
HEADINGS = "trial  gen  idx  role       state     score            n   cut"


def print_trials(found: LoadedStudy) -> None:
    """The trials as a table."""
    put(HEADINGS)
    for record in found.records:
        mark = " <- winner" if record.number == found.winner.number else ""
        put(trial_line(record) + mark)


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


def cache_line(path: Path) -> str:
    """The size of an answer cache."""
    from evomerge.answering.cache import cache_size

    found = cache_size(path)
    if found is None:
        return "answer cache: none"
    n_bytes, batches = found
    content = "damaged" if batches is None else f"{batches} batches"
    return f"answer cache: {size(n_bytes)}, {content}, in {path}"
