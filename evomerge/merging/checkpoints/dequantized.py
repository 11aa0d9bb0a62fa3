"""Checkpoints in fp8 and mxfp4, seen as the bfloat16 models that dequantising them gives."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from evomerge.errors import ModelError
from evomerge.merging.architecture.text_config import text_config, with_text
from evomerge.merging.checkpoints.dequantize import dequantize_fp8, dequantize_mxfp4, fp8_block
from evomerge.merging.checkpoints.model_folder import ModelFolder
from evomerge.merging.checkpoints.quantized_weights import STATED, packed_tensors, stated_settings
from evomerge.once import warn_once

log = logging.getLogger(__name__)
FP8, SCALES = "F8_E4M3", ("F32", "BF16", "F16", "F8_E8M0")  # safetensors' names
# how fp8 lies in files: what follows a weight's name in its scales', and the ends of the names of
# tensors for inputs and caches, which a model in bfloat16 has no use for
ENDS = {
    "fp8": ("_scale_inv", ("activation_scale",)),
    "compressed-tensors": (
        "_scale",
        (".input_scale", ".output_scale", ".q_scale", ".k_scale", ".v_scale"),
    ),
}
OTHER_SCALES = ("_scale", "_scale_inv")  # which one quantiser or another writes
BLOCKS, MX_SCALES = "_blocks", "_scales"  # of mxfp4


@dataclass(frozen=True)
class PackedTensor:
    """Numbers and scales, by their names in the files, of one tensor of `shape`."""

    numbers: str
    scales: str
    shape: tuple[int, ...]
    block: tuple[int, int] | None  # that one scale is for, in fp8; None for mxfp4


@dataclass(frozen=True, kw_only=True)
class DequantizedModel(ModelFolder):
    """A folder whose packed tensors are bfloat16, and whose configuration says nothing of them."""

    source: ModelFolder
    _packed: Mapping[str, PackedTensor] = field(repr=False)

    @property
    def is_dequantized(self) -> bool:
        """See `ModelFolder`."""
        return True

    def _header(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        packed = self._packed.get(name)
        if packed is None:
            return super()._header(name)
        return packed.shape, torch.bfloat16

    def stored_dtype(self, name: str) -> str:
        """The dtype on disk by safetensors' name; BF16 for what is dequantised."""
        if name in self._packed:
            return "BF16"
        return super().stored_dtype(name)

    def get_tensor(self, name: str) -> torch.Tensor:
        """The tensor, dequantised now. Raises ModelError when a file is damaged."""
        packed = self._packed.get(self.stored(name))
        if packed is None:
            return super().get_tensor(name)
        kind = "mxfp4" if packed.block is None else "fp8"
        warn_once(log, f"{self.ref}: {kind} weights are dequantised to bfloat16 as they are read")
        numbers = self.source.get_tensor(packed.numbers)
        scales = self.source.get_tensor(packed.scales)
        if packed.block is None:
            return dequantize_mxfp4(numbers, scales)
        return dequantize_fp8(numbers, scales, packed.block)


def dequantized(folder: ModelFolder) -> ModelFolder:
    """The folder with its fp8 or mxfp4 weights in bfloat16.

    It is the folder itself where there are none, or other quantised weights too. Raises ModelError
    for scales that do not fit.
    """
    stated = stated_settings(folder.config) or {}
    method = stated.get("quant_method")
    if method == "mxfp4":
        packed, dropped = _in_mxfp4(folder), set[str]()
    elif method == "fp8" or (method == "compressed-tensors" and _is_plain_fp8(stated)):
        packed, dropped = _in_fp8(folder, *ENDS[method], _stated_block(stated))
    else:
        return folder
    for tensor in packed.values():
        dropped |= {tensor.numbers, tensor.scales}
    if not packed or not dropped.issuperset(packed_tensors(folder)):
        return folder
    files = {name: file for name, file in folder.files.items() if name not in dropped}
    for name, tensor in packed.items():
        files[name] = folder.files[tensor.numbers]
    return DequantizedModel(
        folder.path, _plain(folder.config), files, folder.ref, source=folder, _packed=packed
    )


