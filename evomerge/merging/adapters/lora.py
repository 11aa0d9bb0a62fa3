"""MODEL+ADAPTER references: a folder whose tensors have a peft LoRA merged in as they are read.

The numbers are those of peft 0.21's `merge_and_unload()` on the CPU, bit for bit, after mergekit's
way of loading the model (AutoModelForCausalLM with `torch_dtype=None`, transformers 5): every
tensor takes the dtype of the first one on disk, whatever config.json says. The adapter's numbers
are float32, whatever they are on disk. `fan_in_fan_out` changes nothing, as in peft, which goes by
the module's type. Whole numbers stay as they are.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import conv1d, conv2d, conv3d

from evomerge.merging.adapters.adapter import Adapter
from evomerge.merging.architecture.conversion import Group
from evomerge.merging.checkpoints.model_folder import ModelFolder

# experts are asked for one by one, each with tensors of two or three groups
GROUPS_KEPT = 3


def add_to_linear(
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    magnitude: torch.Tensor | None = None,
) -> torch.Tensor:
    """r(W + s BA): weight (out, in), a (r, in), b (out, r).

    The sum is in float32; r rounds once, to the weight's dtype. LoRA, arXiv 2106.09685, eq. 3.
    With `magnitude` (out,): r(m / |W + s BA| * (W + s BA)), the norm over each row (DoRA, arXiv
    2402.09353, eq. 5).
    """
    merged: torch.Tensor = (b.float() @ a.float()).mul_(scaling).add_(weight)
    if magnitude is not None:
        merged = (magnitude.float() / torch.linalg.norm(merged, dim=1)).view(-1, 1) * merged
    return merged.to(weight.dtype)


def add_rounded(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
) -> torch.Tensor:
    """W + r(s BA): as `add_to_linear`, but the delta is rounded before the sum.

    So peft adds a LoRA on a parameter, and a block-diagonal one.
    """
    return weight + ((b.float() @ a.float()) * scaling).to(weight.dtype)


def add_transposed(
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    magnitude: torch.Tensor | None = None,
) -> torch.Tensor:
    """r(W + s (BA)^T): as `add_to_linear` for a weight (in, out), that of transformers' Conv1D."""
    if magnitude is not None:
        return add_to_embedding(weight, a, b, scaling, magnitude)
    merged: torch.Tensor = (b.float() @ a.float()).T * scaling + weight
    return merged.to(weight.dtype)


def add_to_experts(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, is_in_out: bool
) -> torch.Tensor:
    """W_e + r(s B_e A_e) for every expert e: weight (experts, out, in), or (experts, in, out).

    a (experts * r, in) has an expert's rows together, b (out, r * experts) a rank's columns.
    """
    experts = len(weight)
    stacked_a = a.float().reshape(experts, -1, a.shape[-1])  # (experts, r, in)
    stacked_b = b.float().reshape(len(b), -1, experts)  # (out, r, experts)
    to = "e i o" if is_in_out else "e o i"
    delta = torch.einsum(f"o r e, e r i -> {to}", stacked_b, stacked_a) * scaling
    return weight + delta.to(weight.dtype)


def add_to_convolution(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
) -> torch.Tensor:
    """r(W + s BA) for each place in the kernel: weight (out, in, …), a (r, in, …), b (out, r, 1 …).

    Computed as peft does, for the same last bits.
    """
    if weight.shape[2:4] == (1, 1):
        delta = (b.float().flatten(1) @ a.float().flatten(1)).view(weight.shape)
    else:
        convolve = {3: conv1d, 4: conv2d, 5: conv3d}[weight.ndim]
        delta = convolve(a.float().transpose(0, 1), b.float()).transpose(0, 1)
    return (delta * scaling + weight).to(weight.dtype)


def add_to_embedding(
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    magnitude: torch.Tensor | None = None,
) -> torch.Tensor:
    """W + r(s (BA)^T): weight (vocabulary, hidden), a (r, vocabulary), b (hidden, r).

    The delta is rounded before the sum. With `magnitude` (hidden,): DoRA as in `add_to_linear`,
    the norm over each column, one rounding.
    """
    delta = (b.float() @ a.float()).T * scaling
    if magnitude is None:
        return weight + delta.to(weight.dtype)
    merged = weight + delta
    norm: torch.Tensor = torch.linalg.norm(weight.T + delta.T, dim=1)
    return ((magnitude.float() / norm).view(1, -1) * merged).to(weight.dtype)


@dataclass(frozen=True)
class ModuleLora:
    """What the adapter contains for one module: a part's name -> its tensor's name in the file.

    Without parts it is a LoRA of zeros.
    """

    parts: Mapping[str, str]
    scaling: float
    rounded: bool = False  # as in `add_rounded`
    blocks: Mapping[str, int] = field(default_factory=dict)  # part -> blocks on its diagonal
    is_in_out: bool = False  # the weight is (in, out), or (experts, in, out)


@dataclass(frozen=True)
class TokenRows:
    """Rows of the embeddings or the head that the adapter replaces."""

    ids: tuple[int, ...]
    key: str  # the tensor in the adapter's file, (len(ids), hidden)


