"""The base's modules and tensors by the names that peft knows: those of the loaded model.

transformers renames, stacks and fuses a checkpoint's tensors as it loads them, and some modules
have their weight transposed. Its own model of the configuration says which.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from enum import StrEnum
from functools import cached_property
from typing import Any

from evomerge.merging.adapters.adapter import OUTSIDE, Adapter
from evomerge.merging.architecture.architecture import EMBED, HEAD
from evomerge.merging.architecture.conversion import Group, groups_of, renamed, shapes_after
from evomerge.merging.architecture.empty_model import empty_model
from evomerge.merging.architecture.text_config import text_config
from evomerge.merging.checkpoints.model_folder import ModelFolder

# tensors of models whose files have the loaded model's names, all of them linear layers and norms
_LIKE_LLAMA = re.compile(
    r"(model\.layers\.\d+\.(self_attn\.|mlp\.)?\w+\.(weight|bias)"
    r"|model\.(embed_tokens|norm)\.\w+|lm_head\.\w+)\Z"
)

WRAPPED = ".base_layer."  # in names of layers within torch's attention


class Kind(StrEnum):
    """How peft merges a LoRA into a module."""

    PLAIN = "plain"  # weight (out, in), or an embedding; also where nothing but names is known
    TRANSPOSED = "transposed"  # weight (in, out): transformers' Conv1D
    PARAMETERS = "parameters"  # no layer of torch: each of its tensors is targeted by name
    CONVOLUTION = "convolution"
    UNMERGEABLE = "unmergeable"  # in groups, which peft itself cannot merge
    ATTENTION = "attention"  # torch's own, with three projections in one tensor
    UNKNOWN = "unknown"


class LiveModules:
    """The base as peft sees it. In models with names like Llama's, files have the same names."""

    def __init__(self, base: ModelFolder, loaded: Any) -> None:
        """`loaded`: the dtype in which the base is loaded."""
        self.base, self.loaded = base, loaded
        self.embeddings, self.head = EMBED, HEAD
        self.model: Any = None
        self._groups: dict[str, Group] = {}
        self._tied: dict[str, str] = {}
        self._shapes: dict[str, dict[str, tuple[int, ...]]] = {}  # of what a group makes
        self._reversible: dict[int, bool] = {}  # by the converter's id
        nested = text_config(base.config) is not base.config
        if nested or not all(map(_LIKE_LLAMA.match, base.keys)):
            self.model = empty_model(_loaded_in(base.config, loaded))
        if self.model is not None:
            self._read_model()

    def _read_model(self) -> None:
        groups, _ = groups_of(self.model, self.base.keys)
        for group in groups:
            self._groups.update(dict.fromkeys(group.targets, group))
        first: dict[int, str] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if name in self._groups:
                first.setdefault(id(parameter), name)
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if name not in self._groups and id(parameter) in first:
                self._tied[name] = first[id(parameter)]
        self.embeddings = self._weight(self.model.get_input_embeddings()) or EMBED
        self.head = self._weight(self.model.get_output_embeddings()) or HEAD

    def _weight(self, module: Any) -> str:
        for name, found in self._modules.items():
            if found is module:
                return f"{name}.weight"
        return ""

    def file_name(self, name: str) -> str | None:
        """The file's tensor behind one of the live model; None where it is made of others.

        A head that the file lacks has the live name, as transformers would save it.
        """
        if self.model is None:
            return name
        if name == self.head and name not in self._groups:
            return name
        group = self._groups.get(self._tied.get(name, name))
        return group.sources[0] if group is not None and group.converter is None else None

    def group(self, name: str) -> Group | None:
        """What a tensor of the live model is made of, where that is more than one renamed."""
        group = self._groups.get(self._tied.get(name, name))
        return None if group is None or group.converter is None else group

    @cached_property
    def _experts(self) -> frozenset[str]:
        """The file's matrices of which the live model has stacks."""
        found = set[str]()
        shapes = {} if self.model is None else self.model.state_dict()
        for target, group in self._groups.items():
            is_stack = group.converter is not None and shapes[target].ndim == 3
            if is_stack and len(self.base.shape(group.sources[0])) == 2:
                found.update(group.sources)
        return frozenset(found)

    def is_expert(self, module: str) -> bool:
        """Whether a module, which transformers 4 had, is a part of stacked experts now."""
        return f"{module}.weight" in self._experts

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor of the live model; None where the base lacks it."""
        group = self.group(name)
        if group is not None:
            return self._shapes_after(group).get(self._tied.get(name, name))
        stored = self.file_name(name)
        if stored is None or self.base.stored(stored) not in self.base.keys:
            return None
        return self.base.shape(stored)

    def _shapes_after(self, group: Group) -> Mapping[str, tuple[int, ...]]:
        if group.target not in self._shapes:
            shapes = {source: self.base.shape(source) for source in group.sources}
            self._shapes[group.target] = shapes_after(self.model, group, shapes)
        return self._shapes[group.target]

    def can_revert(self, group: Group) -> bool:
        """Whether the file's tensors can be made of the live model's; tried on empty ones."""
        import torch

        key = id(group.converter)
        if key not in self._reversible:
            made = {}
            for name, shape in self._shapes_after(group).items():
                made[name] = torch.empty(shape, device="meta")
            try:
                found = group.revert(self.model, made)
            except Exception:  # whatever transformers raises where it has no way back
                found = {}
            wanted = {source: self.base.shape(source) for source in group.sources}
            shapes = {source: tuple(tensor.shape) for source, tensor in found.items()}
            self._reversible[key] = shapes == wanted
        return self._reversible[key]

    @cached_property
    def dtypes(self) -> dict[str, Any]:
        """The dtype of the file's tensors that are loaded in another one, as transformers does."""
        if self.model is None:
            return {}
        from transformers.core_model_loading import build_glob_alternation

        kept = self.model._get_dtype_plan(self.loaded)
        anywhere, patterns, _ = build_glob_alternation(list(kept))
        own = self.model.state_dict()
        found = {}
        for target, group in self._groups.items():
            match = anywhere.search(target) if kept else None
            dtype = own[target].dtype
            if match is not None:
                dtype = kept[patterns[str(match.lastgroup)]]
            if dtype != self.loaded and dtype.is_floating_point:
                found.update(dict.fromkeys(group.sources, dtype))
        return found

    @cached_property
    def names(self) -> frozenset[str]:
        """The live model's tensors that the base has."""
        return self.base.keys if self.model is None else frozenset(self._groups)

    @cached_property
    def _modules(self) -> Mapping[str, Any]:
        return {} if self.model is None else dict(self.model.named_modules())

    def module(self, name: str) -> str:
        """The live name of a module that an adapter of transformers 4 may name otherwise."""
        if self.model is None or name in self._modules:
            return name
        (weight,) = renamed(self.model, [f"{name}.weight"]).values()
        live = weight.removesuffix(".weight")
        return live if live in self._modules else name

    def kind(self, module: str) -> Kind:
        """How peft merges a LoRA into the module."""
        if self.model is None:
            return Kind.PLAIN
        import torch
        from transformers.pytorch_utils import Conv1D

        found = self._modules.get(module)
        if isinstance(found, torch.nn.Linear | torch.nn.Embedding):
            return Kind.PLAIN
        if isinstance(found, Conv1D):
            return Kind.TRANSPOSED
        if isinstance(found, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d):
            return Kind.CONVOLUTION if found.groups == 1 else Kind.UNMERGEABLE
        if isinstance(found, torch.nn.MultiheadAttention) or WRAPPED in module:
            return Kind.ATTENTION
        return Kind.UNKNOWN if found is None else Kind.PARAMETERS

    def parameters(self, module: str) -> list[str]:
        """A module's own tensors, in the order in which peft wraps them."""
        found = self._modules[module]
        return [f"{module}.{name}" for name, _ in found.named_parameters(recurse=False)]

    def has_experts_in_out(self, module: str) -> bool:
        """Whether a module's stacked experts are (experts, in, out) and not (experts, out, in)."""
        return bool(getattr(self._modules.get(module), "is_transposed", False))

    def is_linear(self, module: str) -> bool:
        """Whether peft's "all-linear" means the module."""
        if self.model is None:
            return module not in OUTSIDE
        import torch

        if f"{module}.weight" == self.head:
            return False
        is_layer = isinstance(self._modules.get(module), torch.nn.Linear)
        return is_layer or self.kind(module) == Kind.TRANSPOSED

    def targeted(self, adapter: Adapter) -> Iterator[str]:
        """The modules on which peft would put a LoRA that it merges."""
        if self.model is None:
            for name in self.base.keys:
                module = name.removesuffix(".weight")
                if len(self.base.shape(name)) == 2 and adapter.targets(module):
                    yield module
            return
        for module in self._modules:
            mergeable = self.kind(module) in (Kind.PLAIN, Kind.TRANSPOSED, Kind.CONVOLUTION)
            if mergeable and adapter.targets(module, linear=self.is_linear(module)):
                yield module


def _loaded_in(config: Mapping[str, Any], loaded: Any) -> Mapping[str, Any]:
    """The configuration with a dtype; itself where it has that one, whose model may be at hand."""
    dtype = str(loaded).removeprefix("torch.")
    if config.get("dtype", config.get("torch_dtype")) == dtype:
        return config
    rest = {key: value for key, value in config.items() if key != "torch_dtype"}
    return {**rest, "dtype": dtype}
