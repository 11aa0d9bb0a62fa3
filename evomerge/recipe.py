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

from evomerge.errors import RecipeError, UnsupportedRecipe

MERGEKIT = "mergekit itself may: pip install 'evomerge[mergekit]'."


@dataclass(frozen=True)
class Method:
    """What a recipe of one merge method must hold."""

    link: str  # for a model card
    base: bool  # a base model among the sources: needed, or (linear) a source like the others
    settings: tuple[str, ...]  # needed for each sibling, or (slerp) for the slice
    parameters: tuple[str, ...] = ()  # of a user's own method, beside PARAMETERS


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
THEIRS = ("modules", "chat_template")  # keys that only mergekit itself understands
# a method ignores those it has no use for
PARAMETERS = ("weight", "density", "t", "normalize", "rescale", "lambda", "int8_mask")
BOOLEANS = ("normalize", "rescale", "int8_mask")
WORDS = dict.fromkeys(("1", "true", "t", "yes", "y", "on"), True) | dict.fromkeys(
    ("0", "false", "f", "no", "n", "off"), False
)
# beyond it a weight rounds to infinity
LARGEST = {"bfloat16": 3.3895e38, "float16": 65504.0, "float32": 3.4028e38, None: 3.4028e38}


@dataclass(frozen=True)
class Source:
    """One model in a slice, with its own parameters. `layers` is [start, end), or None for all of
    them.
    """

    model: str
    layers: tuple[int, int] | None
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Slice:
    """Layers that are merged alike; its parameters rank below a source's and above the recipe's."""

    sources: tuple[Source, ...]
    parameters: Mapping[str, Any]
    base_model: str | None  # its own, or the recipe's

    @property
    def siblings(self) -> tuple[Source, ...]:
        """The sources that are not the base."""
        return tuple(source for source in self.sources if source.model != self.base_model)


@dataclass(frozen=True)
class TokenizerSection:
    """Whose tokens the merged model has: `source` is base, union, or a model."""

    source: str
    tokens: Mapping[str, Any]  # token -> where its row comes from; mergekit's format
    pad_to_multiple_of: int | None


