"""A folder that is written whole or not at all, even by a process that is killed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from evomerge.errors import InputError, OutputError
from evomerge.files import ExclusiveLock, LockHeld, sync_folder, sync_tree

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MARK = ".merging-"  # in the names of unfinished folders, which begin with a dot
LOCK, HELPER_LOCK = "maker.lock", "helper.lock"


@dataclass(frozen=True)
class Unfinished:
    """A folder that is being filled: `path`, within a hidden folder that also holds its locks.

    Locks of living processes keep it from being removed. A process that helps to fill it takes
    `helper_lock`, so that it may outlive the one that began.
    """

    path: Path
    lock: ExclusiveLock | None  # None: on a file system without locks no folder is considered dead

    @property
    def helper_lock(self) -> Path:
        """The lock file for another process that fills the folder."""
        return self.path.parent / HELPER_LOCK


def check_new(out: Path) -> None:
    """Raise InputError when `out` exists and is not empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        _remove_dead(out)  # of a process that was killed when it had just finished
        raise InputError(
            "already exists", where=out, remedy="Name a new folder, or remove this one."
        )


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Unfinished]:
    """A temporary folder next to `out`, which is renamed to it when the block ends well.

    Otherwise it is removed, with the parents made for it. What killed processes left of the same
    `out` is removed first. An OSError in the block becomes an OutputError.
    """
    made = [folder for folder in out.parents if not folder.exists()]  # innermost first
    unfinished: Unfinished | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_dead(out)
        unfinished = _make(out)
        yield unfinished
        sync_tree(unfinished.path)
        if out.exists():
            out.rmdir()
        unfinished.path.rename(out)
        for folder in (out, *made):
            sync_folder(folder.parent)
        made = []
    except OSError as error:
        room = "Name another folder"
        if error.errno in FULL:
            room = "Free some space"
        raise OutputError(
            f"the model cannot be written: {error.strerror or error}",
            where=out,
            remedy=f"{room}; nothing was left behind.",
        ) from error
    finally:
        if unfinished is not None:
            _discard(unfinished)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _make(out: Path) -> Unfinished:
    while True:
        hidden = Path(tempfile.mkdtemp(prefix=f".{out.name}{MARK}", dir=out.parent))
        try:
            lock = ExclusiveLock(hidden / LOCK)
        except LockHeld:
            continue  # another process considered it dead before it was locked
        except OSError:
            lock = None
        path = hidden / "model"
        try:
            path.mkdir()
        except FileNotFoundError:
            if lock is not None:
                lock.release()
            continue  # the same, but it has already removed the folder
        path.chmod(0o755)
        return Unfinished(path, lock)


def _discard(unfinished: Unfinished) -> None:
    """Remove all but the lock while it is held, then the rest."""
    shutil.rmtree(unfinished.path, ignore_errors=True)
    if unfinished.lock is not None:
        unfinished.lock.release()
    shutil.rmtree(unfinished.path.parent, ignore_errors=True)


def _remove_dead(out: Path) -> None:
    """Remove folders that no living process holds; the system drops a dead one's locks."""
    for hidden in out.parent.iterdir():
        if hidden.name.startswith(f".{out.name}{MARK}") and hidden.is_dir():
            _remove_unless_held(hidden)


def _remove_unless_held(hidden: Path) -> None:
    try:
        with ExclusiveLock(hidden / LOCK), ExclusiveLock(hidden / HELPER_LOCK):
            shutil.rmtree(hidden, ignore_errors=True)
    except (OSError, LockHeld):
        return
    if os.name == "nt":  # where a lock file that is held cannot be removed
        shutil.rmtree(hidden, ignore_errors=True)
