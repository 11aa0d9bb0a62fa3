"""The files of a model folder from anywhere: what may be read, and what may be copied."""

from __future__ import annotations

import logging
import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path

from evomerge.errors import ModelError
from evomerge.files import is_there
from evomerge.yaml_json import LARGEST_JSON, parse_json, read_text

log = logging.getLogger(__name__)

# what a tokenizer and its settings are stored in, under these names exactly
NAMED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "tiktoken.model",
    "chat_template.jinja",
    "chat_template.json",
)
TEMPLATES = "additional_chat_templates"


def check_files(folder: Path) -> None:
    """Raise ModelError where the folder holds what is neither a file nor a folder.

    Reading a named pipe would wait for ever, and a device may never end.
    """
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise ModelError(
            f"the folder cannot be read: {error.strerror}",
            where=folder,
            remedy="Check its permissions.",
        ) from error
    for path in paths:
        try:
            mode = path.stat().st_mode
        except OSError:
            continue  # a link that leads nowhere; whoever needs it says so
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise ModelError(
                "is a named pipe, a device or a socket, which no model contains",
                where=path,
                remedy="Remove it.",
            )


def read_json(file: Path, remedy: str) -> object:
    """What a JSON file of a model holds. Raises ModelError, and FileNotFoundError."""
    if not is_there(file):
        raise FileNotFoundError(file)
    try:
        text = read_text(file, LARGEST_JSON, ModelError, remedy)
        content: object = parse_json(text, file, ModelError, remedy)
    except ModelError as error:
        what = f"{file.name} cannot be read: {error.what}"
        raise ModelError(what, where=file.parent, remedy=remedy) from error
    return content


def copy_files(folder: Path, patterns: Sequence[str], out: Path) -> None:
    """Copy what the patterns match and `out` does not have yet, folders with all that they hold.

    A link that leads out of the folder is not followed: copying it would publish what is not the
    model's. Raises ModelError for one that the model is not whole without, and OSError.
    """
    links = _links_out(folder, patterns)
    for link in links:
        if link.name in NAMED:
            raise _refusal(link)
        log.warning("%s is a link that leads out of the model's folder: it is not copied", link)
    for file in _matching(folder, patterns):
        copy = out / file.relative_to(folder)
        if file.is_file() and file not in links and not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


def check_links(folder: Path) -> None:
    """Raise ModelError where transformers would read a tokenizer from outside of the folder."""
    for link in _links_out(folder, (*NAMED, TEMPLATES)):
        raise _refusal(link)


def _links_out(folder: Path, patterns: Sequence[str]) -> set[Path]:
    """The files among those that lie elsewhere.

    The hub's cache, whose folders are links to its blobs, is the model's own; and so is a link
    under one of the usual names to a file of that same name.
    """
    real = folder.resolve()
    own = [real]
    if real.parent.name == "snapshots":
        own.append(real.parent.parent / "blobs")
    links = set()
    for file in _matching(folder, patterns):
        place = file.resolve()
        same_named = file.name in NAMED and place.name == file.name
        if not same_named and not any(place.is_relative_to(root) for root in own):
            links.add(file)
    return links


def _refusal(link: Path) -> ModelError:
    return ModelError(
        "is a link to another file outside of the model's folder, and is not followed",
        where=link,
        found=str(link.resolve()),
        remedy="Put a copy of the file in its place.",
    )


def _matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """The files that the patterns match, and those in the folders that they match."""
    found = []
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            if path.is_symlink() or not path.is_dir():
                found.append(path)
                continue
            for place, _, names in os.walk(path):
                found += [Path(place, name) for name in sorted(names)]
    return found
