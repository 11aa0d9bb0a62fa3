"""OUT.made: what a finished file was made from, so that it is never silently overwritten.

It lies beside the file and holds hashes only: of everything that the content depends on, by the
name that a message gives it, and of the content itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from evomerge.errors import InputError
from evomerge.files import replace_file

CHOICE = "Name another --out, or add --overwrite."


@dataclass(frozen=True)
class Made:
    """The record of a file; `whole` is False where some of it is still to be made."""

    facts: Mapping[str, str]
    content: str
    whole: bool = True


def is_finished(out: Path, facts: Mapping[str, str], what: str, going_on: bool = False) -> bool:
    """Whether `out` holds, whole, what these facts give; `what` it holds is for messages.

    `going_on`: there is a run to resume, which may have been killed while it replaced `out`. Raises
    InputError where `out` holds anything else.
    """
    if not out.is_file():  # whether a folder or a device will do is up to the writer
        return False
    made = _read(out)
    if made is None and going_on:
        return False
    if made is None:
        raise InputError(
            "exists already, and what it was made from is not known", where=out, remedy=CHOICE
        )
    changed = []
    for name, value in facts.items():
        if made.facts.get(name) != value:
            changed.append(name)
    if changed:
        listed = ", ".join(changed)
        raise InputError(
            f"holds {what} from another run (changed: {listed})", where=out, remedy=CHOICE
        )
    try:
        changed_since = made.content != hash_of_file(out)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=out, remedy=CHOICE) from error
    if changed_since:
        if going_on:
            return False
        raise InputError("was changed after it was written", where=out, remedy=CHOICE)
    return made.whole


def record_made(out: Path, facts: Mapping[str, str], whole: bool = True) -> None:
    """Write OUT.made beside `out`. Raises OutputError."""
    made = json.dumps(asdict(Made(dict(facts), hash_of_file(out), whole)), indent=1) + "\n"
    replace_file(_beside(out), lambda path: path.write_text(made, encoding="utf-8"))


def hash_of(value: object) -> str:
    """SHA-256 of a value's representation."""
    return hashlib.sha256(repr(value).encode("utf-8", "surrogatepass")).hexdigest()


def hash_of_file(path: Path) -> str:
    """SHA-256 of a file's content. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _beside(out: Path) -> Path:
    return out.with_name(f"{out.name}.made")


def _read(out: Path) -> Made | None:
    """The record of a file; None where there is none that can be read."""
    try:
        read = json.loads(_beside(out).read_text(encoding="utf-8"))
        return Made(dict(read["facts"]), str(read["content"]), read["whole"] is True)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
