"""Grades already paid for: an SQLite file of its own beside the study, and what they have cost.

A vote is one grade that a judge gave; it is kept in the same transaction as its cost, once, and
never changed.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from evomerge import sqlite_file
from evomerge.answering.engine import Answer
from evomerge.judging.llm.rubric import Reading
from evomerge.tasks import Task

SCHEMA = """
CREATE TABLE IF NOT EXISTS votes (key TEXT, vote INTEGER, grade INTEGER NOT NULL, reason TEXT NOT NULL, PRIMARY KEY (key, vote));
CREATE TABLE IF NOT EXISTS spent (id INTEGER PRIMARY KEY CHECK (id = 1), requests INTEGER, prompt_tokens INTEGER, reply_tokens INTEGER);
INSERT OR IGNORE INTO spent VALUES (1, 0, 0, 0);
"""

WHAT = "the grades cache"
DAMAGED = "Finished trials are kept in the study: move the file away, and the same command asks anew for the grades that are left."


@dataclass(frozen=True)
class Spent:
    """What was asked so far: requests sent, tokens of prompts and of replies."""

    requests: int = 0
    prompt_tokens: int = 0
    reply_tokens: int = 0

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.reply_tokens + other.reply_tokens,
        )

    def __sub__(self, other: Spent) -> Spent:
        return self + Spent(-other.requests, -other.prompt_tokens, -other.reply_tokens)


class GradesCache:
    """Votes by judge, rubric, task and answer; safe among threads, durable when a call returns."""

    def __init__(self, path: Path | None) -> None:
        """None keeps everything in memory. Raises OutputError."""
        self.lock = threading.Lock()
        self.path = path
        self.db = sqlite_file.connect(
            path or Path(":memory:"), WHAT, DAMAGED, SCHEMA, any_thread=True
        )

    def get(self, keys: Sequence[str], votes: int) -> list[dict[int, Reading]]:
        """For each key, the votes 0 to `votes` - 1 that are there. Waits for a write under way
        once, not for each key.
        """
        query = "SELECT vote, grade, reason FROM votes WHERE key = ? AND vote < ?"
        with self._open():
            found = [self.db.execute(query, (key, votes)).fetchall() for key in keys]
        return [{vote: Reading(grade, reason) for vote, grade, reason in rows} for rows in found]

    def put(
        self, cost: Spent, key: str = "", vote: int = 0, reading: Reading | None = None
    ) -> None:
        """Keep what a request has cost, and the vote that it gave if it gave one. Raises
        OutputError, on a full disk for example.
        """
        with self._open(), self.db:
            self.db.execute("BEGIN IMMEDIATE")
            self.db.execute(
                "UPDATE spent SET requests = requests + ?, prompt_tokens = prompt_tokens + ?, reply_tokens = reply_tokens + ?",
                (cost.requests, cost.prompt_tokens, cost.reply_tokens),
            )
            if reading is not None:
                self.db.execute(
                    "INSERT OR IGNORE INTO votes VALUES (?, ?, ?, ?)",
                    (key, vote, reading.grade, reading.reason),
                )

    @property
    def spent(self) -> Spent:
        with self._open():
            return Spent(
                *self.db.execute(
                    "SELECT requests, prompt_tokens, reply_tokens FROM spent"
                ).fetchone()
            )

    @contextmanager
    def _open(self) -> Iterator[None]:
        """One thread at a time; SQLite's errors in words of ours."""
        try:
            with self.lock:
                yield
        except sqlite3.Error as error:
            raise sqlite_file.explained(error, WHAT, self.path, DAMAGED) from error

    def close(self) -> None:
        with self.lock:
            self.db.close()


def grade_key(judge: str, rubric: str, task: Task, answer: Answer) -> str:
    """SHA-256 of all that a grade depends on; `judge` is the model and its settings, `rubric` the
    prompt's digest.
    """
    parts = [
        judge,
        rubric,
        task.input,
        task.output,
        task.eval_aspect,
        answer.text,
        answer.truncated,
    ]
    return sha256(json.dumps(parts).encode()).hexdigest()
