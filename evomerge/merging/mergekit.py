"""Recipes that only mergekit itself can merge: handed to it, when it is installed beside evomerge."""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from evomerge.console import duration, parse_size
from evomerge.errors import RunError
from evomerge.merging.checkpoints.new_folder import check_new, new_folder

MODULE = "mergekit.scripts.run_yaml"


def is_installed() -> bool:
    """Whether this Python can run mergekit."""
    try:
        return importlib.util.find_spec(MODULE) is not None
    except ModuleNotFoundError:  # no mergekit at all
        return False


def merge_with_mergekit(
    config: Path,
    out: Path,
    shard_size: str | int = "5GB",
    random_seed: int = 0,
    status: Callable[[str], None] | None = None,
) -> Path:
    """Let mergekit write the new folder `out`, which appears only when it is whole; `status` hears
    that it still runs.

    Raises InputError when `out` is there already, RunError with the last line of what mergekit said
    when it fails.
    """
    out = out.absolute()
    limit = parse_size(shard_size)  # plain bytes there too
    check_new(out)
    with new_folder(out) as unfinished:
        # the model card's title is the folder's name
        written = unfinished.path / ".mergekit" / out.name
        options = ["--out-shard-size", str(limit), "--random-seed", str(random_seed)]
        command = [sys.executable, "-m", MODULE, str(config.absolute()), str(written), *options]
        _run(command, unfinished.lock, status)
        for path in written.iterdir():
            path.rename(unfinished.path / path.name)
        written.rmdir()
        written.parent.rmdir()
    return out


def _run(command: list[str], lock: int, status: Callable[[str], None] | None) -> None:
    """The command holds the lock too: should we be killed, its folder is not taken for dead."""
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=[lock],
        text=True,
        errors="replace",
    )
    try:
        said: str | None = None
        while said is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                said, _ = process.communicate(timeout=1)
            if said is None and status is not None:
                status(f"mergekit is merging, {duration(time.monotonic() - began)}")
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        last = lines[-1] if lines else f"exit status {process.returncode}"
        raise RunError(f"mergekit failed: {last}", remedy="Try it alone: mergekit-yaml CONFIG OUT.")
