"""Weights in fp8 and mxfp4 as bfloat16: the formulas, one function a format."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# e2m1's numbers without and with the sign, OCP Microscaling Formats 1.0, table 5
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E8M0_BIAS = 127
ROWS = 1024  # that are float32 at once


def fp8_block(
    shape: Sequence[int], grid: Sequence[int], stated: tuple[int, int] | None
) -> tuple[int, int] | None:
    """The (rows, columns) that one scale is for; None where the scales do not fit the weight.

    `shape` is the weight's, `grid` the scales'. Blocks of the `stated` size may be cut off at the
    edges, all others divide the weight evenly, as in transformers: so do a scale for each row, and
    one for all.
    """
    if len(shape) < 2:
        return None
    rows, columns = shape[-2:]
    if tuple(grid) in ((), (1,)):
        return rows, columns
    if len(grid) != len(shape) or tuple(grid[:-2]) != tuple(shape[:-2]):
        return None
    down, across = grid[-2:]
    if stated is not None and (down, across) == (-(-rows // stated[0]), -(-columns // stated[1])):
        return stated
    if not down or not across or rows % down or columns % across:
        return None
    return rows // down, columns // across


def dequantize_fp8(weight: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """W * s in bfloat16: weight (…, rows, columns) in fp8, a scale for each block of it.

    scales (…, rows / block[0], columns / block[1]), both rounded up. The product is in float32 and
    rounded once. DeepSeek-V3, arXiv 2412.19437, section 3.3; transformers' `Fp8Dequantize`.
    """
    height, width = block
    *others, rows, columns = weight.shape
    grid = (*others, -(-rows // height), -(-columns // width))
    across = scales.float().reshape(grid).repeat_interleave(width, -1)[..., :columns]
    out = torch.empty(weight.shape, dtype=torch.bfloat16)
    blocks = max(1, ROWS // height)
    for first in range(0, grid[-2], blocks):
        start, end = first * height, min((first + blocks) * height, rows)
        scale = across[..., first : first + blocks, :].repeat_interleave(height, -2)
        numbers = weight[..., start:end, :].float()
        out[..., start:end, :] = numbers * scale[..., : end - start, :]
    return out


def dequantize_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """v * 2^(s - 127) in bfloat16, transposed: (experts, columns, rows).

    blocks (experts, rows, groups, 16) are bytes of two e2m1 numbers, the lower half first; scales
    (experts, rows, groups), one for 32 numbers. OCP Microscaling Formats 1.0, sections 5.3 and 6.
    gpt-oss multiplies with its experts from the right, so that transformers transposes them as it
    dequantises (`integrations/mxfp4.py`).
    """
    experts, rows, groups, size = blocks.shape
    out = torch.empty(experts, groups * size * 2, rows, dtype=torch.bfloat16)
    numbers = torch.tensor([*E2M1, *(-number for number in E2M1)])
    byte = torch.arange(256)
    pairs = torch.stack([numbers[byte & 15], numbers[byte >> 4]], dim=1)
    for expert in range(experts):
        values = pairs.index_select(0, blocks[expert].flatten().int())
        powers = torch.pow(2.0, scales[expert].float() - E8M0_BIAS)
        values = values.view(rows, groups, size * 2) * powers.unsqueeze(-1)
        out[expert] = values.reshape(rows, -1).to(torch.bfloat16).T
    return out
