"""The live model's tensors, and the checkpoint's that each of them is made of.

transformers stacks experts, fuses or splits projections and changes names as it loads a model. All
of that only moves numbers. So what is merged element by element can be merged in either space, and
everything else is merged as the checkpoint's tensors and then converted like them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evomerge.merging.architecture.conversion import Group, groups_of, shapes_after
from evomerge.merging.checkpoints.model_folder import ModelFolder


class ModuleSpace:
    """Which tensors of a checkpoint become which of a live model.

    `groups` are converted together. `left_out` maps tensors that the model has no place for, such
    as heads for predicting several tokens, to the names that they would have.
    """

    def __init__(self, model: Any, base: ModelFolder, names: Iterable[str]) -> None:
        """`names`: the checkpoint's tensors. A plain module has them under the same names."""
        self.model = model
        self.left_out: dict[str, str] = {}
        if hasattr(model, "base_model_prefix"):
            self.groups, self.left_out = groups_of(model, names)
        else:
            self.groups = [Group(name, (name,)) for name in sorted(names)]
        self._of: dict[str, Group] = {}
        for group in self.groups:
            if group.converter is None:
                self._of[group.target] = group
                continue
            shapes = {name: base.shape(name) for name in group.sources}
            self._of.update(dict.fromkeys(shapes_after(model, group, shapes), group))

    @property
    def names(self) -> list[str]:
        """The live model's tensors that the checkpoint gives numbers to, sorted."""
        return sorted(self._of)

    def group(self, name: str) -> Group:
        """What a tensor of the live model is made of."""
        return self._of[name]

    def made_of(self, group: Group, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The live model's tensors of a group, `read` giving the checkpoint's by name."""
        tensors = [read(name) for name in group.sources]
        if len({tensor.dtype for tensor in tensors}) > 1:
            widest = reduce(torch.promote_types, [tensor.dtype for tensor in tensors])
            tensors = [tensor.to(widest) for tensor in tensors]
        return group.convert(self.model, tensors)


class ModuleView:
    """A checkpoint's tensors as the live model has them."""

    def __init__(self, folder: ModelFolder, space: ModuleSpace) -> None:
        self.folder, self.space = folder, space
        self._last: tuple[Group, dict[str, Tensor]] | None = None

    @property
    def ref(self) -> str:
        """The folder's reference."""
        return self.folder.ref

    @property
    def path(self) -> Path:
        """The folder."""
        return self.folder.path

    def get_tensor(self, name: str) -> Tensor:
        """A tensor of the live model, in the checkpoint's dtype."""
        group = self.space.group(name)
        if group.converter is None:
            return self.folder.get_tensor(group.sources[0])
        last = self._last
        if last is None or last[0] is not group:
            last = group, self.space.made_of(group, self.folder.get_tensor)
            # others of the group are asked for next
            self._last = last if len(last[1]) > 1 else None
        return last[1][name]


def untie(model: Any) -> None:
    """Give a head that is the embeddings weights of its own; the merged ones may differ."""
    if not hasattr(model, "get_output_embeddings"):
        return
    head = model.get_output_embeddings()
    own = [id(parameter) for parameter in model.parameters()]
    if head is None or id(head.weight) not in own:
        return
    embeddings = model.get_input_embeddings()
    if head.weight is not embeddings.weight:
        return
    tied = head.weight
    head.weight = torch.nn.Parameter(tied.detach().clone(), tied.requires_grad)
    model.config.tie_word_embeddings = False


def tensors_of(model: Any) -> dict[str, torch.Tensor]:
    """The parameters, and the buffers of floating-point numbers that files can store."""
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters())
    if not hasattr(model, "base_model_prefix"):
        return tensors
    stored = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in stored and name not in tensors and buffer.is_floating_point():
            tensors[name] = buffer
    return tensors
