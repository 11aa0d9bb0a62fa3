"""Whether models fit each other, so that their tensors can be merged one by one."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence, Set

from evomerge.errors import ModelError
from evomerge.merging.architecture.architecture import Architecture
from evomerge.merging.architecture.roles import Role
from evomerge.merging.architecture.text_config import text_config
from evomerge.merging.checkpoints.config_defaults import SPELLINGS, text_value
from evomerge.merging.checkpoints.model_folder import ModelFolder, tied_by_config
from evomerge.merging.checkpoints.model_kind import refuse_other_kinds
from evomerge.merging.checkpoints.quantized_weights import refuse_quantized
from evomerge.merging.checkpoints.stored_forms import SAVE_ALIKE, other_form, unlike
from evomerge.once import warn_once

log = logging.getLogger(__name__)

# Keys of config.json that must be equal for tensors of one name to have one meaning, which their
# shapes alone do not show.
MEANING = ("model_type", "num_attention_heads", "num_key_value_heads")
CONFIG_KEYS = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
# what models without experts do not have at all
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")
ONLY_SIBLINGS = "Only siblings of one base can be merged."
NAME_A_SOURCE = "Name a `tokenizer_source`."


def check_fit(
    base: ModelFolder, siblings: Sequence[ModelFolder], same_vocabulary: bool = True
) -> None:
    """Raise ModelError naming the first key or tensor in which a sibling differs from the base.

    Without `same_vocabulary` the number of rows of embeddings and head may differ. Quantised models
    fit none. What transformers does not load may be in some models alone, which is told.
    """
    for model in (base, *siblings):
        refuse_quantized(model)
        _check_head(model)
    for sibling in siblings:
        keys = [key for key in CONFIG_KEYS if same_vocabulary or key != "vocab_size"]
        _check_config(base, sibling, keys)
        _check_names(base, sibling)
        for name in sorted(base.keys & sibling.keys):
            _check_shapes(base, name, sibling, name, same_vocabulary)
    tell_what_is_spare(base, siblings)


def tell_what_is_spare(base: ModelFolder, siblings: Sequence[ModelFolder]) -> None:
    """Log what becomes of tensors that some models lack and transformers does not load."""
    lacked = set[str]()
    for sibling in siblings:
        if base.keys != sibling.keys:
            lacked |= base.spare - sibling.keys
            _tell(sibling, sibling.spare - base.keys, "not in the base: the output has none")
    _tell(base, lacked, "not in every model: the output has this model's")


def _tell(model: ModelFolder, names: Collection[str], outcome: str) -> None:
    if not names:
        return
    which = f"{min(names)}, which transformers does not load, is"
    if len(names) > 1:
        which = f"{len(names)} tensors that transformers does not load, such as {min(names)}, are"
    warn_once(log, f"{model.ref}: {which} {outcome}")


def check_tensors(
    lender: tuple[ModelFolder, str],
    givers: Iterable[tuple[ModelFolder, str]],
    same_vocabulary: bool = True,
) -> None:
    """Raise ModelError unless models have the tensors that one merged tensor is made of.

    `lender` is the model and the tensor whose shape the merged one has; `givers` are all of them.
    """
    base, wanted = lender
    for model, name in givers:
        if name == model.head:
            _check_head(model)
        if model.stored(name) not in model.keys:
            _check_form(model, name)
            raise ModelError(
                f"does not fit the base: it lacks {name}", where=model.path, remedy=ONLY_SIBLINGS
            )
        _check_shapes(base, wanted, model, name, same_vocabulary)


def check_whole(model: ModelFolder, merged: Set[str], architecture: Architecture) -> None:
    """Raise ModelError for a tensor that would be lost: others of its place are merged, not it.

    Its place is its layer, or its role outside the layers.
    """

    def place(name: str) -> int | Role:
        parts = architecture.split(name)
        return architecture.role(name) if parts is None else parts[1]

    places = {place(name) for name in merged} - {Role.OUTSIDE}
    for name in sorted(model.keys - merged - {model.head}):
        if place(name) in places and name not in model.spare:
            raise ModelError(
                f"does not fit the base: the base lacks {name}",
                where=model.path,
                remedy=ONLY_SIBLINGS,
            )


def check_meaning(base: ModelFolder, others: Iterable[ModelFolder]) -> None:
    """Raise ModelError unless layers of the models mean the same, however many each of them has."""
    for model in (base, *others):
        refuse_quantized(model)
        _check_config(base, model, MEANING)


def _check_config(base: ModelFolder, sibling: ModelFolder, keys: Iterable[str]) -> None:
    ours, theirs = (model.config.get("model_type") for model in (base, sibling))
    if ours != theirs:
        raise _misfit(sibling, "model_type", theirs, ours)
    configs = (base.config, sibling.config)
    for key in (*keys, *EXPERT_KEYS):
        names = (key, *SPELLINGS.get(key, ()))
        stated = [[text_config(config).get(name) for name in names] for config in configs]
        if stated[0] == stated[1]:
            continue
        ours, theirs = (text_value(config, key) for config in configs)
        if ours != theirs:
            named = [name for name in names if text_config(sibling.config).get(name) == theirs]
            raise _misfit(sibling, named[0] if named else key, theirs, ours)


def _misfit(sibling: ModelFolder, key: str, theirs: object, ours: object) -> ModelError:
    return ModelError(
        f"does not fit the base: `{key}` is {theirs}, the base has {ours}",
        where=sibling.path,
        remedy=NAME_A_SOURCE if key == "vocab_size" else ONLY_SIBLINGS,
    )


def _check_head(model: ModelFolder) -> None:
    """A head that is not stored is the embeddings, unless the model is said to be untied."""
    if model.head not in model.keys and tied_by_config(model.config) is False:
        refuse_other_kinds(model.config, model.path)
        raise ModelError(
            f"the files lack {model.head}, and config.json says that it is not tied",
            where=model.path,
            found="tie_word_embeddings: false",
            remedy="Correct the key, or copy the model again.",
        )


def _check_names(base: ModelFolder, sibling: ModelFolder) -> None:
    heads = {base.head, sibling.head}
    for name in sorted((base.keys ^ sibling.keys) - heads):
        if name in (base if name in base.keys else sibling).spare:
            continue
        lacking = "the base lacks"
        if name in base.keys:
            lacking = "the sibling lacks"
            _check_form(sibling, name)
        else:
            _check_form(base, name, sibling)
        raise ModelError(
            f"does not fit the base: {lacking} {name}", where=sibling.path, remedy=ONLY_SIBLINGS
        )


def _check_form(model: ModelFolder, lacked: str, sibling: ModelFolder | None = None) -> None:
    """Raise ModelError where a model has the numbers of a tensor that it lacks in another form.

    `sibling` has the tensor, and `model` is the base; without it, it is the other way round.
    """
    forms = other_form(model, lacked)
    if forms is None:
        return
    theirs, ours = forms if sibling is None else forms[::-1]
    raise ModelError(
        f"does not fit the base: {unlike(theirs, ours)}",
        where=(sibling or model).path,
        remedy=SAVE_ALIKE,
    )


def _check_shapes(
    base: ModelFolder, wanted: str, sibling: ModelFolder, name: str, same_vocabulary: bool
) -> None:
    # the first axis that must be equal
    axis = 1 if not same_vocabulary and name in base.vocabulary else 0
    ours, theirs = base.shape(wanted), sibling.shape(name)
    if ours[axis:] != theirs[axis:]:
        # a key says it better than a tensor's shape
        other = "intermediate_size"
        if name in base.vocabulary:
            other = "vocab_size"
        _check_config(base, sibling, ["hidden_size", other])
        rows_only = name in base.vocabulary and ours[1:] == theirs[1:]
        raise ModelError(
            f"does not fit the base: {name} is {theirs}, the base has {ours}",
            where=sibling.path,
            remedy=NAME_A_SOURCE if rows_only else ONLY_SIBLINGS,
        )
