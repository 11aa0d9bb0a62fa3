"""References to models and adapters: a folder here, or a name on the Hugging Face hub."""

from __future__ import annotations

import logging
from pathlib import Path

from evomerge.errors import ModelError

log = logging.getLogger(__name__)
PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.model")


def find_folder(ref: str, kind: str, remedy: str) -> Path:
    """The folder that a path names, or that a hub name is downloaded to.

    Raises ModelError, in whose text the folder is one of this `kind`: "model" or "adapter".
    """
    path = Path(ref).expanduser()
    if path.is_dir():
        return path
    folder, _, revision = ref.rpartition("@")
    if folder and Path(folder).expanduser().is_dir():
        # as in mergekit, whose references may all end in a revision
        log.warning("%s: a folder has no revisions, so @%s changes nothing", folder, revision)
        return Path(folder).expanduser()
    is_name = ref.partition("@")[0].count("/") == 1 and not ref.startswith((".", "/", "~"))
    if path.exists() or not is_name:
        raise ModelError(f"there is no such {kind} folder", where=ref, remedy=remedy)
    return download(ref)


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
