"""Attention kernels on the hub that a config.json names: code that transformers would run."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from evomerge.errors import ModelError
from evomerge.merging.architecture.empty_model import ATTENTION_KEYS

# a package that has "flash_attention_2" and the like; without one, transformers takes a kernel
FLASH = ("flash_attn", "flash_attn_interface", "flash_attn_3")


def refuse_hub_kernels(config: Mapping[str, Any], where: Path) -> None:
    """Raise ModelError for a configuration with which transformers would download a kernel."""
    for name in _attentions(config):
        if "/" in name or _becomes_kernel(name):
            raise ModelError(
                "`attn_implementation` names a kernel on the hub, which is code that would be run",
                where=where / "config.json",
                found=name,
                remedy="Remove the key, or set engine.trust_remote_code: true.",
            )


def _attentions(config: Mapping[str, Any]) -> Iterator[str]:
    """Every name that those keys hold, of the whole model or of its parts."""
    waiting: list[tuple[object, bool]] = [(config, False)]
    while waiting:
        value, named = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [(item, named or key in ATTENTION_KEYS) for key, item in value.items()]
        elif named and isinstance(value, str):
            yield value


def _becomes_kernel(name: str) -> bool:
    is_flash = name.removeprefix("paged|").startswith("flash_attention")
    if not is_flash or importlib.util.find_spec("kernels") is None:
        return False
    return not any(importlib.util.find_spec(package) for package in FLASH)
