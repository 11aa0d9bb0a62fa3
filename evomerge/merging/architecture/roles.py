"""The role of each tensor of a transformers model, found from its modules."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

NUMBER = re.compile(r"\.(\d+)\.")


class Role(StrEnum):
    """Which slice decides a tensor that belongs to no layer."""

    FIRST = "first"
    LAST = "last"
    OUTSIDE = "outside"  # of the text path: none does, and the base's stays


@dataclass(frozen=True)
class TextPath:
    """The modules through which text goes, as prefixes of names, each ending with a dot."""

    decoder: str
    layers: str
    head: str  # the whole name of its weight
    embeddings: str  # likewise
    after: frozenset[str]  # what the decoder has behind its layers

    def layer(self, name: str) -> int | None:
        """The number of the layer that a tensor belongs to."""
        if not name.startswith(self.layers):
            return None
        number = name[len(self.layers) :].partition(".")[0]
        return int(number) if number.isdigit() else None

    def role(self, name: str) -> Role:
        """The role of a tensor outside the layers."""
        if name.startswith(self.head.rpartition(".")[0] + "."):
            return Role.LAST
        if not name.startswith(self.decoder) and name != self.embeddings:
            return Role.OUTSIDE
        inner = name[len(self.decoder) :].partition(".")[0]
        return Role.LAST if inner in self.after else Role.FIRST


def text_path(model: Any) -> TextPath | None:
    """The text path of a transformers model; None where it has no list of layers.

    Of the lists in the decoder, the one that has as many members as the configuration counts
    layers, and of several such lists the largest.
    """
    names = {id(module): name for name, module in model.named_modules()}
    decoder = _decoder(model)
    layers = _layers(decoder, _count(model))
    if layers is None:
        decoder = model
        layers = _layers(model, _count(model))
    if layers is None:
        return None
    prefix = f"{names[id(decoder)]}." if names[id(decoder)] else ""
    inner = layers.partition(".")[0]
    children = [name for name, _ in decoder.named_children()]
    after = children[children.index(inner) + 1 :]
    embeddings = _weight(model.get_input_embeddings(), names)
    if embeddings.startswith(prefix):
        table = embeddings.removeprefix(prefix).partition(".")[0]
        after = [name for name in after if name != table]
    return TextPath(
        decoder=prefix,
        layers=f"{prefix}{layers}.",
        head=_weight(model.get_output_embeddings(), names) or "lm_head.weight",
        embeddings=embeddings,
        after=frozenset(after),
    )


def count_layers(model: Any) -> int | None:
    """How many layers a transformers model has; None where it has no list of them."""
    path = text_path(model)
    if path is None:
        return None
    return len(model.get_submodule(path.layers.removesuffix(".")))


def is_one_module(names: Any) -> bool:
    """Whether mergekit sees one module in the names of a model's tensors.

    It counts what stands before the first number of any of them.
    """
    found = set()
    for name in names:
        match = NUMBER.search(name)
        if match:
            found.add(name[: match.start()])
    return len(found) < 2


def _decoder(model: Any) -> Any:
    try:
        decoder = model.get_decoder()
    except (AttributeError, NotImplementedError):
        return model
    return model if decoder is None else decoder


def _count(model: Any) -> int | None:
    text = model.config.get_text_config(decoder=True)
    return getattr(text, "num_hidden_layers", None)


def _layers(decoder: Any, count: int | None) -> str | None:
    """The name of the decoder's list of layers within it."""
    import torch

    found: dict[str, int] = {}
    for name, module in decoder.named_modules():
        is_list = isinstance(module, torch.nn.ModuleList | torch.nn.Sequential)
        if is_list and name and (count is None or len(module) == count):
            found[name] = sum(parameter.numel() for parameter in module.parameters())
    if not found:
        return None
    return max(found, key=lambda name: found[name])


def _weight(module: Any, names: dict[int, str]) -> str:
    name = names.get(id(module))
    return "" if name is None else f"{name}.weight"
