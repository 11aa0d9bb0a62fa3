"""The cache of grades and their cost: an SQLite file next to the study's.

A vote is one grade that a judge gave. It is stored once, in the same transaction as its cost, and
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
from evomerge.judging.llm.judge_prompt import Vote
from evomerge.tasks import Task

SCHEMA = """
CREATE TABLE IF NOT EXISTS votes (
    key TEXT, vote INTEGER, grade INTEGER NOT NULL, reason TEXT NOT NULL, PRIMARY KEY (key, vote)
);
CREATE TABLE IF NOT EXISTS spent (
    id INTEGER PRIMARY KEY CHECK (id = 1), requests INTEGER, prompt_tokens INTEGER,
    reply_tokens INTEGER
);
INSERT OR IGNORE INTO spent VALUES (1, 0, 0, 0);
"""

WHAT = "the grades cache"
DAMAGED = (
    "Finished trials are stored in the study: move the file away, and the same command requests "
    "the remaining grades again."
)


@dataclass(frozen=True)
class Usage:
    """What a server was used for: requests, and tokens of prompts and of replies."""

    requests: int = 0
    prompt_tokens: int = 0
    reply_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.reply_tokens + other.reply_tokens,
        )

    def __sub__(self, other: Usage) -> Usage:
        return self + Usage(-other.requests, -other.prompt_tokens, -other.reply_tokens)


class GradesCache:
    """Votes by judge, rubric, task and answer; safe among threads, durable when a call returns."""

    def __init__(self, path: Path | None) -> None:
        """None keeps everything in memory. Raises OutputError."""
        self.lock = threading.Lock()
        self.path = path
        self.db = sqlite_file.connect(
            path or Path(":memory:"), WHAT, DAMAGED, SCHEMA, any_thread=True
        )

    def get(self, keys: Sequence[str], votes: int) -> list[dict[int, Vote]]:
        """The stored votes among 0 to `votes` - 1, for each key."""
        query = "SELECT vote, grade, reason FROM votes WHERE key = ? AND vote < ?"
        with self._open():
            found = [self.db.execute(query, (key, votes)).fetchall() for key in keys]
        return [{vote: Vote(grade, reason) for vote, grade, reason in rows} for rows in found]

    def put(self, usage: Usage, key: str = "", number: int = 0, vote: Vote | None = None) -> None:
        """Store what a request used and the vote it gave, if any. Raises OutputError."""
        with self._open(), self.db:
            self.db.execute("BEGIN IMMEDIATE")
            self.db.execute(
                "UPDATE spent SET requests = requests + ?, prompt_tokens = prompt_tokens + ?, "
                "reply_tokens = reply_tokens + ?",
                (usage.requests, usage.prompt_tokens, usage.reply_tokens),
            )
            if vote is not None:
                self.db.execute(
                    "INSERT OR IGNORE INTO votes VALUES (?, ?, ?, ?)",
                    (key, number, vote.grade, vote.reason),
                )

    @property
    def spent(self) -> Usage:
        """What all requests used so far, in this run and earlier ones."""
        query = "SELECT requests, prompt_tokens, reply_tokens FROM spent"
        with self._open():
            return Usage(*self.db.execute(query).fetchone())

    @contextmanager
    def _open(self) -> Iterator[None]:
        """Use the database, one thread at a time; SQLite's errors become OutputError."""
        try:
            with self.lock:
                yield
        except sqlite3.Error as error:
            raise sqlite_file.explained(error, WHAT, self.path, DAMAGED) from error

    def close(self) -> None:
        with self.lock:
            self.db.close()


def grade_key(judge: str, rubric: str, task: Task, answer: Answer) -> str:
    """SHA-256 of everything a grade depends on.

    `judge` is the model with its settings, `rubric` the prompt's digest.
    """
    asked = [judge, rubric, task.input, task.output, task.eval_aspect]
    parts = [*asked, answer.text, answer.truncated]
    return sha256(json.dumps(parts).encode()).hexdigest()
