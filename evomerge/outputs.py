"""The check that what a command writes destroys nothing that it reads.

Every command and function that writes where it is told to calls `check_outputs` before it begins.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from evomerge.errors import InputError

# files that loaders of models and knowledge bases find by themselves: a new one changes the input
FOUND_BY_LOADERS = (
    ".safetensors", ".bin", ".pt", ".gguf", ".json", ".model", ".jinja", ".txt", ".py", ".csv",
)  # fmt: skip
# what a command may go on with in a folder that it reads: answers and studies
RESUMED = (".jsonl", ".part", ".made", ".lock", ".pid", ".db", ".sqlite")

Places = Iterable[str | Path | None]


def check_outputs(*, files: Places = (), folders: Places = (), inputs: Places) -> None:
    """Raise InputError where a file or folder to be written is an input, or part of one.

    An input is a path, or a text that may also be a model's reference (`MODEL+ADAPTER`) or a hub
    name; texts that name nothing on this disk are skipped, and so is None everywhere. Links are
    followed, and names are compared as the file system compares them. `folders` are those that are
    made anew: they must not hold an input.
    """
    read = _on_disk(inputs)
    for file in _paths(files):
        for source in read:
            if is_same(file, source) or _belongs_to(file, source):
                raise InputError(
                    "would overwrite what this command reads",
                    where=file,
                    found=source,
                    remedy="Name another file to write.",
                )
    for folder in _paths(folders):
        for source in read:
            if any(is_same(folder, place) for place in (source, *_above(source))):
                raise InputError(
                    "holds what this command reads",
                    where=folder,
                    found=source,
                    remedy="Name a new folder to write.",
                )


def is_same(one: str, other: str) -> bool:
    """Whether two paths lead to one file or folder, through whatever links; also a future one."""
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):  # one of them is not there
        return os.path.realpath(one) == os.path.realpath(other)


def _belongs_to(file: str, folder: str) -> bool:
    """Whether writing the file would change a folder that is read: its files are, not those below.

    They may be links, as in the hub's cache.
    """
    if not os.path.isdir(folder):
        return False
    parents = {os.path.dirname(os.path.abspath(file)), os.path.dirname(os.path.realpath(file))}
    if any(is_same(parent, folder) for parent in parents):
        suffix = os.path.splitext(file)[1].casefold()
        return suffix in FOUND_BY_LOADERS or (os.path.exists(file) and suffix not in RESUMED)
    if not os.path.exists(file):
        return False
    try:
        entries = os.listdir(folder)
    except OSError:  # whoever reads it reports that
        return False
    return any(is_same(file, os.path.join(folder, entry)) for entry in entries)


def _above(path: str) -> list[str]:
    """The folders that hold a path, by its name and by what it links to."""
    named, linked = Path(os.path.abspath(path)), Path(os.path.realpath(path))
    return list(map(str, (*named.parents, *linked.parents)))


def _paths(places: Places) -> list[str]:
    return [os.path.expanduser(place) for place in places if place is not None]


def _on_disk(places: Places) -> list[str]:
    """The inputs as paths; of texts only those that are there, each part of a reference."""
    found: list[str] = []
    for place in places:
        if isinstance(place, Path):
            found.append(os.path.expanduser(place))
        elif place is not None:
            parts = [place, *(part.partition("@")[0] for part in place.split("+"))]
            found += filter(os.path.exists, map(os.path.expanduser, dict.fromkeys(parts)))
    return found
