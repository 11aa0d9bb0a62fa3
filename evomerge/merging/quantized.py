"""Writing a merged weight into a live one: a copy, or for a 4-bit one what a fresh load would give.

bitsandbytes cuts a weight into blocks (64 numbers), keeps each block's largest magnitude (absmax)
and a 4-bit index into the table of NF4 (QLoRA, arXiv:2305.14314, section 3); with double
quantisation the absmax are kept in 8 bits, around an offset. bitsandbytes is optional, and
imported only once a model needs it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D


def is_quantized(parameter: torch.Tensor) -> bool:
    """Whether `parameter` is a 4-bit weight of bitsandbytes that holds quantised numbers."""
    # as long as it is not imported, no parameter can be one of its class
    bitsandbytes: Any = sys.modules.get("bitsandbytes")
    return (
        bitsandbytes is not None
        and isinstance(parameter, bitsandbytes.nn.Params4bit)
        and getattr(parameter, "quant_state", None) is not None
    )


def shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """The weight's shape in the model's files; the packed bytes have (numbers / 2, 1)."""
    if not is_quantized(parameter):
        return tuple(parameter.shape)
    unpacked = tuple(_state(parameter).shape)
    return unpacked[::-1] if _is_transposed(parameter) else unpacked


def dtype(parameter: torch.Tensor) -> torch.dtype:
    """The dtype that the numbers were quantised from, and have again when they are used."""
    if not is_quantized(parameter):
        return parameter.dtype
    state = _state(parameter)
    # A forward pass on the CPU may have set `dtype` to what its kernel computes in; see
    # `copy_or_quantize`.
    kept: torch.dtype = getattr(state, "original_dtype", None) or state.dtype
    return kept


@torch.no_grad()
def copy_or_quantize(parameter: torch.Tensor, merged: torch.Tensor) -> None:
    """Quantise `merged` into `parameter`, or copy it where the parameter is an ordinary one.

    merged: `shape(parameter)`, on the parameter's device.

    Equal in every bit to loading the merged weight in 4 bits: the same function of bitsandbytes
    with the parameter's own settings, on the same device. The parameter, its state and, where they
    still fit, the state's tensors stay the same objects. They do not fit after a forward pass on a
    CPU with AVX512-BF16: bitsandbytes then reorders the packed bytes, un-nests and rounds the
    absmax to bfloat16, and leaves tensors that inference mode locks. Those are replaced, and the
    marks of that layout removed, so that the next forward pass reorders the new bytes.
    """
    assert tuple(merged.shape) == shape(parameter), (merged.shape, shape(parameter))
    assert merged.device == parameter.device, (merged.device, parameter.device)
    if not is_quantized(parameter):
        parameter.copy_(merged)
        return
    from bitsandbytes.functional import quantize_4bit

    held: Any = parameter
    weight = merged.to(dtype(parameter))
    if _is_transposed(parameter):
        weight = weight.T
    packed, fresh = quantize_4bit(
        weight.contiguous(),
        blocksize=held.blocksize,
        compress_statistics=held.compress_statistics,
        quant_type=held.quant_type,
        quant_storage=held.quant_storage,
    )
    if _fits(parameter, packed):
        parameter.copy_(packed)
    else:
        parameter.data = packed
    _renew(held.quant_state, fresh)


def _renew(state: Any, fresh: Any) -> None:
    """Make one QuantState equal to another, keeping tensors and nested states where they fit."""
    for name in vars(state).keys() - vars(fresh).keys():
        delattr(state, name)
    for name, new in vars(fresh).items():
        old = vars(state).get(name)
        if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor) and _fits(old, new):
            old.copy_(new)
        elif type(old) is type(new) is type(state):
            _renew(old, new)
        else:
            setattr(state, name, new)


def _fits(old: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether `new` can be copied into `old`: the same layout, and not locked by inference mode."""
    same = old.shape == new.shape and old.dtype == new.dtype and old.device == new.device
    return same and not old.is_inference()


def _state(parameter: torch.Tensor) -> Any:
    held: Any = parameter
    return held.quant_state


def _is_transposed(parameter: torch.Tensor) -> bool:
    """Whether the file has (in, out), as GPT-2's Conv1D; transformers transposes that first."""
    source = getattr(getattr(parameter, "module", None), "source_cls", None)
    return isinstance(source, type) and issubclass(source, Conv1D)
