"""One pure function per merge method, and its exact in-place form where there is one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def task_arithmetic(
    base: Tensor, siblings: Sequence[Tensor], weights: Sequence[float], normalize: bool = False, scale: float = 1.0
) -> Tensor:
    """out = b + scale * sum_m w_m (x_m - b), every step rounded to the tensors' dtype, the weights too.

    base and siblings: any one shape and dtype. `normalize` divides the sum by the sum of the weights; `scale` is
    mergekit's `lambda`. Ilharco et al. 2023, arXiv 2212.04089, section 2; bit-equal to mergekit 0.1.5.
    """
    return combine(base, [sibling - base for sibling in siblings], weights, normalize, scale)


def combine(base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], normalize: bool = False, scale: float = 1.0) -> Tensor:
    """The same from deltas that are already rounded to the dtype."""
    if not deltas:
        return base
    rounded = torch.tensor(list(weights), dtype=base.dtype, device=base.device)
    products = torch.stack([delta * weight for delta, weight in zip(deltas, rounded, strict=True)])
    mixed = products.sum(dim=0)  # in fp32 inside, rounded once: not the same as adding pairwise
    if normalize:
        total = rounded.sum(dim=0)
        mixed /= torch.where(total.abs() < 1e-8, torch.ones_like(total), total)
    if scale != 1:
        mixed *= scale
    return base + mixed


def combine_into(out: Tensor, base: Tensor, delta: Tensor, weight: float) -> None:
    """`combine` of one delta without temporaries: out = r(b + r(d * r(w))). `torch.add(alpha=)` would round once only.

    `base` must hold no -0: mergekit's sum over one product turns -0 into 0, and -0 + -0 would stay -0 here.
    """
    torch.mul(delta, torch.tensor(weight, dtype=base.dtype, device=base.device), out=out)
    out.add_(base)
