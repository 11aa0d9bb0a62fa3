"""The methods that add weighted deltas (siblings minus base) to the base.

Task arithmetic, TIES, DARE, DELLA and model breadcrumbs.

Bit-equal on the CPU to mergekit 0.1.5. All tensors of a call have one shape and one dtype; the
result has them too. Where a step is said to round, it rounds to that dtype: in bf16 nearly every
step does, and the order of the steps decides the bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from evomerge.merging.methods.thinning import drop, drop_by_rank, pieces, trim, trim_band
from evomerge.merging.tensor_plan import TensorPlan

SMALLEST = 1e-8  # a sum of weights below it does not divide


class Adder(Protocol):
    """`add_weighted` or `add_elected`."""

    def __call__(
        self,
        base: Tensor,
        deltas: Sequence[Tensor],
        weights: Sequence[float],
        normalize: bool = False,
        scale: float = 1.0,
    ) -> Tensor: ...


def differences(base: Tensor, siblings: Iterable[Tensor]) -> Iterator[Tensor]:
    """x_m - b, rounded; each is computed when it is needed."""
    return (sibling - base for sibling in siblings)


def task_arithmetic(
    base: Tensor | None,
    deltas: Iterable[Tensor],
    plan: TensorPlan,
    generator: torch.Generator | None = None,
) -> Tensor:
    """out = b + scale * sum_m w_m d_m, every step rounded, the weights too.

    base and deltas: any one shape and dtype. `normalize` divides the sum by the sum of the
    weights; `scale` is mergekit's `lambda`. Ilharco et al. 2023, arXiv 2212.04089, section 2.
    """
    return _in_pieces(add_weighted, base, deltas, plan)


def ties(
    base: Tensor | None,
    deltas: Iterable[Tensor],
    plan: TensorPlan,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Trim, elect sign, merge: Yadav et al. 2023, arXiv 2306.01708, section 3.

    Of each delta the `density` share with the largest magnitude stays; where the weighted deltas
    disagree in sign, those of the sign with the larger sum count. `normalize` divides by the
    weights that counted.
    """
    pairs = zip(deltas, plan.densities, strict=True)
    trimmed = (trim(delta, density, plan.rescale) for delta, density in pairs)
    return _in_pieces(add_elected, base, trimmed, plan)


