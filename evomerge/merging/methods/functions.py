"""One pure function per merge method, bit-equal on the CPU to mergekit 0.1.5, and the exact
in-place form where there is one.

All tensors of a call have one shape and one dtype; the result has them too. Where a step is said to
round, it rounds
to that dtype: in bf16 nearly every step does, and the order of the steps decides the bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

PARALLEL = 0.9995  # |cos| above which slerp is linear interpolation
SLERP_CHUNK = 1 << 20  # elements that slerp holds in fp32 at a time
PIECE = 1 << 19  # numbers that are drawn or added up at a time
SMALLEST = 1e-8  # a sum of weights below it does not divide


def task_arithmetic(
    base: Tensor,
    siblings: Sequence[Tensor],
    weights: Sequence[float],
    normalize: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """out = b + scale * sum_m w_m (x_m - b), every step rounded to the tensors' dtype, the weights
    too.

    base and siblings: any one shape and dtype. `normalize` divides the sum by the sum of the
    weights; `scale` is mergekit's `lambda`. Ilharco et al. 2023, arXiv 2212.04089, section 2.
    """
    return from_deltas(
        "task_arithmetic",
        base,
        differences(base, siblings),
        weights,
        normalize=normalize,
        scale=scale,
    )


def ties(
    base: Tensor,
    siblings: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    normalize: bool = True,
    scale: float = 1.0,
    rescale: bool = False,
) -> Tensor:
    """Trim, elect sign, merge: Yadav et al. 2023, arXiv 2306.01708, section 3.

    Of each delta the `density` share with the largest magnitude stays; where the weighted deltas
    disagree in sign, those of the sign with the larger sum count. `normalize` divides by the
    weights that counted.
    """
    return from_deltas(
        "ties",
        base,
        differences(base, siblings),
        weights,
        densities,
        None,
        normalize,
        scale,
        rescale,
    )


def dare_ties(
    base: Tensor,
    siblings: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    generator: torch.Generator,
    normalize: bool = False,
    scale: float = 1.0,
    rescale: bool = True,
) -> Tensor:
    """Drop at random, rescale (Yu et al. 2024, arXiv 2311.03099, section 3), then elect signs as
    TIES does.
    """
    return from_deltas(
        "dare_ties",
        base,
        differences(base, siblings),
        weights,
        densities,
        generator,
        normalize,
        scale,
        rescale,
    )


def dare_linear(
    base: Tensor,
    siblings: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    generator: torch.Generator,
    normalize: bool = False,
    scale: float = 1.0,
    rescale: bool = True,
) -> Tensor:
    """Drop at random, rescale (Yu et al. 2024, arXiv 2311.03099, section 3), then task arithmetic."""
    return from_deltas(
        "dare_linear",
        base,
        differences(base, siblings),
        weights,
        densities,
        generator,
        normalize,
        scale,
        rescale,
    )


def linear(tensors: Sequence[Tensor], weights: Sequence[float], normalize: bool = True) -> Tensor:
    """out = sum_m w_m x_m, divided by sum_m w_m when `normalize`: in fp32, rounded once. Wortsman
    et al. 2022, arXiv 2203.05482.
    """
    rounded = torch.tensor(list(weights), dtype=torch.float32, device=tensors[0].device)
    total = torch.zeros_like(tensors[0], dtype=torch.float32)
    for tensor, weight in zip(tensors, rounded, strict=True):
        total.addcmul_(tensor, weight)
    if normalize:
        total.div_(rounded.sum())
    return total.to(tensors[0].dtype)


def slerp(base: Tensor, other: Tensor, t: float) -> Tensor:
    """Spherical interpolation of two tensors taken as vectors, in fp32: t = 0 is the base, t = 1
    the other.

    out = (sin((1 - t) a) base + sin(t a) other) / sin(a), a the angle between them: Shoemake 1985,
    SIGGRAPH, p. 247. Nearly parallel vectors are interpolated linearly.
    """
    v0, v1 = base.reshape(1, -1), other.reshape(1, -1)
    step = torch.tensor([[t]], dtype=torch.float32, device=base.device)
    if not v0.numel():
        return base.clone()
    chunks = [
        (slice(None), slice(start, start + SLERP_CHUNK))
        for start in range(0, v0.shape[1], SLERP_CHUNK)
    ]
    norms = []
    for v in (v0, v1):
        parts = [
            torch.linalg.vector_norm(v[piece].float(), dim=1, keepdim=True) for piece in chunks
        ]
        norm = torch.linalg.vector_norm(torch.stack(parts), dim=0)
        norms.append(torch.where(norm > SMALLEST, norm, 1))
    cosines = [
        ((v0[p].float() / norms[0]) * (v1[p].float() / norms[1])).sum(dim=1, keepdim=True)
        for p in chunks
    ]
    cosine = torch.stack(cosines).sum(dim=0).clamp(-1, 1)
    straight = cosine.abs() > PARALLEL
    angle = torch.acos(torch.where(straight, 0, cosine))
    share0 = torch.where(straight, 1 - step, torch.sin((1 - step) * angle) / torch.sin(angle))
    share1 = torch.where(straight, step, torch.sin(step * angle) / torch.sin(angle))
    out = torch.empty_like(v0)
    for piece in chunks:
        out[piece] = share0 * v0[piece].float() + share1 * v1[piece].float()
    return out.reshape(base.shape)


def differences(base: Tensor, siblings: Sequence[Tensor]) -> Iterator[Tensor]:
    """x_m - b, rounded; each made when it is asked for."""
    return (sibling - base for sibling in siblings)


def from_deltas(
    method: str,
    base: Tensor,
    deltas: Iterable[Tensor],
    weights: Sequence[float],
    densities: Sequence[float] = (),
    generator: torch.Generator | None = None,
    normalize: bool = False,
    scale: float = 1.0,
    rescale: bool = False,
) -> Tensor:
    """The four methods above from differences that are already there: thin the deltas out, then add
    them to the base.
    """
    drawn = generator if generator is not None else torch.Generator()
    if method == "ties":
        deltas = (
            trim(delta, density, rescale) for delta, density in zip(deltas, densities, strict=True)
        )
    elif method != "task_arithmetic":
        deltas = (
            drop(delta, density, drawn, rescale)
            for delta, density in zip(deltas, densities, strict=True)
        )
    thinned = list(deltas)  # one by one: of the whole deltas only one is held at a time
    add = combine_elected if method in ("ties", "dare_ties") else combine
    if base.device.type != "cpu" or not thinned:
        return add(base, thinned, weights, normalize, scale)
    out = torch.empty_like(base, memory_format=torch.contiguous_format)
    for piece in pieces(base.numel()):
        out.view(-1)[piece] = add(
            base.reshape(-1)[piece],
            [d.reshape(-1)[piece] for d in thinned],
            weights,
            normalize,
            scale,
        )
    return out


def pieces(numbers: int) -> list[slice]:
    """Parts of a flat tensor that fit a core's cache, in order."""
    return [slice(start, start + PIECE) for start in range(0, numbers, PIECE)]


