"""A folder that is written whole or not at all, even by a process that is killed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from evomerge.errors import InputError, OutputError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MARK = ".merging-"  # in the names of unfinished folders, which begin with a dot


@dataclass(frozen=True)
class Unfinished:
    """A folder that is being filled. `lock`: its open descriptor, locked for as long as some
    process holds it.
    """

    path: Path
    lock: int


def check_new(out: Path) -> None:
    """Raise InputError when `out` is there already and holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(
            "is there already", where=out, remedy="Name a new folder, or remove this one."
        )


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Unfinished]:
    """A temporary folder beside `out`: renamed to it when the block ends well, else removed, with
    the parents made for it.

    What killed processes left of the same `out` is removed first. An OSError in the block becomes
    an OutputError.
    """
    made = [folder for folder in out.parents if not folder.exists()]  # innermost first
    unfinished: Unfinished | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_dead(out)
        unfinished = _make(out)
        yield unfinished
        unfinished.path.chmod(0o755)  # temporary folders are private by default
        if out.exists():
            out.rmdir()
        unfinished.path.rename(out)
        made = []
    except OSError as error:
        remedy = (
            "Free some space; nothing was left behind."
            if error.errno in FULL
            else "Name another folder; nothing was left behind."
        )
        raise OutputError(
            f"the model cannot be written: {error.strerror or error}", where=out, remedy=remedy
        ) from error
    finally:
        if unfinished is not None:
            shutil.rmtree(unfinished.path, ignore_errors=True)
            os.close(unfinished.lock)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _make(out: Path) -> Unfinished:
    while True:
        path = Path(tempfile.mkdtemp(prefix=f".{out.name}{MARK}", dir=out.parent))
        lock = os.open(path, os.O_RDONLY)
        # a file system without locks: then nothing is ever taken for dead
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.exists():  # else another process took it for dead before it was locked
            return Unfinished(path, lock)
        os.close(lock)


def _remove_dead(out: Path) -> None:
    """Folders that no living process holds; the system drops a dead one's locks."""
    for path in out.parent.iterdir():
        if not path.name.startswith(f".{out.name}{MARK}") or not path.is_dir():
            continue
        with contextlib.suppress(OSError):
            lock = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)
