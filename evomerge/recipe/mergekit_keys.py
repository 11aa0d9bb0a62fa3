"""What a mergekit configuration may contain: keys, dtypes, and how a value is read."""

from __future__ import annotations

from typing import Any

from evomerge.recipe.method_traits import METHODS

MERGEKIT = "mergekit itself may: pip install 'evomerge[mergekit]'."


DTYPES = ("bfloat16", "float16", "float32")
KEYS = (
    "base_model",
    "merge_method",
    "dtype",
    "out_dtype",
    "parameters",
    "slices",
    "models",
    "modules",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
)
# built-in values of `chat_template`; `evomerge.merging.vocabulary` has the templates
CHAT_TEMPLATES = ("alpaca", "chatml", "exaone", "llama3", "mistral")
# those that no method has for itself; a method ignores those that it does not need
COMMON_PARAMETERS = ("weight", "density", "normalize", "rescale", "lambda", "int8_mask")
SWITCHES = [
    name for traits in METHODS.values() for name, own in traits.own.items() if own.kind == "switch"
]
BOOLEANS = ("normalize", "rescale", "int8_mask", *SWITCHES)
WORDS = dict.fromkeys(("1", "true", "t", "yes", "y", "on"), True) | dict.fromkeys(
    ("0", "false", "f", "no", "n", "off"), False
)
# a larger weight rounds to infinity
LARGEST = {"bfloat16": 3.3895e38, "float16": 65504.0, "float32": 3.4028e38, None: 3.4028e38}


def scalar(key: str, value: Any) -> float | bool:
    """A parameter's value from YAML, where "0.5" and 1e-3 come as strings.

    Raises TypeError, ValueError, OverflowError.
    """
    # float reads other scripts' digits, which mergekit does not
    if isinstance(value, str) and not value.isascii():
        raise ValueError(value)
    if key not in BOOLEANS:
        return float(value)
    if isinstance(value, str):
        value = WORDS.get(value.lower(), value)
    if value not in (0, 1):
        raise ValueError(value)
    return bool(value)
