"""Where a LoRA of an adapter's file goes: a module of the loaded model, and a tensor of that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evomerge.merging.adapters.adapter import Adapter
from evomerge.merging.adapters.live_modules import Kind, LiveModules

OWN_BASE = "Use it with the model that it was trained on."
INNER = ".base_layer"


@dataclass(frozen=True)
class LoraPlace:
    """What a LoRA changes, by the loaded model's names."""

    module: str
    tensor: str
    on_parameter: bool  # it is on the tensor rather than on its module
    is_in_out: bool = False  # the tensor is (in, out), or (experts, in, out)
    is_convolution: bool = False
    is_expert: bool = False  # the tensor is the file's, which transformers stacks with others

    @property
    def name(self) -> str:
        """The name that patterns of rank and alpha match."""
        return self.tensor if self.on_parameter else self.module


def find_place(live: LiveModules, adapter: Adapter, wrapped: str) -> LoraPlace:
    """The place of a LoRA by its name in the file.

    LoRAs on several tensors of one module are wrapped in each other, that of the last one
    outermost. Raises ModelError where peft has no such LoRA, or nobody can merge it.
    """
    if live.is_expert(wrapped):
        return LoraPlace(wrapped, f"{wrapped}.weight", on_parameter=False, is_expert=True)
    module, depth = wrapped, 0
    while module.endswith(INNER):
        module, depth = module.removesuffix(INNER), depth + 1
    module = live.module(module)
    kind = live.kind(module)
    _check_mergeable(live, adapter, module, kind)
    tensors = [f"{module}.weight"]
    if kind == Kind.PARAMETERS:
        own = live.parameters(module)
        tensors = [name for name in own if adapter.targets_parameter(name)]
        tensors = tensors or [name for name in own if name == f"{module}.weight"]
    if depth >= len(tensors):
        raise adapter.error(
            f"it contains a LoRA for {wrapped}, which its settings leave out",
            "Correct adapter_config.json.",
        )
    tensor = tensors[len(tensors) - 1 - depth]
    if kind == Kind.PARAMETERS or adapter.targets_parameter(tensor):
        is_stacked = len(live.shape(tensor) or ()) == 3
        return LoraPlace(module, tensor, True, is_stacked and live.has_experts_in_out(module))
    return LoraPlace(
        module,
        tensor,
        on_parameter=False,
        is_in_out=kind == Kind.TRANSPOSED,
        is_convolution=kind == Kind.CONVOLUTION,
    )


def shapes_of(
    place: LoraPlace,
    weight: tuple[int, ...],
    rank: int,
    is_embedding: bool,
    config: Mapping[str, Any],
) -> dict[str, tuple[int, ...]]:
    """Part -> shape of all that a LoRA on a weight of that shape must hold."""
    rows, columns = weight[-2:] if len(weight) in (2, 3) else (0, 0)
    if place.is_convolution:
        rows, columns, *kernel = weight
        inside, outside = tuple(kernel), (1,) * len(kernel)
    else:
        inside = outside = ()
        if len(weight) == 3:
            rank *= weight[0]
    if place.is_in_out:
        rows, columns = columns, rows
    shapes: dict[str, tuple[int, ...]] = {}
    if is_embedding:
        shapes["lora_embedding_A"] = (rank, rows)
        shapes["lora_embedding_B"] = (columns, rank)
    else:
        shapes["lora_A.weight"] = (rank, columns, *inside)
        shapes["lora_B.weight"] = (rows, rank, *outside)
        if config.get("lora_bias"):
            shapes["lora_B.bias"] = (rows,)
    if config.get("use_dora"):
        shapes["lora_magnitude_vector"] = (columns,) if is_embedding else (rows,)
    return shapes


def _check_mergeable(live: LiveModules, adapter: Adapter, module: str, kind: Kind) -> None:
    if kind == Kind.UNMERGEABLE:
        raise adapter.error(
            f"it targets {module}, a convolution in groups, which peft cannot merge either",
            "Train it without that module.",
        )
    if kind == Kind.CONVOLUTION and adapter.config.get("use_dora"):
        raise adapter.error(f"it targets {module}, and DoRA on a convolution is not supported")
    if kind == Kind.ATTENTION:
        raise adapter.error(
            f"it targets {module}, and a LoRA on torch's MultiheadAttention is not supported"
        )
    if ".experts." in module and (kind == Kind.UNKNOWN or live.model is None):
        raise adapter.error(f"it targets {module}, and a LoRA on experts is not supported")
    if kind == Kind.UNKNOWN:
        raise adapter.error(f"it targets {module}, which the base lacks", OWN_BASE)
