"""Whether a model is of the kind that evomerge merges, and its config.json one for transformers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from evomerge.errors import ModelError, UnsupportedRecipe
from evomerge.merging.architecture.architecture import class_name, highest_number
from evomerge.merging.architecture.empty_model import (
    knows_type,
    parsed_config,
    text_classes,
    without_warnings,
)
from evomerge.merging.architecture.text_config import LAYERS, PARTS
from evomerge.merging.checkpoints.config_fault import check_config, config_error

WRITERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # how their names end
COUNTS = ("hidden_size", "vocab_size", "intermediate_size", "num_attention_heads")
MAPPINGS = ("rope_parameters", "rope_scaling", *PARTS)
DTYPES = ("dtype", "torch_dtype")
FEW_LAYERS = 1000  # that are made in no time, whatever the files hold


def refuse_other_kinds(config: Mapping[str, Any], where: object) -> None:
    """Raise UnsupportedRecipe for an encoder, an encoder-decoder, or a classifier.

    Called where something lacks or cannot be made that such models never have.
    """
    if not _is_known(config):
        return
    made, named = parsed_config(config), class_name(config)
    is_writer = bool(text_classes(config)) and not getattr(made, "is_encoder_decoder", False)
    if is_writer and (not named or named.endswith(WRITERS) or named in text_classes(config)):
        return
    raise UnsupportedRecipe(
        "evomerge merges models that write text with a decoder alone, and this one is another kind",
        where=where,
        found=named or config["model_type"],
        remedy="mergekit may merge it.",
    )


def blame_config(config: Mapping[str, Any], where: object = None) -> None:
    """Raise ModelError if config.json is why a folder of a known type cannot be loaded.

    UnsupportedRecipe for a type of which no model writes text.
    """
    if _is_known(config):
        if not text_classes(config):
            refuse_other_kinds(config, where)
        check_config(config, where)


def check_usable(config: Mapping[str, Any], where: object, *, has_model: bool) -> None:
    """Raise ModelError naming the key where transformers knows the type and cannot use a value.

    transformers is asked where a value is odd, or where it has no model of the configuration. Of
    models that bring their own code, that code decides.
    """
    named = config.get("model_type")
    if named is not None and not isinstance(named, str):
        raise config_error(config, KeyError(named), where)
    if has_model and not any(_odd_values(config)):
        return
    if not config.get("auto_map") and _is_known(config) and text_classes(config):
        try:
            with without_warnings():
                check_config(config, where)
        except ModelError as error:
            if not isinstance(error.__cause__, ImportError):  # a package that a merge needs not
                raise


def check_depth(config: Mapping[str, Any], names: Collection[str], where: object) -> None:
    """Raise ModelError where config.json has far more layers than the files could hold.

    A model of so many would take for ever to make, even without weights.
    """
    possible = max(FEW_LAYERS, len(names), highest_number(names) + 1)
    for part in _parts(config):
        for key in LAYERS:
            stated = part.get(key)
            if isinstance(stated, int) and stated > possible:
                raise ModelError(
                    f"`{key}` in config.json is more than the files have tensors, {len(names)}",
                    where=where,
                    found=stated,
                    remedy="Correct config.json, or copy the model again.",
                )


def _is_known(config: Mapping[str, Any]) -> bool:
    """Whether transformers has a configuration of the type: `knows_type` takes any folder."""
    if not knows_type(config):
        return False
    from transformers import CONFIG_MAPPING

    return config["model_type"] in CONFIG_MAPPING


def _odd_values(config: Mapping[str, Any]) -> Iterator[str]:
    """The keys whose values are not of the usual type."""
    import torch

    for part in _parts(config):
        for key in COUNTS:
            if key in part and (type(part[key]) is not int or part[key] < 1):
                yield key
        for key in MAPPINGS:
            if not isinstance(part.get(key), Mapping | None):
                yield key
        for key in DTYPES:
            named = part.get(key)  # or a mapping, by parts of the model
            if isinstance(named, str) and not isinstance(getattr(torch, named, None), torch.dtype):
                yield key
        if not isinstance(part.get("tie_word_embeddings", True), bool):
            yield "tie_word_embeddings"


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The configuration and every part of it."""
    yield config
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, Mapping):
            yield from _parts(value)
