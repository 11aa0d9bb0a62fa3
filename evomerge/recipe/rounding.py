"""A recipe's numbers as the merge rounds them: what its digest sees."""

from __future__ import annotations

import contextlib
import struct
from typing import Any


def rounded(value: Any, dtype: str | None) -> Any:
    """A configuration whose single weights (and slerp's t) are rounded to the dtype.

    Gradients are interpolated first, so they stay.
    """
    if isinstance(value, list):
        return [rounded(item, dtype) for item in value]
    if not isinstance(value, dict):
        return value
    result = {}
    for key, item in value.items():
        result[str(key)] = rounded(item, dtype)
        if key in ("weight", "t") and not isinstance(item, list | dict):
            # a key of that name in a place where nothing reads it may hold anything
            with contextlib.suppress(TypeError, ValueError, OverflowError):
                result[key] = round_to(float(item), dtype)
    return result


def round_to(value: float, dtype: str | None) -> float:
    """The nearest number of the dtype, ties to even; without a dtype the value itself."""
    if dtype is None:
        return value
    if dtype == "float16":
        return float(struct.unpack("<e", struct.pack("<e", value))[0])
    bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
    if dtype == "bfloat16":
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])
