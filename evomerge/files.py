"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from evomerge.errors import OutputError


def replace_file(path: Path, write: Callable[[Path], object], make_folder: bool = True) -> Path:
    """Let `write` fill a temporary file, then rename it to `path`. Raises OutputError on a full
    disk.
    """
    try:
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o644)  # temporary files are private by default
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot be written: {error.strerror}",
            where=path,
            remedy="Check the folder, its rights and the disk, then run it again.",
        ) from error
    return path