def _in_mxfp4(folder: ModelFolder) -> dict[str, PackedTensor]:
    packed = {}
    for blocks in sorted(folder.keys):
        name = blocks.removesuffix(BLOCKS)
        scales = name + MX_SCALES
        if name == blocks or folder.stored_dtype(blocks) != "U8":
            continue
        if scales not in folder.keys:
            raise _without_scales(folder, blocks, scales)
        if folder.stored_dtype(scales) != "U8":
            continue
        shape, grid = folder.stored_shape(blocks), folder.stored_shape(scales)
        if len(shape) != 4 or shape[:-1] != grid or shape[-1] != 16:
            raise _misfit(folder, scales, grid, shape)
        experts, rows, groups, size = shape
        packed[name] = PackedTensor(blocks, scales, (experts, groups * size * 2, rows), None)
    return packed


def _in_fp8(
    folder: ModelFolder, end: str, needless: tuple[str, ...], stated: tuple[int, int] | None
) -> tuple[dict[str, PackedTensor], set[str]]:
    """The tensors in fp8 that have scales, and the names of those without use."""
    packed = {}
    for name in sorted(folder.keys):
        scales = name + end
        if folder.stored_dtype(name) != FP8:
            continue
        if scales not in folder.keys:
            if folder.keys.isdisjoint(name + other for other in OTHER_SCALES):
                raise _without_scales(folder, name, scales)
            continue
        if folder.stored_dtype(scales) not in SCALES:
            continue
        shape, grid = folder.stored_shape(name), folder.stored_shape(scales)
        block = fp8_block(shape, grid, stated)
        if block is None:
            raise _misfit(folder, scales, grid, shape)
        packed[name] = PackedTensor(name, scales, shape, block)
    return packed, {name for name in folder.keys if name.endswith(needless)}


def _is_plain_fp8(stated: Mapping[str, Any]) -> bool:
    """Whether compressed-tensors' settings mean a weight in fp8 times its scale and nothing else.

    Neither sparse nor rotated, which its other formats and `transform_config` can be.
    """
    groups = stated.get("config_groups")
    if stated.get("format") not in ("float-quantized", "naive-quantized") or not groups:
        return False
    sparsity = stated.get("sparsity_config") or {"format": "dense"}
    if stated.get("transform_config") or not isinstance(sparsity, Mapping):
        return False
    if sparsity.get("format") != "dense":
        return False
    return isinstance(groups, Mapping) and all(_is_fp8_group(each) for each in groups.values())


def _is_fp8_group(group: object) -> bool:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        return False
    is_float = (weights.get("type"), weights.get("num_bits")) == ("float", 8)
    return is_float and weights.get("symmetric") is not False


def _stated_block(stated: Mapping[str, Any]) -> tuple[int, int] | None:
    """The size of blocks that a configuration names, rows first."""
    sizes = [stated.get("weight_block_size")]
    if stated["quant_method"] == "compressed-tensors":
        sizes = []
        for group in stated["config_groups"].values():
            sizes.append(group["weights"].get("block_structure"))
    for size in sizes:
        if isinstance(size, list) and [type(number) for number in size] == [int, int]:
            return (size[0], size[1]) if min(size) > 0 else None
    return None


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the same model without its quantisation."""
    whole = with_text(config, _unquantized(text_config(config)))
    return _unquantized(whole)


def _unquantized(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key not in STATED}


def _misfit(
    folder: ModelFolder, scales: str, grid: tuple[int, ...], shape: tuple[int, ...]
) -> ModelError:
    return ModelError(
        f"{scales} does not fit the weights that it scales: it is {grid}, they are {shape}",
        where=folder.path,
        remedy="Copy or download the model again.",
    )


def _without_scales(folder: ModelFolder, numbers: str, scales: str) -> ModelError:
    return ModelError(
        f"{numbers} is quantised, and the tensor of its scales, {scales}, is missing",
        where=folder.files[numbers],
        remedy="Copy or download the model again, or name the one that it was quantised from.",
    )
