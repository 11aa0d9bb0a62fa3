"""One merged tensor from its inputs, whole or in chunks, with NaN and overflow found."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from evomerge.errors import ModelError, RecipeError
from evomerge.merging.checkpoints.model_folder import ModelFolder
from evomerge.merging.methods.deltas import differences
from evomerge.merging.methods.registry import get_method
from evomerge.merging.tensor_plan import TensorPlan
from evomerge.recipe import OWN

# the number behind the masks of old releases, which no model loads: it may be infinite in float16
MASK_NUMBER = "masked_bias"


@dataclass(frozen=True)
class ChunkedMerge:
    """A tensor on the CPU whose elements depend on their own places only: any part merges alone."""

    plan: TensorPlan
    models: Mapping[str, ModelFolder]
    inputs: Mapping[str, torch.Tensor]  # by model: (elements,), mapped, as on disk
    dtype: torch.dtype  # to merge in

    def merge_into(self, out: torch.Tensor, start: int) -> None:
        """Write the elements from `start` on into `out`, (n,).

        Raises ModelError on NaN or infinite weights, RecipeError on an overflow of float16.
        """
        end, plan = start + out.numel(), self.plan
        if not self.dtype.is_floating_point:
            out.copy_(self.inputs[plan.inputs[0][0]][start:end])
            return
        tensors = {}
        for ref, source in plan.inputs:
            chunk = self.inputs[ref][start:end].to(self.dtype)
            tensors[ref] = finite(chunk, self.models[ref], source)
        if plan.is_single_delta and plan.base is not None and out.dtype == self.dtype:
            base = tensors[plan.base[0]]
            torch.sub(tensors[plan.siblings[0][0]], base, out=out)
            out.mul_(torch.tensor(plan.weights[0], dtype=self.dtype))
            # `add_weighted_into`, which takes a base without -0: here 0 is added first instead
            out.add_(0.0).add_(base)
        else:
            out.copy_(merge_tensors(plan, tensors, None))
        check_overflow(out, plan.inputs[0][1])


def merge_tensors(
    plan: TensorPlan, tensors: Mapping[str, torch.Tensor], generator: torch.Generator | None
) -> torch.Tensor:
    """One merged tensor from its inputs by model, all of one shape and dtype.

    Raises RecipeError on weights that sum to 0 where they are normalised.
    """
    if plan.is_copy:
        return tensors[plan.inputs[0][0]]
    method = get_method(plan.method)
    base = None if plan.base is None else tensors[plan.base[0]]
    others: Iterable[torch.Tensor] = [tensors[ref] for ref, _ in plan.siblings]
    if method.takes_deltas and base is not None:
        others = differences(base, others)
    merged = method.merge(base, others, plan, generator)
    if not method.finite:
        check_merged(merged, plan)
    return merged


def check_merged(merged: torch.Tensor, plan: TensorPlan) -> None:
    """Raise RecipeError when a method has given NaN or infinite numbers."""
    if not _is_finite(merged):
        raise RecipeError(
            f"{OWN[plan.method].title if plan.method in OWN else plan.method} gives NaN or "
            "infinite numbers",
            where=plan.inputs[0][1],
            remedy="Change its parameters, or leave this tensor out by a filter.",
        )


class TensorSource(Protocol):
    """What a model's tensors are read from."""

    @property
    def ref(self) -> str: ...
    @property
    def path(self) -> Path: ...
    def get_tensor(self, name: str, /) -> torch.Tensor: ...


def load_finite(
    model: TensorSource, name: str, dtype: torch.dtype, device: Any = "cpu"
) -> torch.Tensor:
    """A tensor in `dtype`. Raises ModelError when it holds NaN or infinite numbers."""
    if not dtype.is_floating_point:
        return model.get_tensor(name).to(device)
    return finite(model.get_tensor(name).to(device=device, dtype=dtype), model, name)


def finite(tensor: torch.Tensor, model: TensorSource, name: str) -> torch.Tensor:
    """The tensor itself. Raises ModelError when it holds NaN or infinite numbers."""
    if not name.endswith(MASK_NUMBER) and not _is_finite(tensor):
        raise ModelError(
            f"tensor {name} contains NaN or infinite numbers",
            where=model.ref or model.path,
            remedy="Train or download the model again.",
        )
    return tensor


def check_overflow(merged: torch.Tensor, name: str) -> None:
    """Raise RecipeError when the tensor has passed the end of float16.

    The other dtypes end where no weights are.
    """
    if name.endswith(MASK_NUMBER):
        return
    if merged.dtype == torch.float16 and not _is_finite(merged):
        raise RecipeError(
            f"merged tensor {name} exceeds float16's maximum of 65504",
            remedy="Use smaller weights, or out_dtype: bfloat16.",
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)  # NaN goes through both; a fraction of isfinite's cost
    return math.isfinite(low.item()) and math.isfinite(high.item())
