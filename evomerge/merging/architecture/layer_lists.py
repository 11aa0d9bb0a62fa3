"""The settings of a config.json that are lists with an item for each layer, stated or implied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomerge.merging.architecture.empty_model import parsed_config
from evomerge.merging.architecture.text_config import layers_key, text_config, with_text

BY_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")


def lists_by_layer(config: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The lists that transformers makes of a config.json for its text decoder, by their keys.

    Gemma 2's and 3's files mostly say nothing of them: the class then draws a pattern over the
    layers. None for a type that transformers does not know.
    """
    made = parsed_config(config)
    if made is None:
        return {}
    found = {}
    for key in BY_LAYER:
        values = getattr(made.get_text_config(decoder=True), key, None)
        if isinstance(values, list):
            found[key] = list(values)
    return found


def implied_lists(config: Mapping[str, Any], n_layers: int) -> dict[str, list[Any]]:
    """Those that a config.json does not state, for a model with so many layers instead."""
    text = dict(text_config(config))
    text[layers_key(text) or "num_hidden_layers"] = n_layers
    lists = lists_by_layer(with_text(config, text))
    return {key: values for key, values in lists.items() if text.get(key) is None}
