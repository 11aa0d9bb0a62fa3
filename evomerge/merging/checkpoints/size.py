"""How large a model is, computed from its configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomerge.errors import ModelError
from evomerge.merging.checkpoints.config_defaults import config_value
from evomerge.merging.checkpoints.hub_kernels import without_attention


def count_parameters(config: Mapping[str, Any], where: object = None) -> int:
    """Parameters of the model that a config.json describes, tied ones counted once.

    No weights are made. Raises ModelError when transformers does not know the configuration.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    models: Any = AutoModelForCausalLM
    try:
        settings = without_attention(config)  # a kernel of the hub would be loaded
        parsed = AutoConfig.for_model(settings.pop("model_type"), **settings)
        with torch.device("meta"):
            model = models.from_config(parsed)
    except Exception as error:  # KeyError, ValueError and others, by what is wrong in the file
        raise ModelError(
            f"the model configuration cannot be used: {error}",
            where=where,
            remedy="Give the config.json of a causal LM.",
        ) from error
    return sum(int(parameter.numel()) for parameter in model.parameters())


def kv_cache_bytes(config: Mapping[str, Any], tokens: int, bytes_per_number: int = 2) -> int:
    """Bytes of keys and values for `tokens` positions: 2 x layers x KV heads x head size each."""
    heads = int(config["num_attention_heads"])
    head_dim = int(config_value(config, "head_dim") or config["hidden_size"] // heads)
    kv_heads = int(config_value(config, "num_key_value_heads") or heads)
    numbers = 2 * int(config["num_hidden_layers"]) * kv_heads * head_dim
    return numbers * bytes_per_number * tokens
