"""What a mergekit configuration may contain: methods, keys, dtypes, and how a value is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

MERGEKIT = "mergekit itself may: pip install 'evomerge[mergekit]'."


@dataclass(frozen=True, kw_only=True)
class MethodTraits:
    """What a merge method needs and does; `evomerge.merging.methods` has the functions."""

    link: str = ""  # Markdown for a model card
    # a base model among the sources; else the base, if there is one, is a source like the others
    needs_base: bool = True
    takes_deltas: bool = False  # the function gets siblings minus base, else the siblings
    elementwise: bool = False  # each element depends on its own place only: merged in chunks
    weighted: bool = True  # needs the parameter `weight` of every sibling
    has_densities: bool = False  # takes the parameter `density` of every sibling, 1 by default
    draws: bool = False  # thins deltas out at random where the density is below 1
    rounds_weights: bool = True  # to the dtype of the tensors; else it computes in float32
    normalize: bool = False  # the parameter's default
    rescale: bool = False  # the parameter's default
    # further parameters with their defaults; None: the recipe must give one
    parameters: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def reads(self) -> frozenset[str]:
        """The parameters of a recipe that may decide something, and `int8_mask`, on every card."""
        names = {"int8_mask", *self.parameters}
        if self.weighted:
            names |= {"weight", "normalize"}
        if self.has_densities:
            names.add("density")
        if self.takes_deltas:
            names |= {"lambda", "rescale"}
        return frozenset(names)


DARE_TRAITS = MethodTraits(takes_deltas=True, has_densities=True, draws=True, rescale=True)
METHODS: dict[str, MethodTraits] = {
    "task_arithmetic": MethodTraits(
        link="[Task Arithmetic](https://arxiv.org/abs/2212.04089)",
        takes_deltas=True,
        elementwise=True,
    ),
    "ties": MethodTraits(
        link="[TIES](https://arxiv.org/abs/2306.01708)",
        takes_deltas=True,
        has_densities=True,
        normalize=True,
    ),
    "dare_ties": replace(DARE_TRAITS, link="[DARE TIES](https://arxiv.org/abs/2311.03099)"),
    "dare_linear": replace(DARE_TRAITS, link="[Linear DARE](https://arxiv.org/abs/2311.03099)"),
    "linear": MethodTraits(
        link="[Linear](https://arxiv.org/abs/2203.05482)",
        needs_base=False,
        elementwise=True,
        rounds_weights=False,
        normalize=True,
    ),
    "slerp": MethodTraits(
        link="[SLERP](https://en.wikipedia.org/wiki/Slerp)", weighted=False, parameters={"t": None}
    ),
}
BUILT_IN = tuple(METHODS)  # without the methods that users register
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
    "modules",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
)
# built-in values of `chat_template`; `evomerge.merging.vocabulary` has the templates
CHAT_TEMPLATES = ("alpaca", "chatml", "exaone", "llama3", "mistral")
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
