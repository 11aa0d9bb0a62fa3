"""A recipe: one mergekit configuration, read, checked, written, and turned into a model card."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from evomerge.errors import RecipeError

METHODS = {"task_arithmetic": "[Task Arithmetic](https://arxiv.org/abs/2212.04089)"}
DTYPES = ("bfloat16", "float16", "float32")
KEYS = ("base_model", "merge_method", "dtype", "out_dtype", "parameters", "slices", "models", "tokenizer_source")
PARAMETERS = ("weight", "normalize", "lambda", "int8_mask")
BOOLEANS = ("normalize", "int8_mask")
WORDS = dict.fromkeys(("1", "true", "t", "yes", "y", "on"), True) | dict.fromkeys(("0", "false", "f", "no", "n", "off"), False)
LARGEST = {"bfloat16": 3.3895e38, "float16": 65504.0, "float32": 3.4028e38, None: 3.4028e38}  # beyond it a weight rounds to infinity


@dataclass(frozen=True)
class Source:
    """One model in a slice, with its own parameters. `layers` is [start, end), or None for all of them."""

    model: str
    layers: tuple[int, int] | None
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Slice:
    """Layers that are merged alike; its parameters rank below a source's and above the recipe's."""

    sources: tuple[Source, ...]
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """A mergekit configuration. `data` is what was read, untouched; the other fields are its checked form."""

    data: Mapping[str, Any]
    base_model: str
    merge_method: str
    dtype: str | None
    out_dtype: str | None
    parameters: Mapping[str, Any]
    slices: tuple[Slice, ...]  # a `models:` recipe is one slice over all layers
    tokenizer_source: str | None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """Check a configuration. Raises RecipeError naming the key."""
        if not isinstance(data, Mapping):
            raise RecipeError("is not a mapping of keys", where=where, found=data, remedy="Write a mergekit configuration.")
        for key in data:
            if key not in KEYS:
                raise RecipeError(f"`{key}` is not supported", where=where, remedy=f"Supported keys: {', '.join(KEYS)}.")
        method = data.get("merge_method")
        if not isinstance(method, str) or method not in METHODS:
            raise RecipeError("`merge_method` is not supported", where=where, found=method, remedy=f"Use {', '.join(METHODS)}.")
        if not isinstance(data.get("base_model"), str):
            raise RecipeError("`base_model` is missing", where=where, remedy="Name the model that the siblings were fine-tuned from.")
        if bool(data.get("slices")) == bool(data.get("models")):
            raise RecipeError("needs exactly one of `slices` and `models`", where=where, remedy="Keep one of them.")
        for key in ("dtype", "out_dtype"):
            if data.get(key) not in (None, *DTYPES):
                raise RecipeError(f"`{key}` is not supported", where=where, found=data[key], remedy=f"Use one of {', '.join(DTYPES)}.")
        if data.get("tokenizer_source") not in (None, "base"):
            raise RecipeError(
                "`tokenizer_source` is not supported", where=where, found=data["tokenizer_source"], remedy="Use base, or remove it."
            )
        kind = "slices" if data.get("slices") else "models"
        if not isinstance(data[kind], list):
            raise RecipeError(f"`{kind}` is no list", where=where, found=data[kind], remedy="Write one item per line, each after a dash.")
        check = _Checker(data["base_model"], data.get("dtype"))
        if kind == "slices":
            slices = tuple(check.slice(item, f"{where}, slices[{i}]") for i, item in enumerate(data["slices"]))
        else:
            slices = (check.models(data["models"], where),)
        return cls(
            data=copy.deepcopy(dict(data)),
            base_model=data["base_model"],
            merge_method=method,
            dtype=data.get("dtype"),
            out_dtype=data.get("out_dtype"),
            parameters=check.parameters(data.get("parameters"), where),
            slices=slices,
            tokenizer_source=data.get("tokenizer_source"),
        )

    @property
    def siblings(self) -> tuple[str, ...]:
        """Every model but the base, in the order of first use."""
        seen = dict.fromkeys(source.model for piece in self.slices for source in piece.sources)
        return tuple(model for model in seen if model != self.base_model)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as it was read."""
        return copy.deepcopy(dict(self.data))

    def to_yaml(self) -> str:
        """Sorted keys and block style, as the original seed has them; floats keep every digit."""
        return yaml.safe_dump(self.to_dict(), sort_keys=True, allow_unicode=True, default_flow_style=False)

    def digest(self) -> str:
        """SHA-256 of what decides the merged bits: numbers are rounded to the dtype first."""
        rounded = _rounded(self.to_dict(), self.dtype)
        return hashlib.sha256(json.dumps(rounded, sort_keys=True).encode()).hexdigest()


