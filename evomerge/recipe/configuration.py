"""The recipe itself: read from a mergekit YAML, built from weights, digested, written."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from evomerge.errors import RecipeError
from evomerge.recipe.layers import Slice, TokenizerSection
from evomerge.recipe.method_traits import METHODS
from evomerge.recipe.model_references import override_architecture
from evomerge.recipe.modules import in_modules, listed, over
from evomerge.recipe.own_methods import OWN
from evomerge.recipe.parameter_checks import ParameterChecks
from evomerge.recipe.rounding import rounded
from evomerge.recipe.source_checks import SourceChecks
from evomerge.recipe.top_level_checks import (
    check_top_level,
    read_base,
    read_chat_template,
    read_dtype,
    read_tokenizer_section,
)
from evomerge.recipe.unread_keys import UnreadKeys
from evomerge.yaml_json import read_yaml

MODEL_KEYS = ("model", "base_model", "tokenizer_source")


@dataclass(frozen=True)
class Recipe:
    """A mergekit configuration: `data` as it was read, the other fields in checked form."""

    data: Mapping[str, Any]
    base_model: str | None
    merge_method: str
    dtype: str | None
    out_dtype: str | None
    parameters: Mapping[str, Any]
    slices: tuple[Slice, ...]  # a `models:` recipe is one slice over all layers
    tokenizer: TokenizerSection | None
    chat_template: str | None = None  # auto, a built-in name, or Jinja
    architecture: str | None = None  # in place of the class in the donor's config.json
    # as mergekit names them, where only the text decoder is merged and the others are the base's
    modules: tuple[str, ...] = ()
    # keys that nothing reads, as in mergekit, each with its place
    unread: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], where: str = "recipe", folder: Path | None = None
    ) -> Recipe:
        """Check a configuration.

        The file of a user's own method is relative to `folder`, or to where the program runs.
        Raises RecipeError naming the key, UnsupportedRecipe where only mergekit itself can help.
        """
        unread = UnreadKeys(where)
        method = check_top_level(data, where, unread, folder)
        merged = listed(data, where, unread)
        base, dtype = read_base(data, merged, method, where), read_dtype(data, "dtype", where)
        values = ParameterChecks(method, dtype, unread)
        sources = SourceChecks(method, base, values)
        if merged.kind == "slices":
            items = enumerate(merged.items)
            slices = tuple(sources.slice(item, f"{merged.where}, slices[{i}]") for i, item in items)
        else:
            slices = (sources.models(merged.items, merged.where),)
        parameters = values.parameters(data.get("parameters"), where)
        return cls(
            data=copy.deepcopy({**data, "merge_method": method}),
            base_model=base,
            merge_method=method,
            dtype=dtype,
            out_dtype=read_dtype(data, "out_dtype", where),
            parameters=over(values.parameters(merged.parameters, merged.where), parameters),
            slices=slices,
            tokenizer=read_tokenizer_section(data, where, unread),
            chat_template=read_chat_template(data, where),
            architecture=override_architecture(data.get("base_model")),
            modules=merged.modules,
            unread=tuple(unread.found),
        )

    @property
    def models(self) -> tuple[str, ...]:
        """Every model, the base first, then in the order of first use."""
        used = []
        if self.base_model is not None:
            used.append(self.base_model)
        for piece in self.slices:
            used += [source.model for source in piece.sources]
        return tuple(dict.fromkeys(used))

    @property
    def donor(self) -> str:
        """The model that lends configuration and tokenizer: the base, else the first."""
        return self.models[0]

    @property
    def siblings(self) -> tuple[str, ...]:
        """Every model but the base, in the order of first use."""
        return tuple(model for model in self.models if model != self.base_model)

    @property
    def note(self) -> str | None:
        """A line that names the keys that nothing reads; None without any."""
        if not self.unread:
            return None
        return f"note: ignored, as in mergekit: {'; '.join(self.unread)}"

    def to_dict(self) -> dict[str, Any]:
        """The configuration as it was read."""
        return copy.deepcopy(dict(self.data))

    def in_modules(self, names: tuple[str, ...]) -> Recipe:
        """The same merge, written for a model with these modules."""
        return Recipe.from_dict(in_modules(self.to_dict(), names))

    def to_yaml(self) -> str:
        """Sorted keys and block style, as the original seed has them; floats keep every digit."""
        return yaml.safe_dump(
            self.to_dict(), sort_keys=True, allow_unicode=True, default_flow_style=False
        )

    def digest(self, names: Mapping[str, str] | None = None) -> str:
        """SHA-256 of what decides the merged bits: numbers are rounded to the dtype first.

        `names` are other names for its models.
        """
        dtype: str | None = METHODS[self.merge_method].same_when_rounded_to
        if dtype == "dtype":
            dtype = self.dtype
        data = _renamed(self.to_dict(), names or {})
        if self.merge_method in OWN:  # by what it does, wherever its file is
            data["merge_method"] = OWN[self.merge_method].digest
        # what nothing reads may hold values that JSON lacks, such as dates
        text = json.dumps(rounded(data, dtype), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def _renamed(data: Any, names: Mapping[str, str], key: str = "") -> Any:
    """The configuration with other names for its models."""
    if isinstance(data, dict):
        return {name: _renamed(value, names, name) for name, value in data.items()}
    if isinstance(data, list):
        return [_renamed(value, names) for value in data]
    if key in MODEL_KEYS and isinstance(data, str):
        return names.get(data, data)
    return data


def read_recipe(path: str | Path) -> Recipe:
    """Read a mergekit YAML file. Raises RecipeError."""
    return Recipe.from_dict(read_yaml(Path(path), RecipeError), str(path), Path(path).parent)


def task_arithmetic_recipe(
    base: str,
    siblings: Sequence[str],
    slices: Sequence[tuple[int, int]],
    weights: Sequence[Sequence[float]],
    dtype: str = "bfloat16",
    normalize: bool = False,
) -> Recipe:
    """The recipe of one weight per slice and sibling, in the original seed's shape.

    `slices` are [start, end) layers, `weights` is weights[slice][sibling].
    """
    pieces = []
    for (start, end), row in zip(slices, weights, strict=True):
        sources: list[dict[str, Any]] = []
        for model, weight in zip(siblings, row, strict=True):
            parameters = {"weight": float(weight)}
            sources.append({"layer_range": [start, end], "model": model, "parameters": parameters})
        sources.append({"layer_range": [start, end], "model": base})
        pieces.append({"sources": sources})
    data = {
        "base_model": base,
        "dtype": dtype,
        "merge_method": "task_arithmetic",
        "parameters": {"int8_mask": 1.0, "normalize": float(normalize)},
        "slices": pieces,
    }
    return Recipe.from_dict(data)
