"""Where a LoRA of an adapter's file goes: a module of the loaded model, and a tensor of that."""

from __future__ import annotations

from dataclasses import dataclass

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
    is_in_out: bool  # the tensor is (in, out), or (experts, in, out)

    @property
    def name(self) -> str:
        """The name that patterns of rank and alpha match."""
        return self.tensor if self.on_parameter else self.module


def find_place(live: LiveModules, adapter: Adapter, wrapped: str) -> LoraPlace:
    """The place of a LoRA by its name in the file.

    LoRAs on several tensors of one module are wrapped in each other, that of the last one
    outermost. Raises ModelError where peft has no such LoRA, or nobody can merge it.
    """
    module, depth = wrapped, 0
    while module.endswith(INNER):
        module, depth = module.removesuffix(INNER), depth + 1
    module = live.module(module)
    kind = live.kind(module)
    _check_mergeable(live, adapter, module, kind)
    tensors = [f"{module}.weight"]
    if kind == Kind.PARAMETERS:
        own = live.parameters(module)
        tensors = [name for name in own if adapter.targets_parameter(name)] or tensors
    if depth >= len(tensors):
        raise adapter.error(
            f"it contains a LoRA for {wrapped}, which its `target_parameters` leave out",
            "Correct adapter_config.json.",
        )
    tensor = tensors[len(tensors) - 1 - depth]
    if kind == Kind.PARAMETERS or adapter.targets_parameter(tensor):
        is_stacked = len(live.shape(tensor) or ()) == 3
        return LoraPlace(module, tensor, True, is_stacked and live.has_experts_in_out(module))
    return LoraPlace(module, tensor, False, kind == Kind.TRANSPOSED)


def _check_mergeable(live: LiveModules, adapter: Adapter, module: str, kind: Kind) -> None:
    if kind == Kind.UNMERGEABLE:
        raise adapter.error(
            f"it targets {module}, a convolution in groups, which peft cannot merge either",
            "Train it without that module.",
        )
    if kind == Kind.CONVOLUTION:
        raise adapter.error(f"it targets {module}, a convolution, which is not supported")
    if ".experts." in module and (kind == Kind.UNKNOWN or live.model is None):
        raise adapter.error(f"it targets {module}, and a LoRA on experts is not supported")
    if kind == Kind.UNKNOWN:
        raise adapter.error(f"it targets {module}, which the base lacks", OWN_BASE)
