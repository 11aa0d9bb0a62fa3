"""A model folder's content as hashes, by which a study notices that its models have changed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomerge.merging.checkpoints.hub import PATTERNS


def fingerprint(folder: Path, known: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """File name -> {"size", "mtime_ns", "sha256"} of weights, configuration and tokenizer.

    A file whose size and time are in `known` is not read again: 26 GB take a minute.
    """
    known = known or {}
    prints: dict[str, dict[str, Any]] = {}
    paths: set[Path] = set()
    for pattern in PATTERNS:
        paths.update(folder.glob(pattern))
    for path in sorted(paths):
        if not path.is_file():  # a link that leads nowhere, or a folder
            continue
        stat = path.stat()
        old = known.get(path.name)
        if old is None or (old["size"], old["mtime_ns"]) != (stat.st_size, stat.st_mtime_ns):
            with path.open("rb") as file:
                old = {
                    "size": stat.st_size,
                    "mtime_ns": stat.st_mtime_ns,
                    "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
                }
        prints[path.name] = dict(old)
    return prints


def combined(prints: Mapping[str, Mapping[str, Any]]) -> str:
    """One SHA-256 over names and contents."""
    text = "\n".join(f"{name} {prints[name]['sha256']}" for name in sorted(prints))
    return hashlib.sha256(text.encode()).hexdigest()
