"""The config.json of a merged model: the donor's, with what the merge changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomerge.errors import RecipeError
from evomerge.merging.architecture.architecture import class_name, misfits_of
from evomerge.merging.architecture.described import LAST_SLICE
from evomerge.merging.architecture.empty_model import empty_model
from evomerge.merging.architecture.layer_lists import BY_LAYER, implied_lists, lists_by_layer
from evomerge.merging.architecture.roles import Role
from evomerge.merging.architecture.text_config import layers_key, text_config, with_text
from evomerge.merging.checkpoints.model_folder import num_layers
from evomerge.merging.stream import MergePlan

# numbers of tokens beside `vocab_size`
VOCABULARY_SIZES = {"vocab_size_per_layer_input"}


def merged_config(plan: MergePlan) -> dict[str, Any]:
    """The donor's configuration; only dtype, layers, vocabulary and class may change."""
    config = dict(plan.donor.config)
    # of a model whose tensors are plain numbers all the same; so are the merged ones
    config.pop("quantization_config", None)
    if plan.recipe.architecture is not None:
        config["architectures"] = [plan.recipe.architecture]
    dtype = plan.recipe.out_dtype or plan.recipe.dtype
    if dtype is not None:
        config = _in_dtype(config, dtype)
        if "torch_dtype" in config:
            config["torch_dtype"] = dtype
        if "dtype" in config or "torch_dtype" not in config:
            config["dtype"] = dtype
    if plan.layout.restacked:
        config = with_text(config, _restacked(plan, text_config(config)))
    if plan.unties:
        config["tie_word_embeddings"] = False
    if plan.vocabulary is not None:
        config = plan.vocabulary.move_ids(config, plan.recipe.donor)
        text = dict(text_config(config))
        if "vocab_size" in config and config["vocab_size"] == text.get("vocab_size"):
            config["vocab_size"] = plan.vocabulary.size  # PaliGemma's files have both
        text |= dict.fromkeys(VOCABULARY_SIZES & text.keys(), plan.vocabulary.size)
        config = with_text(config, text | {"vocab_size": plan.vocabulary.size})
    return config


def _in_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The configuration with another dtype wherever it and its parts state one."""
    changed = dict(config)
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            changed[key] = dtype
        elif key.endswith("_config") and isinstance(value, Mapping):
            changed[key] = _in_dtype(value, dtype)
    return changed


def _restacked(plan: MergePlan, text: Mapping[str, Any]) -> dict[str, Any]:
    """The text decoder's configuration with the merged model's layers.

    A list that the file leaves to transformers is written only where the merged model's layers have
    others than those that transformers would draw.
    """
    changed = dict(text)
    config = plan.donor.config
    lent = {ref: lists_by_layer(plan.models[ref].config) for ref, _ in plan.layout.lenders}
    drawn = implied_lists(config, plan.layout.n_layers)
    for key in BY_LAYER:
        values = text.get(key)
        if values is None and key in drawn:
            values = lists_by_layer(config)[key]
        if isinstance(values, list) and len(values) == num_layers(config):
            merged = _by_layer(plan, key, values, lent)
            if merged != drawn.get(key):
                changed[key] = merged
    changed[layers_key(text) or "num_hidden_layers"] = plan.layout.n_layers
    return changed


def _by_layer(
    plan: MergePlan, key: str, values: list[Any], lent: Mapping[str, Mapping[str, list[Any]]]
) -> list[Any]:
    """A list with an item for each layer, of the layers that the merged model has.

    `values` are the donor's own, `lent` those of every lender by transformers.
    """
    merged = []
    for ref, layer in plan.layout.lenders:
        own = text_config(plan.models[ref].config).get(key, lent[ref].get(key))
        if not isinstance(own, list) or layer >= len(own):
            own = values
        merged.append(own[min(layer, len(own) - 1)])
    return merged


def check_restacked(plan: MergePlan, config: Mapping[str, Any]) -> None:
    """Raise RecipeError where config.json cannot express the new order of layers.

    transformers' model of the new configuration must have the tensors that are written. Nothing is
    checked where all layers are alike, as in the architectures that mergekit describes.
    """
    donor = plan.donor
    if class_name(donor.config) in LAST_SLICE and donor.architecture.lacking is None:
        return
    if empty_model(donor.config) is None:
        return  # nothing is known of its layers
    odd: list[str] = []
    misfits = misfits_of(config, plan.names)
    if misfits is not None:
        odd += misfits.lacking
        for name in misfits.left_out:
            if donor.architecture.role(name) != Role.OUTSIDE:
                odd.append(name)
    if misfits is None or odd:
        raise RecipeError(
            "config.json cannot describe this model with its layers in another order",
            where=donor.path,
            found=next(iter(odd), None),
            remedy="Keep the order of the layers.",
        )
