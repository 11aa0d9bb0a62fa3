"""Whether models fit each other, so that their tensors can be merged one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evomerge.errors import ModelError
from evomerge.merging.checkpoints.model_folder import HEAD, VOCABULARY, ModelFolder

# Keys of config.json that must be equal for tensors of one name to have one meaning.
CONFIG_KEYS = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
ONLY_SIBLINGS = "Only siblings of one base can be merged."


def check_fit(
    base: ModelFolder, siblings: Sequence[ModelFolder], same_vocabulary: bool = True
) -> None:
    """Raise ModelError naming the first key or tensor in which a sibling differs from the base.

    Without `same_vocabulary` the number of rows of embeddings and head may differ.
    """
    for sibling in siblings:
        _check_config(base, sibling, same_vocabulary)
        _check_names(base, sibling)
        _check_shapes(base, sibling, same_vocabulary)


def _check_config(base: ModelFolder, sibling: ModelFolder, same_vocabulary: bool) -> None:
    for key in CONFIG_KEYS:
        if key == "vocab_size" and not same_vocabulary:
            continue
        ours, theirs = _setting(base, key), _setting(sibling, key)
        if ours != theirs:
            raise ModelError(
                f"does not fit the base: `{key}` is {theirs}, the base has {ours}",
                where=sibling.path,
                remedy="Name a `tokenizer_source`." if key == "vocab_size" else ONLY_SIBLINGS,
            )


def _setting(model: ModelFolder, key: str) -> Any:
    """A key of config.json, with the default that older configurations leave out."""
    value = model.config.get(key)
    if key == "num_key_value_heads":
        return value or model.config.get("num_attention_heads")
    return value


def _check_names(base: ModelFolder, sibling: ModelFolder) -> None:
    for model in (base, sibling):
        # a head that is not stored is the embeddings, unless the model is said to be untied
        if HEAD not in model.keys and model.config.get("tie_word_embeddings") is False:
            raise ModelError(
                f"the files lack {HEAD}, and config.json says that it is not tied",
                where=model.path,
                found="tie_word_embeddings: false",
                remedy="Correct the key, or copy the model again.",
            )
    for name in sorted((base.keys ^ sibling.keys) - {HEAD}):
        lacking = "the sibling lacks" if name in base.keys else "the base lacks"
        raise ModelError(
            f"does not fit the base: {lacking} {name}", where=sibling.path, remedy=ONLY_SIBLINGS
        )


def _check_shapes(base: ModelFolder, sibling: ModelFolder, same_vocabulary: bool) -> None:
    for name in sorted(base.keys & sibling.keys):
        # the first axis that must be equal
        axis = 1 if not same_vocabulary and name in VOCABULARY else 0
        ours, theirs = base.shape(name), sibling.shape(name)
        if ours[axis:] != theirs[axis:]:
            raise ModelError(
                f"does not fit the base: {name} is {theirs}, the base has {ours}",
                where=sibling.path,
                remedy=ONLY_SIBLINGS,
            )