def read_recipe(path: str | Path) -> Recipe:
    """Read a mergekit YAML file. Raises RecipeError."""
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError("no such file", where=path, remedy="Name a mergekit YAML file.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"cannot be read as YAML: {error}", where=path, remedy="Mend the file.") from error
    return Recipe.from_dict(data, str(path))


def task_arithmetic_recipe(
    base: str,
    siblings: Sequence[str],
    slices: Sequence[tuple[int, int]],
    weights: Sequence[Sequence[float]],
    dtype: str = "bfloat16",
    normalize: bool = False,
) -> Recipe:
    """The recipe of one weight per slice and sibling, weights[slice][sibling], in the original seed's shape."""
    pieces = []
    for (start, end), row in zip(slices, weights, strict=True):
        sources: list[dict[str, Any]] = [
            {"layer_range": [start, end], "model": model, "parameters": {"weight": float(w)}}
            for model, w in zip(siblings, row, strict=True)
        ]
        pieces.append({"sources": [*sources, {"layer_range": [start, end], "model": base}]})
    parameters = {"int8_mask": 1.0, "normalize": float(normalize)}
    data = {"base_model": base, "dtype": dtype, "merge_method": "task_arithmetic", "parameters": parameters, "slices": pieces}
    return Recipe.from_dict(data)


def model_card(recipe: Recipe, name: str, extra_markdown: str = "", recipe_text: str | None = None) -> str:
    """A model card with the front matter and sections of mergekit's cards; `extra_markdown` goes before the configuration."""
    models = [recipe.base_model, *recipe.siblings]
    front = yaml.safe_dump(
        {"base_model": [m for m in models if is_hub_name(m)], "library_name": "transformers", "tags": ["mergekit", "merge"]}, sort_keys=True
    )
    bullets = "\n".join(f"* {_link(model)}" for model in recipe.siblings)
    extra = f"{extra_markdown.strip()}\n\n" if extra_markdown else ""
    text = (recipe_text or recipe.to_yaml()).rstrip("\n")
    return (
        f"---\n{front}\n---\n# {name}\n\n"
        "This is a merge of pre-trained language models, found with evomerge; its configuration is "
        "[mergekit](https://github.com/arcee-ai/mergekit)'s.\n\n"
        f"{extra}## Merge Details\n### Merge Method\n\n"
        f"This model was merged using the {METHODS[recipe.merge_method]} merge method using {_link(recipe.base_model)} as a base.\n\n"
        f"### Models Merged\n\nThe following models were included in the merge:\n{bullets}\n\n"
        f"### Configuration\n\nThe following YAML configuration was used to produce this model:\n\n```yaml\n{text}\n```\n"
    )


def is_hub_name(model: str) -> bool:
    """True for `owner/name`, which is no folder here."""
    return model.count("/") == 1 and not model.startswith((".", "/", "~")) and not Path(model).exists()


def _link(model: str) -> str:
    return f"[{model}](https://huggingface.co/{model})" if is_hub_name(model) else model


@dataclass(frozen=True)
class _Checker:
    """The checked forms of a recipe's parts; every method raises RecipeError naming the place."""

    base_model: str
    dtype: str | None

    def slice(self, item: Any, where: str) -> Slice:
        """One item of `slices:`."""
        if not isinstance(item, Mapping) or not isinstance(item.get("sources"), list) or not item["sources"]:
            raise RecipeError(
                "has no list of `sources`", where=where, found=item, remedy="Write sources: [{model, layer_range, parameters}]."
            )
        _known(item, ("sources", "parameters"), where)
        sources = tuple(self.source(s, f"{where}.sources[{i}]", True) for i, s in enumerate(item["sources"]))
        ranges = {source.layers for source in sources}
        if len(ranges) != 1:
            raise RecipeError(
                "sources with different layer ranges are not supported", where=where, found=sorted(map(str, ranges)), remedy="Use one."
            )
        if self.base_model not in (source.model for source in sources):  # mergekit refuses it too
            raise RecipeError("the base is not among the `sources`", where=where, remedy=f"Add {{model: {self.base_model}, layer_range}}.")
        _no_twins(sources, where)
        return Slice(sources, self.parameters(item.get("parameters"), where))

    def models(self, items: Sequence[Any], where: str) -> Slice:
        """The list under `models:`, as one slice over all layers; the base need not be in it."""
        sources = tuple(self.source(item, f"{where}, models[{i}]", False) for i, item in enumerate(items))
        _no_twins(sources, f"{where}, models")
        return Slice(sources, {})

    def source(self, item: Any, where: str, ranged: bool) -> Source:
        """One model with its layer range and parameters."""
        if not isinstance(item, Mapping) or not isinstance(item.get("model"), str):
            raise RecipeError("has no `model`", where=where, found=item, remedy="Name a folder or a hub name.")
        _known(item, ("model", "parameters", "layer_range") if ranged else ("model", "parameters"), where)
        layers = None
        if ranged:
            given = item.get("layer_range")
            if not isinstance(given, list | tuple) or [type(n) for n in given] != [int, int] or not 0 <= given[0] < given[1]:
                raise RecipeError("`layer_range` is no pair of layers", where=where, found=given, remedy="Write [first, last + 1].")
            layers = (given[0], given[1])
        return Source(item["model"], layers, self.parameters(item.get("parameters"), where))

    def parameters(self, value: Any, where: str) -> Mapping[str, Any]:
        """Refuse what mergekit would ignore or turn into NaN tensors."""
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise RecipeError("`parameters` is not a mapping", where=where, found=value, remedy="Write parameters: {weight: 1.0}.")
        for key, setting in value.items():
            if key not in PARAMETERS:
                raise RecipeError(
                    f"parameter `{key}` is not supported", where=where, remedy=f"task_arithmetic has {', '.join(PARAMETERS)}."
                )
            self._setting(key, setting, f"{where}, {key}")
        return dict(value)

    def _setting(self, key: str, setting: Any, where: str) -> None:
        """A scalar, a gradient (list of scalars), or one or several {filter, value}."""
        items = setting if isinstance(setting, list) and setting else [setting]
        if any(isinstance(item, Mapping) for item in items):
            for item in items:
                if not isinstance(item, Mapping) or "value" not in item or not isinstance(item.get("filter"), str | None):
                    raise RecipeError("is no {filter, value}", where=where, found=item, remedy="Write - filter: NAME / value: NUMBER.")
                _known(item, ("filter", "value"), where)
                values = item["value"] if isinstance(item["value"], list) and item["value"] else [item["value"]]
                for value in values:
                    self._scalar(key, value, where)
        else:
            for item in items:
                self._scalar(key, item, where)

    def _scalar(self, key: str, value: Any, where: str) -> None:
        try:
            number = scalar(key, value)
        except (TypeError, ValueError, OverflowError):
            kind = "is no true or false" if key in BOOLEANS else "is no number"
            raise RecipeError(kind, where=where, found=value, remedy="Write a number, a list of numbers or filters.") from None
        if not math.isfinite(number):
            raise RecipeError(f"`{key}` is not finite", where=where, found=number, remedy="NaN and infinite weights give NaN tensors.")
        if abs(number) > LARGEST[self.dtype]:
            raise RecipeError(f"`{key}` is infinite in {self.dtype or 'float32'}", where=where, found=number, remedy="Write a smaller one.")


def scalar(key: str, value: Any) -> float | bool:
    """A parameter's value from YAML, where "0.5" and 1e-3 come as strings. Raises TypeError, ValueError, OverflowError."""
    if key not in BOOLEANS:
        return float(value)
    if isinstance(value, str):
        value = WORDS.get(value.strip().lower(), value)
    if value not in (0, 1):
        raise ValueError(value)
    return bool(value)


def _known(item: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    for key in item:
        if key not in keys:
            raise RecipeError(f"`{key}` is not supported", where=where, remedy=f"Supported keys: {', '.join(keys)}.")


def _no_twins(sources: Sequence[Source], where: str) -> None:
    names = [source.model for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError("a model stands twice", where=where, found=name, remedy="Keep one, with the sum of the weights.")


def _rounded(value: Any, dtype: str | None) -> Any:
    """Every single weight as the merge rounds it; gradients interpolate first, so they stay."""
    if isinstance(value, dict):
        single = {key for key, item in value.items() if key == "weight" and not isinstance(item, list | dict)}
        return {key: _round(float(item), dtype) if key in single else _rounded(item, dtype) for key, item in value.items()}
    return [_rounded(item, dtype) for item in value] if isinstance(value, list) else value


def _round(value: float, dtype: str | None) -> float:
    """To the nearest number of the dtype, ties to even; without a dtype as it is."""
    if dtype is None:
        return value
    if dtype == "float16":
        return float(struct.unpack("<e", struct.pack("<e", value))[0])
    bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
    if dtype == "bfloat16":
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])
