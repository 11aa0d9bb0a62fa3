"""The methods that weigh deltas by what they share: SCE and reinforced agent merging (RAM).

Bit-equal on the CPU to mergekit 0.1.5. All tensors of a call have one shape and one dtype.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from evomerge.merging.methods.deltas import agree
from evomerge.merging.tensor_plan import TensorPlan

SMALLEST = 1e-6  # a sum of squares below it decides nothing, and no sum divides below it


def sce(
    base: Tensor | None,
    deltas: Iterable[Tensor],
    plan: TensorPlan,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Select, calculate, erase: Wan et al. 2024, arXiv 2408.07990, section 3.3.

    The `select_topk` share of the elements that vary most between the deltas stays; each delta
    weighs its mean square; where it has the minority's sign it does not count.
    """
    assert base is not None
    given = list(deltas)
    if not given:
        return base
    stacked = torch.stack(given)
    top = plan.parameters["select_topk"]
    if top < 1 and stacked.numel():
        stacked = stacked * _most_varied(stacked, top)
    weights = _mean_squares(stacked).reshape(-1, *[1] * base.dim()) * agree(stacked)
    return base + (stacked * weights).sum(dim=0) / weights.sum(dim=0).clamp(min=SMALLEST)


def _most_varied(stacked: Tensor, share: float) -> Tensor:
    """A mask of 0 and 1 in the tensors' shape: `share` of the elements that vary at all."""
    variance = torch.var(stacked, dim=0, correction=0)
    mask = torch.zeros_like(variance)
    count = int(torch.count_nonzero(variance) * share)  # a product in fp32
    if count > 0:
        mask.view(-1)[torch.topk(variance.abs().view(-1), k=count).indices] = 1
    return mask


def _mean_squares(stacked: Tensor) -> Tensor:
    """Each delta's mean square over their sum, (deltas,); equal shares where all but nothing is."""
    squares = stacked.square().reshape(len(stacked), -1).mean(dim=1)
    total = squares.sum().item()
    if abs(total) < SMALLEST:
        return torch.ones_like(squares) / len(squares)
    return squares / total


def ram(
    base: Tensor | None,
    deltas: Iterable[Tensor],
    plan: TensorPlan,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Where one sibling alone has moved, its delta; where several have, the mean of theirs.

    A delta above `epsilon` counts as moved. Reinforced agent merging, arXiv 2601.13572.
    """
    return _unique_and_shared(base, list(deltas), plan, boosted=False)


def ramplus_tl(
    base: Tensor | None,
    deltas: Iterable[Tensor],
    plan: TensorPlan,
    generator: torch.Generator | None = None,
) -> Tensor:
    """RAM whose lone deltas are scaled by 1 + r min(alpha, rho), in float32.

    rho is how many elements of the tensor a sibling has moved together with others, over how many
    it has moved alone. RAM+ of arXiv 2601.13572, with rho by tensor.
    """
    return _unique_and_shared(base, list(deltas), plan, boosted=True)


def _unique_and_shared(
    base: Tensor | None, deltas: list[Tensor], plan: TensorPlan, boosted: bool
) -> Tensor:
    assert base is not None
    if not deltas:
        return base
    rows = torch.stack(deltas).view(len(deltas), -1)
    moved = rows.abs() > plan.parameters["epsilon"]
    counts = moved.sum(dim=0, keepdim=True)
    alone, together = counts == 1, counts > 1
    rows = rows * moved
    lone = rows * alone
    if boosted:
        lone = lone * _boosts(moved, alone, together, plan).unsqueeze(-1)
    mixed = (lone + rows * together / counts.clamp(min=1)).sum(dim=0)
    return base + mixed.reshape(base.shape)


def _boosts(moved: Tensor, alone: Tensor, together: Tensor, plan: TensorPlan) -> Tensor:
    """The factor of each sibling's lone deltas, (siblings,), in fp32."""
    shared, unique = (moved & together).sum(dim=1), (moved & alone).sum(dim=1)
    ratio = shared / unique.clamp(min=plan.parameters["epsilon"])
    return 1 + plan.parameters["r"] * ratio.clamp(min=0, max=plan.parameters["alpha"])
