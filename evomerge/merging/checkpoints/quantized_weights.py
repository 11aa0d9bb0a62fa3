"""Models whose files hold quantised weights, which cannot be merged number by number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomerge.errors import ModelError
from evomerge.merging.checkpoints.model_folder import ModelFolder

STATED = ("quantization_config", "compression_config")  # keys of config.json
# safetensors' names of dtypes: those of scaled numbers, and those that hold packed ones, but also
# the masks of old GPT models
SCALED = ("F8_", "F4", "F6_")
PACKED = ("U8", "I8", "U16", "I16", "U32", "I32")
# the ends of packed tensors' names
WEIGHTS = (".weight", ".qweight", ".weight_packed", "_blocks", ".W_q", ".codes")


def refuse_quantized(model: ModelFolder) -> None:
    """Raise ModelError for fp8, bitsandbytes, GPTQ, AWQ, MXFP4 and their like.

    The tensors decide: a configuration may still name the quantisation that a model was trained in
    when its weights are plain numbers.
    """
    if len(model.places) > 1:
        return  # an adapter's base was looked at when it was opened
    stated = _kind(model.config)
    for name in sorted(model.keys):
        dtype = model.stored_dtype(name)
        packed = dtype in PACKED and (stated is not None or name.endswith(WEIGHTS))
        if packed or dtype.startswith(SCALED):
            raise ModelError(
                f"the model is quantised ({stated or f'{name} is {dtype}'}), and only plain "
                "numbers can be merged",
                where=model.path,
                remedy="Name the model that it was quantised from, or a dequantised copy of it.",
            )


def _kind(config: Mapping[str, Any]) -> str | None:
    """The quantisation that a configuration states: "gptq, 4 bits"."""
    text_config = config.get("text_config")
    for settings in (config, text_config if isinstance(text_config, Mapping) else {}):
        for key in STATED:
            stated = settings.get(key)
            if isinstance(stated, Mapping) and stated.get("quant_method"):
                return _with_bits(stated)
    return None


def _with_bits(stated: Mapping[str, Any]) -> str:
    bits = stated.get("bits") or stated.get("w_bit")
    for number in (4, 8):
        if stated.get(f"load_in_{number}bit"):
            bits = number
    method = str(stated["quant_method"])
    return method if bits is None else f"{method}, {bits} bits"
