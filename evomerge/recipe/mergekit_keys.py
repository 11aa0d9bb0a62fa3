"""What a mergekit configuration may contain: methods, keys, dtypes, and how a value is read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from evomerge.errors import RecipeError

MERGEKIT = "mergekit itself may: pip install 'evomerge[mergekit]'."


@dataclass(frozen=True)
class Method:
    """What a recipe of one merge method must contain."""

    link: str  # for a model card
    base: bool  # a base model among the sources: needed, or (linear) a source like the others
    settings: tuple[str, ...]  # needed for each sibling, or (slerp) for the slice
    parameters: tuple[str, ...] = ()  # of a user's own method, besides PARAMETERS


METHODS = {
    "task_arithmetic": Method(
        "[Task Arithmetic](https://arxiv.org/abs/2212.04089)", True, ("weight",)
    ),
    "ties": Method("[TIES](https://arxiv.org/abs/2306.01708)", True, ("weight",)),
    "dare_ties": Method("[DARE TIES](https://arxiv.org/abs/2311.03099)", True, ("weight",)),
    "dare_linear": Method("[Linear DARE](https://arxiv.org/abs/2311.03099)", True, ("weight",)),
    "linear": Method("[Linear](https://arxiv.org/abs/2203.05482)", False, ("weight",)),
    "slerp": Method("[SLERP](https://en.wikipedia.org/wiki/Slerp)", True, ()),
}
BUILT_IN = frozenset(METHODS)  # without the methods that users register
DARE = ("dare_ties", "dare_linear")  # these drop numbers at random
DTYPES = ("bfloat16", "float16", "float32")
KEYS = (
    "base_model",
    "merge_method",
    "dtype",
    "out_dtype",
    "parameters",
    "slices",
    "models",
    "tokenizer_source",
    "tokenizer",
)
MERGEKIT_ONLY = ("modules", "chat_template")  # keys that only mergekit itself understands
# a method ignores those that it does not need
PARAMETERS = ("weight", "density", "t", "normalize", "rescale", "lambda", "int8_mask")
BOOLEANS = ("normalize", "rescale", "int8_mask")
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


def check_keys(found: Iterable[str], keys: Sequence[str], where: str) -> None:
    """Refuse keys other than `keys`. Raises RecipeError."""
    for key in found:
        if key not in keys:
            raise RecipeError(
                f"`{key}` is not supported",
                where=where,
                remedy=f"Supported keys: {', '.join(keys)}.",
            )
