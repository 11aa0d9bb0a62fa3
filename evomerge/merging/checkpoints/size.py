"""How large a model is, computed from its configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomerge.errors import ModelError
from evomerge.merging.architecture.text_config import text_config
from evomerge.merging.checkpoints.config_defaults import config_value
from evomerge.merging.checkpoints.config_fault import config_error, made_without_weights
from evomerge.merging.checkpoints.model_folder import num_layers


def count_parameters(config: Mapping[str, Any], where: object = None) -> int:
    """Parameters of the model that a config.json describes, tied ones counted once.

    No weights are made. Raises ModelError when transformers cannot make the model.
    """
    try:
        model = made_without_weights(config)
    except Exception as error:  # KeyError, ValueError and others, by what is wrong in the file
        raise config_error(config, error, where) from error
    return sum(int(parameter.numel()) for parameter in model.parameters())


def kv_cache_bytes(config: Mapping[str, Any], tokens: int, bytes_per_number: int = 2) -> int:
    """Bytes of keys and values for `tokens` positions: 2 x layers x KV heads x head size each."""
    text = text_config(config)
    heads = int(config_value(text, "num_attention_heads") or 1)
    width = config_value(text, "hidden_size")
    if not isinstance(width, int):
        raise ModelError(
            "config.json does not say how wide the model is",
            found=width,
            remedy="Correct `hidden_size`.",
        )
    head_dim = int(config_value(text, "head_dim") or width // heads)
    kv_heads = config_value(text, "num_key_value_heads")
    if not isinstance(kv_heads, int):
        kv_heads = heads
    numbers = 2 * num_layers(config) * kv_heads * head_dim
    return numbers * bytes_per_number * tokens
