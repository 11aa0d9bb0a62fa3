"""Fewer elements in a delta: TIES keeps the largest of them, DARE a random choice."""

from __future__ import annotations

import torch
from torch import Tensor

PIECE = 1 << 19  # elements that are drawn or added up at a time


def trim(delta: Tensor, density: float, rescale: bool = False) -> Tensor:
    """Zero all but the `density` share of largest magnitude, of which at least one number stays.

    Equal magnitudes rank as torch.argsort orders them.
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


def drop(
    delta: Tensor, density: float, generator: torch.Generator | None, rescale: bool = True
) -> Tensor:
    """Keep each number with probability `density`; density 1 draws nothing.

    The draws are the CPU's, whatever the delta's device.
    """
    if density >= 1:
        return delta
    assert generator is not None
    # bf16 draws in bf16, other dtypes in fp32: a density is rounded to the dtype that draws.
    dtype = delta.dtype if delta.dtype == torch.bfloat16 else torch.float32
    delta_ = delta.to(dtype)
    flat = torch.empty(delta.numel(), dtype=dtype, device=delta.device)
    for piece in pieces(delta.numel()):
        probabilities = torch.full(flat[piece].shape, density, dtype=dtype)
        drawn = torch.bernoulli(probabilities, generator=generator)
        torch.mul(delta_.reshape(-1)[piece], drawn.to(delta.device), out=flat[piece])
    return _rescaled(delta_, flat.reshape(delta.shape), rescale).to(delta.dtype)


def pieces(elements: int) -> list[slice]:
    """Parts of a flat tensor that fit a core's cache, in order."""
    return [slice(start, start + PIECE) for start in range(0, elements, PIECE)]


def _rescaled(delta: Tensor, kept: Tensor, rescale: bool) -> Tensor:
    """Scale `kept` in place to delta's sum of magnitudes, if `rescale` is set."""
    if not rescale:
        return kept
    before, after = delta.abs().sum(), kept.abs().sum()
    if before.isinf():  # fp16 ends at 65504, where mergekit's tensor becomes NaN
        before, after = delta.float().abs().sum(), kept.float().abs().sum()
    if before < 1e-7 or after < 1e-7:
        return kept
    return kept.mul_(before / after)
