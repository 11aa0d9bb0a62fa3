"""References to models and adapters: a folder here, or a name on the Hugging Face hub."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

from evomerge.errors import ModelError
from evomerge.files import is_folder, is_there

log = logging.getLogger(__name__)
PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.model")


def find_folder(ref: str, kind: str, remedy: str) -> Path:
    """The folder that a path names, or that a hub name is downloaded to.

    Raises ModelError, in whose text the folder is one of this `kind`: "model" or "adapter".
    """
    path = local_path(ref)
    if is_folder(path):
        return path
    folder, _, revision = ref.rpartition("@")
    if folder and is_folder(local_path(folder)):
        # as in mergekit, whose references may all end in a revision
        log.warning("%s: a folder has no revisions, so @%s changes nothing", folder, revision)
        return local_path(folder)
    is_name = ref.partition("@")[0].count("/") == 1 and not ref.startswith((".", "/", "~"))
    if is_there(path):
        raise ModelError(f"is not a {kind} folder", where=ref, remedy=remedy)
    if not is_name:
        raise ModelError(f"there is no such {kind} folder", where=ref, remedy=remedy)
    return download(ref)


def local_path(ref: str) -> Path:
    """The path that a reference would be, with ~ replaced if there is such a user."""
    with suppress(RuntimeError):
        return Path(ref).expanduser()
    return Path(ref)


def download(name: str) -> Path:
    """A hub name, `owner/name` or `owner/name@revision`, as a local folder. Raises ModelError."""
    from huggingface_hub import snapshot_download

    try:
        owner_name, _, revision = name.partition("@")
        return Path(
            snapshot_download(owner_name, revision=revision or None, allow_patterns=list(PATTERNS))
        )
    except Exception as error:  # the client raises its own errors, httpx's and OSError
        raise ModelError(
            f"cannot be fetched from the hub ({type(error).__name__})",
            where=name,
            remedy="Check the name and the network, or name a folder.",
        ) from error
