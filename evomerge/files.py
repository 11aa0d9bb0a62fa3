"""Files that are written whole or not at all, and locks that end with their process."""

from __future__ import annotations

import errno
import glob
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from evomerge.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MARK = ".writing-"  # in the names of unfinished files, which begin with a dot


def replace_file(path: Path, write: Callable[[Path], object], make_folder: bool = True) -> Path:
    """Let `write` fill a temporary file, then rename it to `path`.

    Raises OutputError where the file cannot be written, for example on a full disk.
    """
    try:
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        replace_durably(path, write)
    except OSError as error:
        raise OutputError(
            f"cannot be written: {error.strerror}",
            where=path,
            remedy="Check the folder, its permissions and the disk, then run it again.",
        ) from error
    return path


def replace_durably(path: Path, write: Callable[[Path], object]) -> None:
    """`replace_file` for callers that report an OSError themselves.

    File and rename are on the disk when this returns; what killed processes left of the same file
    is removed. Raises OSError and leaves `path` as it was.
    """
    handle, temporary = _make_temporary(path)
    try:
        _remove_dead(path)
        write(temporary)
        sync_file(temporary)
        temporary.chmod(0o644)  # temporary files are private by default
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        if handle is not None:
            os.close(handle)
    sync_folder(path.parent)


def _make_temporary(path: Path) -> tuple[int | None, Path]:
    """A new file next to `path`, and its open handle, which holds a lock while its process lives.

    Windows renames no open file: no handle there.
    """
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}{MARK}")
        temporary = Path(name)
        if fcntl is None:
            os.close(handle)
            return None, temporary
        with suppress(OSError):  # without locks no file is considered dead
            fcntl.flock(handle, fcntl.LOCK_EX)
        if temporary.exists():
            return handle, temporary
        os.close(handle)  # another process considered it dead before it was locked


def _remove_dead(path: Path) -> None:
    """Remove temporary files of `path` that no living process holds."""
    if fcntl is None:
        return
    for dead in path.parent.glob(f".{glob.escape(path.name)}{MARK}*"):
        with suppress(OSError), dead.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            dead.unlink()


def name_file(unnamed: Path, path: Path) -> bool:
    """Give a finished file its name, durably, unless that name is taken; the old name goes.

    Returns whether it got the name. Raises OSError.
    """
    try:
        os.link(unnamed, path)  # unlike a rename, it replaces nothing
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if path.exists():
            return False
        unnamed.rename(path)
    finally:
        unnamed.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


def sync_file(path: Path) -> None:
    """Wait until the file is on the disk; some file systems report a full disk only now."""
    with path.open("r+b") as file:  # Windows syncs only what is open for writing
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the folder's list of names is on the disk, where the system can say so."""
    if os.name != "posix":  # Windows cannot open a folder, and needs no such step
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network drives
            raise
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Wait until all that is in the folder is on the disk."""
    for place, _, names in os.walk(folder):
        for name in names:
            sync_file(Path(place, name))
        sync_folder(Path(place))


class LockHeld(Exception):
    """Another holder has the lock. `holder` is "pid N", or empty where that cannot be read."""

    def __init__(self, holder: str) -> None:
        super().__init__(holder)
        self.holder = holder


class ExclusiveLock:
    """The lock on a file that one holder has at a time, in this process or another.

    The system drops it when the process ends, however it ends. The holder's process id is in a file
    of its own, because a locked file cannot be read on Windows.
    """

    def __init__(self, path: Path) -> None:
        """Take the lock immediately. Raises LockHeld, and OSError where no lock can be made."""
        self._path = path
        self._holder = path.with_name(f"{path.name}.pid")
        self._lock = FileLock(path, timeout=0, thread_local=False)
        try:
            self._lock.acquire()
        except Timeout:
            raise LockHeld(self._read_holder()) from None
        with suppress(OSError):  # on a full disk the lock holds without its description
            self._holder.write_text(f"pid {os.getpid()}", encoding="ascii")

    def __enter__(self) -> ExclusiveLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def check(self) -> None:
        """Nothing: the system does not give a lock away while its holder lives."""

    def release(self) -> None:
        """Release the lock and remove its files, where the system allows that."""
        # before the release: afterwards the files may be another holder's
        for path in (self._holder, self._path):
            with suppress(OSError):
                path.unlink()
        self._lock.release()

    def _read_holder(self) -> str:
        try:
            return self._holder.read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError):
            return ""


def is_locked(path: Path) -> bool:
    """Whether another process holds the `ExclusiveLock` on a file, which is not changed."""
    try:
        import fcntl
    except ImportError:  # Windows: the holder removes the file when it is done
        return path.exists()
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(file)
    return False
