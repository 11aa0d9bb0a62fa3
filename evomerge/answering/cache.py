"""The cache of answers: an SQLite file next to the study, keyed by whole batches.

A batch is kept as a whole or not at all, because the answers of a padded batch may depend on what
shares it.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from evomerge import sqlite_file
from evomerge.answering.engine import Answer, PromptSettings
from evomerge.answering.thoughts import Marks
from evomerge.errors import OutputError
from evomerge.recipe import Recipe
from evomerge.study import Study

SCHEMA = "CREATE TABLE IF NOT EXISTS batches (key TEXT PRIMARY KEY, answers TEXT NOT NULL)"
WHAT = "the answer cache"
DAMAGED = (
    "Finished trials are stored in the study: move the file away, and the same command generates "
    "the other answers again."
)
# Modes: what answers, with the same recipe and prompts.
MERGED = "merged"  # the live model, with the recipe's weights merged into it
ONE_PASS = "population"  # a batch of several candidates: a weight that is not merged is not rounded
LIKELIHOOD = "likelihood"  # no answer, but how likely a given continuation is
UNKEYED = ("batch_size", "batch_tokens", "residency")  # engine keys that change no answer


class AnswerCache:
    """Batches of answers by key; every write is durable when `put` returns."""

    def __init__(self, path: Path, scope: str, names: Mapping[str, str] | None = None) -> None:
        """`scope`: the rest of what answers depend on; see `cache_scope`.

        `names`: what the models are called in the keys, whatever they are called now.
        """
        self.path, self.scope, self.names = path, scope, dict(names or {})
        self.db = sqlite_file.connect(path, WHAT, DAMAGED, SCHEMA)

    def digest(self, recipe: Recipe) -> str:
        """The recipe's digest for keys, which is the same when a model's folder has moved."""
        return recipe.digest(self.names)

    def key(
        self,
        recipe: str,
        prompts: Sequence[str],
        mode: str = MERGED,
        settings: PromptSettings = None,
    ) -> str:
        """SHA-256 of scope, mode, recipe digest, the batch's prompts and their own settings."""
        parts: list[object] = [self.scope, mode, recipe, list(prompts)]
        if settings is not None:
            parts.append([own.made_from() for own in settings])
        return sha256(json.dumps(parts).encode()).hexdigest()

    def get(self, key: str, count: int | None = None) -> list[Answer] | None:
        """The batch's answers, `count` of them; None if they are missing or damaged.

        Raises OutputError.
        """
        try:
            row = self.db.execute("SELECT answers FROM batches WHERE key = ?", (key,)).fetchone()
            if row is None:
                return None
            found = [Answer(*fields) for fields in json.loads(row[0])]
        except (ValueError, TypeError):
            return None  # they are computed again
        except sqlite3.Error as error:
            raise sqlite_file.explained(error, WHAT, self.path, DAMAGED) from error
        return found if count in (None, len(found)) else None

    def put(self, key: str, answers: Sequence[Answer]) -> None:
        """Keep a batch. Raises OutputError, for example on a full disk."""
        try:
            text = json.dumps([_stored(answer) for answer in answers])
            self.db.execute("INSERT OR REPLACE INTO batches VALUES (?, ?)", (key, text))
        except sqlite3.Error as error:
            raise sqlite_file.explained(error, WHAT, self.path, DAMAGED) from error

    def close(self) -> None:
        """Close the file."""
        self.db.close()


def _stored(answer: Answer) -> list[object]:
    """An answer's fields; those of thoughts only where marks are known, as in older caches."""
    fields: list[object] = [answer.text, answer.truncated, answer.tokens]
    if answer.thought_tokens is not None:
        fields += [answer.thoughts, answer.thought_tokens]
    return fields


def cache_size(path: Path) -> tuple[int, int | None] | None:
    """(bytes, batches) of the cache in `path`; None if it does not exist.

    The batches are None when it cannot be read.
    """
    files = cache_files(path)
    if not files:
        return None
    size = sum(files.values())
    try:
        connect = sqlite_file.reader(path)
        with closing(connect()) as db:
            return size, int(db.execute("SELECT count(*) FROM batches").fetchone()[0])
    except (sqlite3.Error, OSError):
        return size, None


def clear(path: Path) -> int:
    """Delete the cache in `path`, which must not be in use; returns how many bytes that freed.

    Raises OutputError.
    """
    files = cache_files(path)
    try:
        for file in files:
            file.unlink()
    except OSError as error:
        raise OutputError(
            f"the answer cache cannot be deleted: {error.strerror}",
            where=path,
            remedy="Change the permissions.",
        ) from error
    return sum(files.values())


def cache_files(path: Path) -> dict[Path, int]:
    """The sizes in bytes of the database and of the files that SQLite keeps next to it."""
    files = [path.with_name(path.name + end) for end in ("", "-journal", "-wal", "-shm")]
    return {file: file.stat().st_size for file in files if file.is_file()}


def cache_scope(
    study: Study,
    models: Mapping[str, Any],
    first_engine: Mapping[str, Any] | None = None,
    marks: Marks | None = None,
) -> str:
    """SHA-256 of what answers depend on besides recipe, mode and prompts.

    A batch is identified by its prompts, however it was packed: see UNKEYED. `first_engine` holds
    the keys of `engine:` that have changed since the study began, as they were; `marks` are those
    that the engine takes for thoughts.
    """
    data = study.filled()
    engine = {key: value for key, value in data["engine"].items() if key not in UNKEYED}
    engine |= first_engine or {}
    search = data["search"]
    too_long = data["prompt"]["too_long"]
    parts = [
        study.generation.made_from(),
        too_long,
        engine,
        search["dtype"],
        search["seed"],
        models,
    ]
    variables = study.prompt.chat_template_kwargs
    if marks is not None or variables:  # answers of models without either keep their keys
        parts.append([None if marks is None else asdict(marks), variables])
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
