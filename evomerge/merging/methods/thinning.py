"""Fewer elements in a delta.

TIES keeps the largest, DARE a random choice, DELLA one in which the larger are likelier, and model
breadcrumbs those between the smallest and the outliers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evomerge.errors import RecipeError

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


def _drawing_dtype(delta: Tensor) -> torch.dtype:
    """bf16 draws in bf16, other dtypes in fp32: a density is rounded to the dtype that draws."""
    if delta.dtype == torch.bfloat16:
        return torch.bfloat16
    return torch.float32


def drop(
    delta: Tensor, density: float, generator: torch.Generator | None, rescale: bool = True
) -> Tensor:
    """Keep each number with probability `density`; density 1 draws nothing.

    The draws are the CPU's, whatever the delta's device.
    """
    if density >= 1:
        return delta
    assert generator is not None
    dtype = _drawing_dtype(delta)
    delta_ = delta.to(dtype)
    flat = torch.empty(delta.numel(), dtype=dtype, device=delta.device)
    for piece in pieces(delta.numel()):
        probabilities = torch.full(flat[piece].shape, density, dtype=dtype)
        drawn = torch.bernoulli(probabilities, generator=generator)
        torch.mul(delta_.reshape(-1)[piece], drawn.to(delta.device), out=flat[piece])
    return _rescaled(delta_, flat.reshape(delta.shape), rescale).to(delta.dtype)


def trim_band(delta: Tensor, density: float, gamma: float, rescale: bool = False) -> Tensor:
    """Zero the `gamma` share of largest magnitude, and of the rest the smallest.

    The `density` share stays; where both cannot be, fewer of the largest go. Davari and Belilovsky
    2023, arXiv 2312.06795, section 4.
    """
    if density >= 1:
        return delta
    elements = delta.numel()
    kept = int(density * elements)
    first = max(0, elements - kept - int(gamma * elements))
    magnitude = delta.abs().reshape(-1)
    if magnitude.device.type == "cpu":
        magnitude = magnitude.float()
    order = torch.sort(magnitude, descending=False).indices
    del magnitude
    mask = torch.zeros(elements, dtype=delta.dtype, device=delta.device)
    mask[order[first : first + kept]] = 1
    del order
    return _rescaled(delta, mask.reshape(delta.shape).mul_(delta), rescale)


def drop_by_rank(
    delta: Tensor,
    density: float,
    epsilon: float,
    generator: torch.Generator | None,
    rescale: bool = True,
) -> Tensor:
    """Keep a number with a probability from density - epsilon to density + epsilon.

    The probability grows with its magnitude's rank in its row; density 1 draws nothing. The
    draws are the CPU's, whatever the delta's device. Deep et al. 2024, arXiv 2406.11617, section
    3.1. Raises RecipeError for rows of a single number, which have no rank.
    """
    if density >= 1:
        return delta
    assert generator is not None
    rows = delta.reshape(1, -1) if delta.dim() < 2 else delta
    if rows.shape[1] == 1:
        raise RecipeError(
            "della cannot rank a row of one number",
            found=list(delta.shape),
            remedy="Set density: 1 for this tensor, by a filter.",
        )
    dtype = _drawing_dtype(delta)
    kept = torch.empty(rows.shape, dtype=dtype, device=delta.device)
    step = max(1, PIECE // max(1, rows[:1].numel()))
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        order = torch.argsort(part.abs(), dim=1, descending=False)
        ranks = order.argsort(dim=1).to(dtype) + 1
        least, most = ranks.amin(dim=1, keepdim=True), ranks.amax(dim=1, keepdim=True)
        place = ((ranks - least) / (most - least)).clamp(0, 1)
        chances = (density - epsilon) + place * 2 * epsilon
        drawn = torch.bernoulli(chances.cpu(), generator=generator).to(delta.device)
        torch.mul(part.to(dtype), drawn, out=kept[start : start + step])
    return _rescaled(delta.to(dtype), kept.reshape(delta.shape), rescale).to(delta.dtype)


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
