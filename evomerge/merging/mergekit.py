"""Recipes that only mergekit can merge are handed to it, where it is installed as well."""

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
# `python -m MODULE` that holds a lock on its folder: it may outlive us, if we are killed
LAUNCH = f"""
import pathlib, runpy, sys
from evomerge.files import ExclusiveLock
with ExclusiveLock(pathlib.Path(sys.argv.pop(1))):
    runpy.run_module({MODULE!r}, run_name="__main__", alter_sys=True)
"""


def is_installed() -> bool:
    """Whether this Python can run mergekit."""
    try:
        return importlib.util.find_spec(MODULE) is not None
    except ModuleNotFoundError:  # mergekit is not installed
        return False


def merge_with_mergekit(
    config: Path,
    out: Path,
    shard_size: str | int = "5GB",
    random_seed: int = 0,
    status: Callable[[str], None] | None = None,
) -> Path:
    """Let mergekit write the new folder `out`, which appears only when it is complete.

    `status` gets a line every second. Raises InputError when `out` exists, RunError with the last
    line of mergekit's output when it fails.
    """
    out = out.absolute()
    limit = parse_size(shard_size)  # plain bytes there too
    check_new(out)
    with new_folder(out) as unfinished:
        # the model card's title is the folder's name
        written = unfinished.path / ".mergekit" / out.name
        options = ["--out-shard-size", str(limit), "--random-seed", str(random_seed)]
        launch = [sys.executable, "-c", LAUNCH, str(unfinished.helper_lock)]
        _run([*launch, str(config.absolute()), str(written), *options], status)
        for path in written.iterdir():
            path.rename(unfinished.path / path.name)
        written.rmdir()
        written.parent.rmdir()
    return out


def _run(command: list[str], status: Callable[[str], None] | None) -> None:
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        output: str | None = None
        while output is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                output, _ = process.communicate(timeout=1)
            if output is None and status is not None:
                status(f"mergekit is merging, {duration(time.monotonic() - began)}")
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        last = lines[-1] if lines else f"exit status {process.returncode}"
        raise RunError(f"mergekit failed: {last}", remedy="Try it alone: mergekit-yaml CONFIG OUT.")