def trim(delta: Tensor, density: float, rescale: bool = False) -> Tensor:
    """Zero all but the `density` share of largest magnitude (at least one). Equal magnitudes: as
    torch.argsort orders them.
    """
    if density >= 1 or delta.numel() == 0:
        return delta
    keep = max(1, int(density * delta.numel()))
    magnitude = delta.abs().reshape(-1)
    if magnitude.device.type == "cpu":
        magnitude = magnitude.float()
    # eight bytes a number, and four for the magnitudes: the most that any merge holds
    order = torch.argsort(magnitude, descending=True)
    del magnitude
    mask = torch.zeros(delta.numel(), dtype=delta.dtype, device=delta.device)
    mask[order[:keep]] = 1
    del order
    return _rescaled(delta, mask.reshape(delta.shape).mul_(delta), rescale)


def drop(delta: Tensor, density: float, generator: torch.Generator, rescale: bool = True) -> Tensor:
    """Keep each number with probability `density`. The draws are the CPU's, whatever the delta's
    device; density 1 draws nothing.
    """
    if density >= 1:
        return delta
    # bf16 draws in bf16, other dtypes in fp32: a density is rounded to the dtype that draws.
    dtype = delta.dtype if delta.dtype == torch.bfloat16 else torch.float32
    delta_, flat = delta.to(dtype), torch.empty(delta.numel(), dtype=dtype, device=delta.device)
    for piece in pieces(delta.numel()):
        drawn = torch.bernoulli(
            torch.full(flat[piece].shape, density, dtype=dtype), generator=generator
        )
        torch.mul(delta_.reshape(-1)[piece], drawn.to(delta.device), out=flat[piece])
    return _rescaled(delta_, flat.reshape(delta.shape), rescale).to(delta.dtype)


def _rescaled(delta: Tensor, kept: Tensor, rescale: bool) -> Tensor:
    """`kept`, of which some numbers are 0, in place times the factor that restores delta's sum of
    magnitudes when `rescale`.
    """
    if not rescale:
        return kept
    before, after = delta.abs().sum(), kept.abs().sum()
    if before.isinf():  # fp16 ends at 65504, where mergekit's tensor becomes NaN
        before, after = delta.float().abs().sum(), kept.float().abs().sum()
    if before < 1e-7 or after < 1e-7:
        return kept
    return kept.mul_(before / after)


def combine(
    base: Tensor,
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    normalize: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """Task arithmetic from deltas that are already rounded to the dtype."""
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


def combine_elected(
    base: Tensor,
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    normalize: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """The same where each element counts only the weighted deltas that have the elected sign; a sum
    of 0 elects plus.
    """
    if not deltas:
        return base
    rounded = torch.tensor(list(weights), dtype=base.dtype, device=base.device)
    products = torch.stack([delta * weight for delta, weight in zip(deltas, rounded, strict=True)])
    elected = (products.sum(dim=0) >= 0).to(base.dtype) * 2 - 1
    counts = products.sign() == elected
    mixed = (products * counts).sum(dim=0)
    if normalize:
        total = (rounded.reshape(-1, *[1] * base.dim()) * counts).sum(dim=0)
        mixed /= total.masked_fill_(total == 0, 1)
    if scale != 1:
        mixed *= scale
    return base + mixed


def combine_into(out: Tensor, base: Tensor, delta: Tensor, weight: float) -> None:
    """`combine` of one delta without temporaries: out = r(b + r(d * r(w))). `torch.add(alpha=)`
    would round once only.

    `base` must hold no -0: mergekit's sum over one product turns -0 into 0, and -0 + -0 would stay
    -0 here.
    """
    torch.mul(delta, torch.tensor(weight, dtype=base.dtype, device=base.device), out=out)
    out.add_(base)
