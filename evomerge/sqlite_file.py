"""SQLite files, opened and checked, and a one-line error for whatever can go wrong with them.

They may be locked, cut short, on a full disk, or in a read-only folder.
"""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from evomerge.errors import OutputError

WAIT = 30.0  # seconds to wait for another process's transaction
REFUSED = ("readonly", "read-only", "permission", "unable to open")  # of SQLite's words


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


def reader(path: Path) -> Callable[[], sqlite3.Connection]:
    """What opens the file for reading alone: neither it nor its folder is changed.

    A file that a killed process left with a journal, or whose writers use a write-ahead log, cannot
    be read without writing: a copy is, which goes when what is returned does. Raises OSError,
    sqlite3.Error.
    """

    def connect(address: str = f"{path.absolute().as_uri()}?mode=ro") -> sqlite3.Connection:
        return sqlite3.connect(address, uri=True, timeout=WAIT, check_same_thread=False)

    if not _has_log(path) or _beside(path, "-shm").exists():
        try:
            with closing(connect()) as db:
                db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            return connect
        except sqlite3.OperationalError as error:
            if not any(words in str(error) for words in REFUSED):
                raise
    folder = tempfile.TemporaryDirectory(prefix="evomerge-")
    for end in ("", "-journal", "-wal"):
        if _beside(path, end).exists():
            shutil.copyfile(_beside(path, end), Path(folder.name, path.name + end))

    def connect_copy() -> sqlite3.Connection:
        return sqlite3.connect(Path(folder.name, path.name), check_same_thread=False)

    return connect_copy


def _has_log(path: Path) -> bool:
    """Whether the file's writers use a write-ahead log: byte 18 of SQLite's file format."""
    with path.open("rb") as file:
        return file.read(19)[18:] == b"\x02"


def _beside(path: Path, end: str) -> Path:
    return path.with_name(path.name + end)


def check_integrity(path: Path, connect: Callable[[], sqlite3.Connection] | None = None) -> None:
    """Read the whole file, to find damage before work is lost on it. Raises sqlite3.Error.

    `connect` opens it, where it may only be read.
    """
    if not path.exists():
        return
    with closing(connect() if connect else sqlite3.connect(path, timeout=WAIT)) as db:
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
    if any(words in cause.lower() for words in REFUSED):
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
