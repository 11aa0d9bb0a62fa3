"""Tensors that transformers does not load: buffers of old releases, heads for further tokens."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from evomerge.merging.architecture.conversion import groups_of
from evomerge.merging.architecture.empty_model import empty_model
from evomerge.merging.architecture.roles import TextPath, text_path

# how the names of buffers end that older releases have stored, and that the code makes now
BUFFERS = (
    *(".attn.bias", ".attention.bias", "attn_bias", "masked_bias", "causal_mask"),
    *("position_ids", "inv_freq", "embed_positions.weights", "decoder.version"),
)
# how the part of a name begins that holds a head which predicts further tokens
MORE_TOKENS = "mtp"
# modules of such a head that is stored as a further layer
JOINING = {"eh_proj", "enorm", "hnorm"}


def spare_tensors(config: Mapping[str, Any], names: Collection[str]) -> frozenset[str]:
    """Those of a checkpoint's tensors that its model has no place for, of known kinds.

    None where transformers has no model of the configuration.
    """
    model = empty_model(config)
    if model is None:
        return frozenset()
    _, left_out = groups_of(model, names)
    return spare_of(model, text_path(model), left_out)


def spare_of(model: Any, path: TextPath | None, left_out: Mapping[str, str]) -> frozenset[str]:
    """Of what a model has no place for (name -> the name that it would have) the known kinds.

    They are what its class says that files have, buffers, and heads that predict further tokens.
    """
    expected = [re.compile(known) for known in model._keys_to_ignore_on_load_unexpected or ()]
    heads = _heads_among_layers(model, path, left_out)
    spare = set()
    for name, target in left_out.items():
        if (
            name.endswith(BUFFERS)
            or any(part.startswith(MORE_TOKENS) for part in name.split("."))
            or (path is not None and path.layer(target) in heads)
            or any(known.search(name) or known.search(target) for known in expected)
        ):
            spare.add(name)
    return frozenset(spare)


def _heads_among_layers(model: Any, path: TextPath | None, left_out: Mapping[str, str]) -> set[int]:
    """The numbers of layers that are heads for further tokens, as DeepSeek and its kin store them.

    The projection and norms that join two tokens tell them from layers that config.json forgets.
    """
    if path is None:
        return set()
    layers = len(model.get_submodule(path.layers.removesuffix(".")))
    found = set()
    for target in left_out.values():
        layer = path.layer(target)
        if layer is not None and layer >= layers and JOINING & set(target.split(".")):
            found.add(layer)
    return found
