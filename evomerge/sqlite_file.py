"""SQLite files, opened and checked, and a one-line error for whatever can go wrong with them.

They may be locked, cut short, on a full disk, or in a read-only folder.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from evomerge.errors import OutputError

WAIT = 30.0  # seconds to wait for another process's transaction


def connect(
    path: Path, what: str, damaged: str, schema: str, any_thread: bool = False
) -> sqlite3.Connection:
    """An open, undamaged database with the schema's tables.

    `what` and `damaged` as in `explained`. Raises OutputError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_integrity(path)
        db = sqlite3.connect(
            path, timeout=WAIT, isolation_level=None, check_same_thread=not any_thread
        )
        db.executescript(schema)
    except (OSError, sqlite3.Error) as error:
        raise explained(error, what, path, damaged) from error
    return db


def check_integrity(path: Path) -> None:
    """Read the whole file, to find damage before work is lost on it. Raises sqlite3.Error."""
    if not path.exists():
        return
    with closing(sqlite3.connect(path, timeout=WAIT)) as db:
        found = db.execute("PRAGMA quick_check(1)").fetchone()
    if found is not None and found[0] != "ok":
        raise sqlite3.DatabaseError("database disk image is malformed")


def explained(
    error: BaseException, what: str, path: Path | str | None, damaged: str = ""
) -> OutputError:
    """The error of a file as a one-line OutputError.

    `what` names the file's content; `damaged` is the remedy where it is damaged. SQLite's own words
    decide: drivers and SQLAlchemy pass them on, but not always the error's number.
    """
    cause = (str(error).splitlines() or [type(error).__name__])[0][:120]
    again = "then run the same command"
    # "decode": it is not text, or not JSON
    unreadable = ("malformed", "not a database", "unsupported file format", "decode")
    if isinstance(error, ValueError) or any(words in cause for words in unreadable):
        return OutputError(f"{what} is damaged or cut short: {cause}", where=path, remedy=damaged)
    if "locked" in cause:
        remedy = (
            f"Wait for the process that holds it, or end it (`fuser {path}` names it), {again}."
        )
        return OutputError(
            f"{what} is in use by another process: {cause}", where=path, remedy=remedy
        )
    full = ("full", "disk i/o", "no space", "too large", "quota")
    refused = ("readonly", "read-only", "permission", "unable to open")
    if any(words in cause.lower() for words in refused):
        return OutputError(
            f"{what} cannot be written: {cause}",
            where=path,
            remedy=f"Change the permissions of file and folder, {again}.",
        )
    if any(words in cause.lower() for words in full):
        remedy = f"Free some space, {again}."
        return OutputError(f"{what} cannot be written: {cause}", where=path, remedy=remedy)
    remedy = damaged or f"Check the file and its folder, {again}."
    return OutputError(f"{what} cannot be used: {cause}", where=path, remedy=remedy)
