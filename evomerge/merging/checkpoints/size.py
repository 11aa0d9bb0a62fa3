"""How large a model is, from its configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomerge.errors import ModelError


def count_parameters(config: Mapping[str, Any], where: object = None) -> int:
    """Parameters of the model that a config.json describes, tied ones once; no weights are made.

    Raises ModelError when transformers does not know the configuration.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        settings = dict(config)
        parsed = AutoConfig.for_model(settings.pop("model_type"), **settings)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(parsed)
    except Exception as error:  # KeyError, ValueError and others, by what is wrong in the file
        raise ModelError(
            f"no usable model configuration: {error}",
            where=where,
            remedy="Give the config.json of a causal LM.",
        ) from error
    return sum(p.numel() for p in model.parameters())


def kv_cache_bytes(config: Mapping[str, Any], tokens: int, bytes_per_number: int = 2) -> int:
    """Bytes of keys and values for `tokens` positions: 2 x layers x KV heads x head size each."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return (
        2
        * config["num_hidden_layers"]
        * (config.get("num_key_value_heads") or heads)
        * head_dim
        * bytes_per_number
        * tokens
    )
