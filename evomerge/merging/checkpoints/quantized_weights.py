"""Models whose files hold quantised weights, which cannot be merged number by number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    """Raise ModelError for bitsandbytes, GPTQ, AWQ and their like.

    The tensors decide: a configuration may still name the quantisation that a model was trained in
    when its weights are plain numbers.
    """
    if len(model.places) > 1:
        return  # an adapter's base was looked at when it was opened
    for name in packed_tensors(model):
        stated = _kind(model.config) or f"{name} is {model.stored_dtype(name)}"
        raise ModelError(
            f"the model is quantised ({stated}), and only plain numbers can be merged",
            where=model.path,
            remedy="Name the model that it was quantised from, or a dequantised copy of it.",
        )


def packed_tensors(model: ModelFolder) -> Iterator[str]:
    """The names of tensors that are no plain numbers, sorted."""
    is_stated = _kind(model.config) is not None
    for name in sorted(model.keys):
        dtype = model.stored_dtype(name)
        packed = dtype in PACKED and (is_stated or name.endswith(WEIGHTS))
        if packed or dtype.startswith(SCALED):
            yield name


def stated_settings(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a configuration says of the model's quantisation; None where it names no method."""
    text_config = config.get("text_config")
    for settings in (config, text_config if isinstance(text_config, Mapping) else {}):
        for key in STATED:
            stated = settings.get(key)
            if isinstance(stated, Mapping) and stated.get("quant_method"):
                return stated
    return None


def _kind(config: Mapping[str, Any]) -> str | None:
    """The quantisation that a configuration states: "gptq, 4 bits"."""
    stated = stated_settings(config)
    return None if stated is None else _with_bits(stated)


def _with_bits(stated: Mapping[str, Any]) -> str:
    bits = stated.get("bits") or stated.get("w_bit")
    for number in (4, 8):
        if stated.get(f"load_in_{number}bit"):
            bits = number
    method = str(stated["quant_method"])
    return method if bits is None else f"{method}, {bits} bits"
