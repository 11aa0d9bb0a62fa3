"""Where a config.json keeps what belongs to the text decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# the parts of a configuration that may hold the text decoder's
PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "layers")

# types of which another key counts the layers: here the first one counts both attentions of each
OWN_LAYERS = {"longcat_flash": "num_layers"}


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text decoder's part of a configuration; the whole where it has no such part."""
    for part in PARTS:
        inner = config.get(part)
        if isinstance(inner, Mapping) and inner:
            return text_config(inner)
    return config


def layers_key(config: Mapping[str, Any]) -> str | None:
    """The key of a text decoder's configuration that counts its layers; None where it has none."""
    own = OWN_LAYERS.get(str(config.get("model_type")))
    for key in LAYERS if own is None else (own, *LAYERS):
        if isinstance(config.get(key), int):
            return key
    return None


def with_text(config: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """The whole configuration with another one for its text decoder."""
    for part in PARTS:
        inner = config.get(part)
        if isinstance(inner, Mapping) and inner:
            return {**config, part: with_text(inner, text)}
    return dict(text)
