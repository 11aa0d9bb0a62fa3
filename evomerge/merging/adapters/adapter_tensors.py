"""The tensors of an adapter's file by what peft does with them: LoRAs, whole tensors, rows."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from dataclasses import dataclass, field

from evomerge.merging.adapters.adapter import Adapter

log = logging.getLogger(__name__)
PREFIX = "base_model.model."
PART = re.compile(
    r"^(.+)\.(lora_[AB]\.(?:weight|bias)|lora_embedding_[AB]|lora_magnitude_vector)(?:\.weight)?$"
)
TOKENS = re.compile(r"^(.+)\.token_adapter\.trainable_tokens_delta$")
# second copies of biases in a saved module, which `bias` adds
COPIES = re.compile(r"\.(modules_to_save|original_module)\..*bias$")
TOKEN_LAYER = ".token_adapter.base_layer."
# what only training needs, by the setting that adds it
TRAINING = {"velora_config": ".lora_velora_embed", "monteclora_config": ".lora_monteclora_sampler."}


@dataclass(frozen=True)
class AdapterTensors:
    """Names in the file, by those in the model."""

    loras: dict[str, dict[str, str]] = field(default_factory=dict)  # by module and part
    whole: dict[str, str] = field(default_factory=dict)  # by tensor
    rows: dict[str, str] = field(default_factory=dict)  # by module: of single tokens


def sort_tensors(adapter: Adapter, base: Collection[str], embeddings: str) -> AdapterTensors:
    """What the file holds for a base with tensors of these names and that module of embeddings.

    Raises ModelError for a tensor of another kind.
    """
    found = AdapterTensors()
    unused = []
    for key in adapter.shapes:
        if not key.startswith(PREFIX):
            raise adapter.error(f"tensor {key} is of a kind that is not supported")
        name = key.removeprefix(PREFIX)
        part, tokens = PART.match(name), TOKENS.match(name)
        plain = name.replace(TOKEN_LAYER, ".").replace(".base_layer.", ".")
        if COPIES.search(name) and adapter.config.get("bias", "none") != "none":
            continue
        if _is_unused(adapter, name, plain in base):
            unused.append(name)
        elif part:
            found.loras.setdefault(part[1], {})[part[2]] = key
        elif tokens:
            found.rows[tokens[1]] = key
        elif TOKEN_LAYER in name and not adapter.token_ids(plain.rpartition(".")[0], embeddings):
            # where peft's own merge fails: a saved head that shares the embeddings' rows
            raise adapter.error(f"`modules_to_save` and `trainable_token_indices` share {plain}")
        elif not any(mark in name and adapter.config.get(k) for k, mark in TRAINING.items()):
            found.whole[plain] = key
    if unused:
        log.warning(
            "%s: %d biases that its settings switch off are not used, as in peft (%s, …)",
            adapter.path,
            len(unused),
            unused[0],
        )
    return found


def _is_unused(adapter: Adapter, name: str, stored: bool) -> bool:
    """Whether peft has no place for a bias, with these settings and in a base that `stored` it."""
    if not name.endswith(".bias"):
        return False
    if name.endswith((".lora_A.bias", ".lora_B.bias")):
        return name.endswith("A.bias") or not adapter.config.get("lora_bias")
    return not stored and adapter.config.get("bias", "none") == "none"