@dataclass(frozen=True)
class Recipe:
    """A mergekit configuration. `data` is what was read, untouched; the other fields are its
    checked form.
    """

    data: Mapping[str, Any]
    base_model: str | None
    merge_method: str
    dtype: str | None
    out_dtype: str | None
    parameters: Mapping[str, Any]
    slices: tuple[Slice, ...]  # a `models:` recipe is one slice over all layers
    tokenizer: TokenizerSection | None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """Check a configuration. Raises RecipeError naming the key, UnsupportedRecipe where only
        mergekit itself can help.
        """
        if not isinstance(data, Mapping):
            raise RecipeError(
                "is not a mapping of keys",
                where=where,
                found=data,
                remedy="Write a mergekit configuration.",
            )
        method = _method(data, where)
        for key in data:
            if key in THEIRS and data[key]:
                raise UnsupportedRecipe(f"`{key}` is not supported", where=where, remedy=MERGEKIT)
            if key not in KEYS + THEIRS:
                raise RecipeError(
                    f"`{key}` is not supported",
                    where=where,
                    remedy=f"Supported keys: {', '.join(KEYS)}.",
                )
        # a slice may name its own base
        own = data.get("slices") if isinstance(data.get("slices"), list) else None
        named = isinstance(data.get("base_model"), str) or (
            own and all(isinstance(s, Mapping) and s.get("base_model") for s in own)
        )
        if METHODS[method].base and not named:
            raise RecipeError(
                "`base_model` is missing",
                where=where,
                remedy="Name the model that the siblings were fine-tuned from.",
            )
        if data.get("base_model") is not None and not isinstance(data["base_model"], str):
            raise RecipeError(
                "`base_model` is no name",
                where=where,
                found=data["base_model"],
                remedy="Name a folder or a hub name.",
            )
        if bool(data.get("slices")) == bool(data.get("models")):
            raise RecipeError(
                "needs exactly one of `slices` and `models`",
                where=where,
                remedy="Keep one of them.",
            )
        for key in ("dtype", "out_dtype"):
            if data.get(key) not in (None, *DTYPES):
                raise UnsupportedRecipe(
                    f"`{key}` is not supported",
                    where=where,
                    found=data[key],
                    remedy=f"Use {', '.join(DTYPES)}.",
                )
        kind = "slices" if data.get("slices") else "models"
        if not isinstance(data[kind], list):
            raise RecipeError(
                f"`{kind}` is no list",
                where=where,
                found=data[kind],
                remedy="Write one item per line, each after a dash.",
            )
        check = _Checker(method, data.get("base_model"), data.get("dtype"))
        if kind == "slices":
            slices = tuple(
                check.slice(item, f"{where}, slices[{i}]") for i, item in enumerate(data["slices"])
            )
        else:
            slices = (check.models(data["models"], where),)
        return cls(
            data=copy.deepcopy(dict(data)),
            base_model=data.get("base_model"),
            merge_method=method,
            dtype=data.get("dtype"),
            out_dtype=data.get("out_dtype"),
            parameters=check.parameters(data.get("parameters"), where),
            slices=slices,
            tokenizer=_tokenizer(data, where),
        )

    @property
    def models(self) -> tuple[str, ...]:
        """Every model, the base first, then in the order of first use."""
        first = [] if self.base_model is None else [self.base_model]
        return tuple(
            dict.fromkeys(
                [*first, *(source.model for piece in self.slices for source in piece.sources)]
            )
        )

    @property
    def donor(self) -> str:
        """The model whose configuration and tokenizer the merged model gets: the base, else the
        first.
        """
        return self.models[0]

    @property
    def siblings(self) -> tuple[str, ...]:
        """Every model but the base, in the order of first use."""
        return tuple(model for model in self.models if model != self.base_model)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as it was read."""
        return copy.deepcopy(dict(self.data))

    def to_yaml(self) -> str:
        """Sorted keys and block style, as the original seed has them; floats keep every digit."""
        return yaml.safe_dump(
            self.to_dict(), sort_keys=True, allow_unicode=True, default_flow_style=False
        )

    def digest(self) -> str:
        """SHA-256 of what decides the merged bits: numbers are rounded to the dtype first."""
        dtype = self.dtype
        if self.merge_method in ("linear", "slerp"):
            dtype = "float32"
        elif self.merge_method not in BUILT_IN:
            dtype = None  # a user's own method may use every digit
        rounded = _rounded(self.to_dict(), dtype)
        return hashlib.sha256(json.dumps(rounded, sort_keys=True).encode()).hexdigest()


def read_recipe(path: str | Path) -> Recipe:
    """Read a mergekit YAML file. Raises RecipeError."""
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError("no such file", where=path, remedy="Name a mergekit YAML file.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(
            f"cannot be read as YAML: {error}", where=path, remedy="Mend the file."
        ) from error
    return Recipe.from_dict(data, str(path))


def task_arithmetic_recipe(
    base: str,
    siblings: Sequence[str],
    slices: Sequence[tuple[int, int]],
    weights: Sequence[Sequence[float]],
    dtype: str = "bfloat16",
    normalize: bool = False,
) -> Recipe:
    """The recipe of one weight per slice and sibling, weights[slice][sibling], in the original
    seed's shape.
    """
    pieces = []
    for (start, end), row in zip(slices, weights, strict=True):
        sources: list[dict[str, Any]] = [
            {"layer_range": [start, end], "model": model, "parameters": {"weight": float(w)}}
            for model, w in zip(siblings, row, strict=True)
        ]
        pieces.append({"sources": [*sources, {"layer_range": [start, end], "model": base}]})
    parameters = {"int8_mask": 1.0, "normalize": float(normalize)}
    data = {
        "base_model": base,
        "dtype": dtype,
        "merge_method": "task_arithmetic",
        "parameters": parameters,
        "slices": pieces,
    }
    return Recipe.from_dict(data)


def _method(data: Mapping[str, Any], where: str) -> str:
    method = data.get("merge_method")
    if not isinstance(method, str):
        raise RecipeError(
            "`merge_method` is missing",
            where=where,
            found=method,
            remedy=f"Use {', '.join(METHODS)}.",
        )
    if method not in METHODS:
        raise UnsupportedRecipe(
            "`merge_method` is not supported",
            where=where,
            found=method,
            remedy=f"Use {', '.join(METHODS)}. {MERGEKIT}",
        )
    return method


def _tokenizer(data: Mapping[str, Any], where: str) -> TokenizerSection | None:
    """`tokenizer_source: X`, or mergekit's longer `tokenizer: {source, tokens,
    pad_to_multiple_of}`.
    """
    section, source = data.get("tokenizer"), data.get("tokenizer_source")
    if section is None:
        if source is not None and not isinstance(source, str):
            raise RecipeError(
                "`tokenizer_source` is no name",
                where=where,
                found=source,
                remedy="Write base, union or a model.",
            )
        return None if source is None else TokenizerSection(source, {}, None)
    if source is not None:
        raise RecipeError(
            "has both `tokenizer` and `tokenizer_source`", where=where, remedy="Keep one of them."
        )
    if not isinstance(section, Mapping):
        raise RecipeError(
            "`tokenizer` is not a mapping",
            where=where,
            found=section,
            remedy="Write tokenizer: {source: union}.",
        )
    _known(section, ("source", "tokens", "pad_to_multiple_of"), f"{where}, tokenizer")
    source, tokens, pad = (
        section.get("source", "union"),
        section.get("tokens") or {},
        section.get("pad_to_multiple_of"),
    )
    if not isinstance(source, str) or not isinstance(tokens, Mapping):
        raise RecipeError(
            "`tokenizer` is malformed",
            where=where,
            found=section,
            remedy="Write tokenizer: {source: union, tokens: {}}.",
        )
    if pad is not None and (not isinstance(pad, int) or isinstance(pad, bool) or pad < 1):
        raise RecipeError(
            "`tokenizer.pad_to_multiple_of` is no number of rows",
            where=where,
            found=pad,
            remedy="Write 64, for example.",
        )
    return TokenizerSection(source, tokens, pad)


@dataclass(frozen=True)
class _Checker:
    """The checked forms of a recipe's parts; every method raises RecipeError naming the place."""

    method: str
    base_model: str | None
    dtype: str | None

    def slice(self, item: Any, where: str) -> Slice:
        """One item of `slices:`."""
        if (
            not isinstance(item, Mapping)
            or not isinstance(item.get("sources"), list)
            or not item["sources"]
        ):
            raise RecipeError(
                "has no list of `sources`",
                where=where,
                found=item,
                remedy="Write sources: [{model, layer_range, parameters}].",
            )
        _known(item, ("sources", "parameters", "base_model"), where)
        sources = tuple(
            self.source(s, f"{where}.sources[{i}]", True) for i, s in enumerate(item["sources"])
        )
        lengths = {end - start for start, end in (source.layers or (0, 0) for source in sources)}
        if len(lengths) != 1:
            raise RecipeError(
                "the sources' layer ranges differ in length",
                where=where,
                found=sorted(lengths),
                remedy="Use as many layers of each.",
            )
        base = item.get("base_model") or self.base_model
        self._inputs(sources, base, where)
        return Slice(sources, self.parameters(item.get("parameters"), where), base)

    def models(self, items: Sequence[Any], where: str) -> Slice:
        """The list under `models:`, as one slice over all layers; a base that is not in it is
        added, as mergekit does.
        """
        sources = tuple(
            self.source(item, f"{where}, models[{i}]", False) for i, item in enumerate(items)
        )
        if self.base_model is not None and self.base_model not in (
            source.model for source in sources
        ):
            sources = (*sources, Source(self.base_model, None, {}))
        self._inputs(sources, self.base_model, f"{where}, models")
        return Slice(sources, {}, self.base_model)

    def _inputs(self, sources: Sequence[Source], base: str | None, where: str) -> None:
        """What mergekit too refuses: the base missing, a model twice, slerp of more or fewer than
        two.
        """
        names = [source.model for source in sources]
        if METHODS[self.method].base and base not in names:
            raise RecipeError(
                "the base is not among the `sources`",
                where=where,
                remedy=f"Add {{model: {base}, layer_range}}.",
            )
        for name in names:
            if names.count(name) > 1:
                raise RecipeError(
                    "a model stands twice",
                    where=where,
                    found=name,
                    remedy="Keep one, with the sum of the weights.",
                )
        if self.method == "slerp" and len(names) != 2:
            raise RecipeError(
                "slerp merges exactly two models",
                where=where,
                found=names,
                remedy="Keep the base and one other.",
            )

    def source(self, item: Any, where: str, ranged: bool) -> Source:
        """One model with its layer range and parameters."""
        if not isinstance(item, Mapping) or not isinstance(item.get("model"), str):
            raise RecipeError(
                "has no `model`", where=where, found=item, remedy="Name a folder or a hub name."
            )
        _known(item, ("model", "parameters", "layer_range"), where)
        layers = None
        if not ranged and item.get("layer_range") is not None:
            raise RecipeError(
                "`layer_range` does nothing under `models`",
                where=where,
                remedy="Remove it, or write `slices`.",
            )
        if ranged:
            given = item.get("layer_range")
            if (
                not isinstance(given, list | tuple)
                or [type(n) for n in given] != [int, int]
                or not 0 <= given[0] < given[1]
            ):
                raise RecipeError(
                    "`layer_range` is no pair of layers",
                    where=where,
                    found=given,
                    remedy="Write [first, last + 1].",
                )
            layers = (given[0], given[1])
        return Source(item["model"], layers, self.parameters(item.get("parameters"), where))

    def parameters(self, value: Any, where: str) -> Mapping[str, Any]:
        """Refuse what mergekit would ignore or turn into NaN tensors."""
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise RecipeError(
                "`parameters` is not a mapping",
                where=where,
                found=value,
                remedy="Write parameters: {weight: 1.0}.",
            )
        known = (*PARAMETERS, *METHODS[self.method].parameters)
        for key, setting in value.items():
            if key not in known:
                raise RecipeError(
                    f"parameter `{key}` is not supported",
                    where=where,
                    remedy=f"Known: {', '.join(known)}.",
                )
            self._setting(key, setting, f"{where}, {key}")
        return dict(value)

    def _setting(self, key: str, setting: Any, where: str) -> None:
        """A scalar, a gradient (list of scalars), or one or several {filter, value}."""
        items = setting if isinstance(setting, list) and setting else [setting]
        if any(isinstance(item, Mapping) for item in items):
            for item in items:
                if (
                    not isinstance(item, Mapping)
                    or "value" not in item
                    or not isinstance(item.get("filter"), str | None)
                ):
                    raise RecipeError(
                        "is no {filter, value}",
                        where=where,
                        found=item,
                        remedy="Write - filter: NAME / value: NUMBER.",
                    )
                _known(item, ("filter", "value"), where)
                values = (
                    item["value"]
                    if isinstance(item["value"], list) and item["value"]
                    else [item["value"]]
                )
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
            raise RecipeError(
                kind,
                where=where,
                found=value,
                remedy="Write a number, a list of numbers or filters.",
            ) from None
        if not math.isfinite(number):
            raise RecipeError(
                f"`{key}` is not finite",
                where=where,
                found=number,
                remedy="NaN and infinite weights give NaN tensors.",
            )
        if abs(number) > LARGEST[None if self.method == "linear" else self.dtype]:
            raise RecipeError(
                f"`{key}` is infinite in {self.dtype or 'float32'}",
                where=where,
                found=number,
                remedy="Write a smaller one.",
            )
        if key == "density" and not 0 < number <= 1:
            raise RecipeError(
                "`density` is out of range",
                where=where,
                found=number,
                remedy="Above 0, at most 1: the share that is kept.",
            )


def scalar(key: str, value: Any) -> float | bool:
    """A parameter's value from YAML, where "0.5" and 1e-3 come as strings. Raises TypeError,
    ValueError, OverflowError.
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


def _known(item: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    for key in item:
        if key not in keys:
            raise RecipeError(
                f"`{key}` is not supported",
                where=where,
                remedy=f"Supported keys: {', '.join(keys)}.",
            )


def _rounded(value: Any, dtype: str | None) -> Any:
    """Every single weight (and slerp's t) as the merge rounds it; gradients interpolate first, so
    they stay.
    """
    if isinstance(value, dict):
        single = {
            key
            for key, item in value.items()
            if key in ("weight", "t") and not isinstance(item, list | dict)
        }
        return {
            key: _round(float(item), dtype) if key in single else _rounded(item, dtype)
            for key, item in value.items()
        }
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