def dare_ties(
    base: Tensor | None,
    deltas: Iterable[Tensor],
    plan: TensorPlan,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Drop at random, rescale, then elect signs as TIES does.

    Yu et al. 2024, arXiv 2311.03099, section 3.
    """
    return _in_pieces(add_elected, base, _dropped(deltas, plan, generator), plan)


def dare_linear(
    base: Tensor | None,
    deltas: Iterable[Tensor],
    plan: TensorPlan,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Drop at random, rescale, then task arithmetic.

    Yu et al. 2024, arXiv 2311.03099, section 3.
    """
    return _in_pieces(add_weighted, base, _dropped(deltas, plan, generator), plan)


def della(
    base: Tensor | None,
    deltas: Iterable[Tensor],
    plan: TensorPlan,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Drop at random, the small ones more often, rescale, then elect signs as TIES does.

    Deep et al. 2024, arXiv 2406.11617, section 3.
    """
    return _in_pieces(add_elected, base, _dropped_by_rank(deltas, plan, generator), plan)


def della_linear(
    base: Tensor | None,
    deltas: Iterable[Tensor],
    plan: TensorPlan,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Drop at random, the small ones more often, rescale, then task arithmetic.

    Deep et al. 2024, arXiv 2406.11617, section 3.
    """
    return _in_pieces(add_weighted, base, _dropped_by_rank(deltas, plan, generator), plan)


def breadcrumbs(
    base: Tensor | None,
    deltas: Iterable[Tensor],
    plan: TensorPlan,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Zero the smallest numbers and the outliers, then task arithmetic.

    Davari and Belilovsky 2023, arXiv 2312.06795, section 4.
    """
    return _in_pieces(add_weighted, base, _banded(deltas, plan), plan)


def breadcrumbs_ties(
    base: Tensor | None,
    deltas: Iterable[Tensor],
    plan: TensorPlan,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Zero the smallest numbers and the outliers, then elect signs as TIES does.

    Davari and Belilovsky 2023, arXiv 2312.06795, and Yadav et al. 2023, arXiv 2306.01708.
    """
    return _in_pieces(add_elected, base, _banded(deltas, plan), plan)


def _banded(deltas: Iterable[Tensor], plan: TensorPlan) -> Iterator[Tensor]:
    parts = zip(deltas, plan.densities, plan.by_sibling["gamma"], strict=True)
    return (trim_band(delta, density, gamma, plan.rescale) for delta, density, gamma in parts)


def _dropped_by_rank(
    deltas: Iterable[Tensor], plan: TensorPlan, generator: torch.Generator | None
) -> Iterator[Tensor]:
    parts = zip(deltas, plan.densities, plan.by_sibling["epsilon"], strict=True)
    for delta, density, epsilon in parts:
        yield drop_by_rank(delta, density, epsilon, generator, plan.rescale)


def _dropped(
    deltas: Iterable[Tensor], plan: TensorPlan, generator: torch.Generator | None
) -> Iterator[Tensor]:
    pairs = zip(deltas, plan.densities, strict=True)
    return (drop(delta, density, generator, plan.rescale) for delta, density in pairs)


def _in_pieces(
    add: Adder, base: Tensor | None, deltas: Iterable[Tensor], plan: TensorPlan
) -> Tensor:
    """`add` of everything; on the CPU in pieces, which give the same bits sooner."""
    assert base is not None
    weights, normalize, scale = plan.weights, plan.normalize, plan.scale
    thinned = list(deltas)  # one by one: of the untouched deltas only one is held at a time
    if base.device.type != "cpu" or not thinned:
        return add(base, thinned, weights, normalize, scale)
    out = torch.empty_like(base, memory_format=torch.contiguous_format)
    for piece in pieces(base.numel()):
        parts = [delta.reshape(-1)[piece] for delta in thinned]
        out.view(-1)[piece] = add(base.reshape(-1)[piece], parts, weights, normalize, scale)
    return out


def add_weighted(
    base: Tensor,
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    normalize: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """Base plus the weighted sum of deltas that are already rounded to the dtype."""
    if not deltas:
        return base
    rounded = torch.tensor(list(weights), dtype=base.dtype, device=base.device)
    products = torch.stack([delta * weight for delta, weight in zip(deltas, rounded, strict=True)])
    mixed = products.sum(dim=0)  # in fp32 inside, rounded once: not the same as adding pairwise
    if normalize:
        total = rounded.sum(dim=0)
        # fp16 has no 1e-8: mergekit divides by 0
        mixed /= torch.where(total.float().abs() < SMALLEST, torch.ones_like(total), total)
    if scale != 1:
        mixed *= scale
    return base + mixed


def add_elected(
    base: Tensor,
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    normalize: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """`add_weighted`, but each element counts only the weighted deltas that have the elected sign.

    A sum of 0 elects plus.
    """
    if not deltas:
        return base
    rounded = torch.tensor(list(weights), dtype=base.dtype, device=base.device)
    products = torch.stack([delta * weight for delta, weight in zip(deltas, rounded, strict=True)])
    counts = agree(products)
    mixed = (products * counts).sum(dim=0)
    if normalize:
        total = (rounded.reshape(-1, *[1] * base.dim()) * counts).sum(dim=0)
        mixed /= total.masked_fill_(total == 0, 1)
    if scale != 1:
        mixed *= scale
    return base + mixed


def agree(products: Tensor) -> Tensor:
    """Whether each element, (siblings, …), has the sign of the siblings' sum; 0 elects plus."""
    elected = (products.sum(dim=0) >= 0).to(products.dtype) * 2 - 1
    return products.sign() == elected


def add_weighted_into(out: Tensor, base: Tensor, delta: Tensor, weight: float) -> None:
    """`add_weighted` of one delta without temporaries: out = r(b + r(d * r(w))).

    `torch.add(alpha=)` would round once only. `base` must hold no -0: mergekit's sum over one
    product turns -0 into 0, and -0 + -0 would stay -0 here. The same bits come from `fused`, in one
    pass, and from `ChunkedMerge.merge_into`, for a base that may hold -0; `LiveModel._write` takes
    this or `fused`, with `Inputs.base_no_neg_zero`.
    """
    torch.mul(delta, torch.tensor(weight, dtype=base.dtype, device=base.device), out=out)
    out.add_(base)
