"""Opening the tokenizer of a folder or a hub model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from evomerge.errors import ModelError
from evomerge.merging.checkpoints.model_kind import blame_config

FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
PACKAGES = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}


def open_tokenizer(
    name: str,
    where: object,
    remedy: str = "Copy or download its files again.",
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """What transformers makes of a folder or a hub name. Raises ModelError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
        if tokenizer.chat_template is None:
            tokenizer.chat_template = _processor_template(Path(name))
        return tokenizer
    except Exception as error:
        # OSError, ValueError, KeyError and others, by what is wrong in the files
        _check_config(Path(name))
        reason = str(error)
        missing = _missing_packages(Path(name))
        if missing:
            reason = f"to read its SentencePiece model, transformers needs {' and '.join(missing)}"
            remedy = f"Run pip install {' '.join(missing)}."
        raise ModelError(
            f"the tokenizer cannot be loaded: {reason}", where=where, remedy=remedy
        ) from error


def _check_config(folder: Path) -> None:
    """Raise ModelError where the fault is in config.json, which transformers reads first."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if isinstance(config, dict):
        blame_config(config, folder)


def _processor_template(folder: Path) -> str | None:
    """The chat template of a folder whose processor alone has one, in the file that it once had."""
    file = folder / "chat_template.json"
    if not file.is_file():
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    template = None
    if isinstance(content, dict):
        template = content.get("chat_template")
    return template if isinstance(template, str) else None


def _missing_packages(folder: Path) -> list[str]:
    """What is not installed of that by which a folder's tokenizer would be read."""
    stored = [file for file in SENTENCEPIECE if (folder / file).is_file()]
    if not stored or (folder / "tokenizer.json").is_file():
        return []
    return [package for module, package in PACKAGES.items() if not _is_installed(module)]


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package above it
        return False
