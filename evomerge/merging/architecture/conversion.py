"""transformers' conversion of a checkpoint's tensors to those of the live model.

Experts are stacked, projections fused or split, names changed as it loads. Everything that is used
of transformers' loader (`core_model_loading`) is used here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Group:
    """Tensors of a checkpoint that become tensors of the model together."""

    target: str  # the name by which transformers collects them; mostly the one tensor's
    sources: tuple[str, ...]  # in the order in which it reads them
    patterns: tuple[str, ...] = ()  # by source: the pattern that matched; none where only renamed
    converter: Any = field(default=None, compare=False, repr=False)

    def convert(self, model: Any, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """The model's tensors by name, from the checkpoint's in the order of `sources`."""
        if self.converter is None:
            return {self.target: tensors[0]}
        converter = copy.deepcopy(self.converter)
        for source, pattern, tensor in zip(self.sources, self.patterns, tensors, strict=True):
            converter.add_tensor(self.target, source, pattern, tensor)
        made = converter.convert(self.target, model=model, config=model.config)
        return {name: _only(value) for name, value in made.items()}

    def revert(self, model: Any, made: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The checkpoint's tensors, by name, that the model's are made of.

        Raises ValueError where the conversion cannot be turned round.
        """
        if self.converter is None:
            return {self.sources[0]: made[self.target]}
        reverse = copy.deepcopy(self.converter).reverse_transform()
        found = {}
        first = ""
        for name, tensor in made.items():
            target, pattern = reverse.rename_source_key(name)
            first = first or target
            reverse.add_tensor(first, name, pattern, tensor)
        for name, value in reverse.convert(first, model=model, config=model.config).items():
            found[name] = _only(value)
        named = {made: source for source, made in renamed(model, self.sources).items()}
        if found.keys() != named.keys():
            raise ValueError(f"{self.target} becomes {sorted(found)[:1]}, not {self.sources[0]}")
        return {named[name]: tensor for name, tensor in found.items()}

    @property
    def targets(self) -> tuple[str, ...]:
        """The names of the model's tensors that it makes, as far as patterns tell."""
        if self.converter is None:
            return (self.target,)
        first, *others = self.converter.target_patterns
        return (self.target, *(self.target.replace(first, other) for other in others))


def groups_of(model: Any, names: Iterable[str]) -> tuple[list[Group], dict[str, str]]:
    """How a checkpoint with these tensors is loaded into `model`, and what it leaves out.

    The second part maps a tensor that the model has no place for to the name that it would have.
    """
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = _conversions(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {}
    for entry in converters:
        by_pattern.update(dict.fromkeys(entry.source_patterns, entry))
    wanted, prefix = model.state_dict(), model.base_model_prefix
    collected: dict[str, list[tuple[str, str | None]]] = {}
    left_out = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if target not in wanted and name in wanted:
            target, pattern = rename_source_key(name, [], [], prefix, wanted)
        if target in wanted:
            collected.setdefault(target, []).append((name, pattern))
        else:
            left_out[name] = target
    groups = []
    for target, found in collected.items():
        pattern = found[0][1]
        if pattern is None:
            groups.append(Group(target, (found[-1][0],)))
            continue
        sources = tuple(name for name, _ in found)
        patterns = tuple(str(each) for _, each in found)
        groups.append(Group(target, sources, patterns, by_pattern[pattern]))
    return groups, left_out


def renamed(model: Any, names: Iterable[str]) -> dict[str, str]:
    """The names that tensors of a checkpoint take where transformers only renames."""
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [entry for entry in _conversions(model) if isinstance(entry, WeightRenaming)]
    return {name: rename_source_key(name, renamings, [])[0] for name in names}


def saved_name(model: Any, name: str) -> str:
    """The name under which transformers saves a tensor of the model, by default."""
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    tensor = torch.empty(1, 1, device="meta")
    try:
        return str(next(iter(revert_weight_conversion(model, {name: tensor}))))
    except Exception:  # RuntimeError and others, where it is not only renamed
        return name


def _conversions(model: Any) -> list[Any]:
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # transformers before 5.20
        from transformers.core_model_loading import (  # type: ignore[attr-defined, no-redef]
            get_model_conversion_mapping,
        )
    make: Callable[[Any], list[Any]] = get_model_conversion_mapping
    return make(model)


def _only(value: Any) -> Tensor:
    tensor: Tensor = value[0] if isinstance(value, list) else value
    return tensor


def shapes_after(
    model: Any, group: Group, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The shapes of the model's tensors that a group makes, without any numbers."""
    import torch

    if group.converter is None:
        return {group.target: tuple(shapes[group.sources[0]])}
    empty = [torch.empty(shapes[name], device="meta") for name in group.sources]
    return {name: tuple(tensor.shape) for name, tensor in group.convert(model, empty).items()}