@dataclass(frozen=True, kw_only=True)
class AdaptedModel(ModelFolder):
    """A base and an adapter, seen as the model that merging one into the other would give.

    What transformers stacks or fuses as it loads has its LoRA on the loaded model's tensor: a
    tensor of the file is then a part of the merged whole.
    """

    base: ModelFolder
    adapter: Path  # the adapter's folder: `path` is the base's, and a fingerprint needs both
    loaded: torch.dtype  # of every tensor, unless `_dtypes` says otherwise
    _weights: Adapter = field(repr=False)
    # tensor -> the adapter's tensor that takes its place
    _replaced: Mapping[str, str] = field(repr=False)
    # tensor -> LoRAs, in the order in which they are added
    _loras: Mapping[str, list[ModuleLora]] = field(repr=False)
    # tensor -> rows that are replaced after that
    _rows: Mapping[str, list[TokenRows]] = field(repr=False)
    # the file's tensor -> what it becomes with others, where that has a LoRA; names above are then
    # the loaded model's
    _dtypes: Mapping[str, torch.dtype] = field(default_factory=dict, repr=False)
    _groups: Mapping[str, Group] = field(default_factory=dict, repr=False)
    _model: Any = field(default=None, repr=False, compare=False)
    # the groups that were merged last, tensors by name
    _merged: dict[str, dict[str, torch.Tensor]] = field(
        default_factory=dict, repr=False, compare=False
    )
    _lock: Any = field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def places(self) -> tuple[Path, ...]:
        """The base's folder and the adapter's."""
        return (*self.base.places, self.adapter)

    @property
    def is_dequantized(self) -> bool:
        """See `ModelFolder`."""
        return self.base.is_dequantized

    def _header(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return self.base.shape(name), self._dtype(name)

    def _dtype(self, name: str) -> torch.dtype:
        stored = self.base.dtype(name)
        if not stored.is_floating_point:
            return stored
        return self._dtypes.get(self.base.stored(name), self.loaded)

    def get_tensor(self, name: str) -> torch.Tensor:
        """The merged tensor. Raises ModelError when a file is damaged."""
        name = self.stored(name)
        group = self._groups.get(name)
        if group is None:
            return self._changed(name, self._dtype(name))
        with self._lock:  # threads ask for the same group's tensors
            if group.target not in self._merged:
                while len(self._merged) >= GROUPS_KEPT:
                    self._merged.pop(next(iter(self._merged)))
                self._merged[group.target] = self._merge(group)
            return self._merged[group.target][name].contiguous()

    def _merge(self, group: Group) -> dict[str, torch.Tensor]:
        """The file's tensors of a group, of which the loaded model's have LoRAs."""
        sources = [self._base_tensor(source) for source in group.sources]
        changed = {}
        for live, tensor in group.convert(self._model, sources).items():
            changed[live] = self._changed(live, tensor.dtype, tensor)
        return group.revert(self._model, changed)

    def _base_tensor(self, name: str) -> torch.Tensor:
        return self.base.get_tensor(name).to(self._dtype(name))

    def _changed(
        self, name: str, dtype: torch.dtype, tensor: torch.Tensor | None = None
    ) -> torch.Tensor:
        """A tensor with all that the adapter changes in it; by default the base's of that name."""
        replaced = self._replaced.get(name)
        if replaced is not None:
            tensor = self._weights.read(replaced).to(dtype)
        elif tensor is None:
            tensor = self._base_tensor(name)
        for lora in self._loras.get(name, ()):
            tensor = _add(tensor, lora, self._read_parts(lora))
        for rows in self._rows.get(name, ()):
            new = self._weights.read(rows.key).to(tensor.dtype)
            tensor = tensor.index_copy(0, torch.tensor(rows.ids), new)
        return tensor.contiguous()

    def _read_parts(self, lora: ModuleLora) -> dict[str, torch.Tensor]:
        parts = {}
        for part, key in lora.parts.items():
            parts[part] = self._weights.read(key)
            if part in lora.blocks:
                blocks = parts[part].chunk(lora.blocks[part])
                parts[part] = torch.block_diag(*blocks)
        return parts


def _add(tensor: torch.Tensor, lora: ModuleLora, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if not parts:
        return tensor + 0.0
    if tensor.ndim == 1:
        return (tensor + parts["lora_B.bias"].float() * lora.scaling).to(tensor.dtype)
    magnitude = parts.get("lora_magnitude_vector")
    if "lora_embedding_A" in parts:
        a, b = parts["lora_embedding_A"], parts["lora_embedding_B"]
        return add_to_embedding(tensor, a, b, lora.scaling, magnitude)
    a, b = parts["lora_A.weight"], parts["lora_B.weight"]
    if tensor.ndim > 2 and not lora.rounded:
        return add_to_convolution(tensor, a, b, lora.scaling)
    if tensor.ndim > 2:
        return add_to_experts(tensor, a, b, lora.scaling, lora.is_in_out)
    if lora.rounded:
        return add_rounded(tensor, a, b, lora.scaling)
    if lora.is_in_out:
        return add_transposed(tensor, a, b, lora.scaling, magnitude)
    return add_to_linear(tensor, a, b, lora.scaling, magnitude)
