"""`genome:` what is merged and how, with mergekit-evolve's keys."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from evomerge.errors import RecipeError
from evomerge.recipe import METHODS, find_method
from evomerge.recipe.model_references import OLD_PREFIX
from evomerge.recipe.source_checks import number_of_models
from evomerge.study.section import (
    ModelRef,
    Remedy,
    Section,
    Text,
    Texts,
    as_tuple,
    model_path,
    require,
)

IN_A_FILE = r"\.py:[A-Za-z_]\w*$"  # a method of a user's own
# without the methods that a program registers
BUILT_IN = [name for name, traits in METHODS.items() if traits.built_in]
NORMALIZED = [
    name for name in BUILT_IN if METHODS[name].normalize or METHODS[name].search_normalizes
]
log = logging.getLogger(__name__)


def mixes_models(method: str) -> bool:
    """Whether models are mixed as they are: the base, if there is one, is one more of them."""
    return METHODS[method].walks or not METHODS[method].sets_base_apart


def _searchable(method: str, info: ValidationInfo) -> str:
    """A method of this name exists, and what its recipes must hold are numbers with genes.

    A user's own file is relative to the study file.
    """
    folder = None
    if isinstance(info.context, Path):
        folder = info.context
    try:
        method = find_method(method, folder, "")
    except RecipeError as error:
        require(False, "", f"is not a merge method: {error.what}", method, str(error.remedy))
    traits = METHODS.get(method)
    names = f"Use {', '.join(METHODS)}, or one that your program has registered."
    require(traits is not None, "", "is not a merge method", method, names)
    assert traits is not None
    if traits.walks:
        return method
    numbers = traits.searchable
    merged = "Merge it with `evomerge merge`."
    if traits.built_in:
        require(numbers, "", "has no numbers that could be searched", method, merged)
    needed = []
    for own in traits.own.values():
        if own.default is None and own.search is None:
            needed.append(own)
    what = "cannot be searched: its recipes need more than weights and densities"
    remedy = "Register it with `weighted`, and with a default for each of its parameters."
    require(numbers and not needed, "", what, method, remedy)
    return method


class GenomeSection(Section):
    """What is merged and how: mergekit-evolve's keys."""

    models: Annotated[
        tuple[ModelRef, ...],
        BeforeValidator(as_tuple),
        Remedy("Name at least one fine-tuned sibling."),
    ] = Field(
        min_length=1,
        description="Folders, hub names or MODEL+ADAPTER; with a base, its fine-tuned siblings: "
        "the base itself is left out.",
    )
    base_model: ModelRef | None = Field(
        default=None,
        description="The model that the siblings come from. Some methods need none "
        "(docs/METHODS.md): linear, for one, takes it as one more model to mix.",
    )
    merge_method: Annotated[
        str,
        AfterValidator(_searchable),
        WithJsonSchema({"anyOf": [{"enum": BUILT_IN}, {"type": "string", "pattern": IN_A_FILE}]}),
    ] = Field(
        default="task_arithmetic",
        description="How the models are merged: a method of docs/METHODS.md, or your own as "
        "FILE.py:FUNCTION, whose code is run.",
    )
    layer_granularity: Annotated[int, Remedy("Use 1 or more layers, or -1 for one slice.")] = Field(
        default=-1,
        ge=-1,
        le=10**6,
        description="Layers per slice; -1 or 0: one slice holds all layers.",
    )
    normalize: bool | None = Field(
        default=None,
        description=f"Divide by the sum of the weights; null: true for {', '.join(NORMALIZED)}.",
    )
    allow_negative_weights: bool = Field(
        default=False, description="Changes the default of search.bounds to -2 to 2."
    )
    tokenizer_source: Text | None = Field(
        default=None,
        description="Whose tokens the merged model has: base, union or a model; null: the base's "
        "files, unchanged.",
    )
    smooth: bool = Field(
        default=False,
        description="Weights are points of a line along the layers instead of steps.",
    )
    filters: Texts | None = Field(
        default=None,
        description="Parts of tensor names. The tensors that match each one get their own weights, "
        "as do those that match none.",
    )

    outside: Literal["base", "first"] = Field(
        default="base",
        description="Tensors outside the text path, such as a vision tower: the base's, or merged "
        "like the first slice. Filters that name them decide first.",
    )

    @property
    def all_models(self) -> tuple[str, ...]:
        """Every model to load; the first lends configuration and tokenizer."""
        first: tuple[str, ...] = ()
        if self.base_model is not None:
            first = (self.base_model,)
        return tuple(dict.fromkeys(first + self.models))

    @field_validator("tokenizer_source")
    @classmethod
    def _tokenizer_path(cls, source: str | None, info: ValidationInfo) -> str | None:
        if source in (None, "base", "union"):
            return source
        plain = source.removeprefix(OLD_PREFIX)
        old = "has a form that mergekit no longer reads"
        require(plain == source, "", old, source, f"Write {plain}, without `{OLD_PREFIX}`.")
        return model_path(source, info)

    @model_validator(mode="after")
    def _check_models(self) -> Self:
        method, base = self.merge_method, self.base_model
        mixed, traits = mixes_models(method), METHODS[method]
        if traits.needs_base and not mixed:
            need = f"Add the model that the siblings come from: {method} needs it."
            require(base is not None, "base_model", "is missing", None, need)
        twice = [model for model in self.models if self.models.count(model) > 1]
        require(not twice, "models", "names a model twice", next(iter(twice), None), "Keep one.")
        if not mixed and base in self.models:
            log.warning("genome.models: the base is left out, whose weight has no effect: %s", base)
            siblings = tuple(model for model in self.models if model != base)
            object.__setattr__(self, "models", siblings)  # it is frozen from here on
        if not traits.walks:
            merged = self.all_models if mixed else self.models
            least, most = traits.siblings
            holds = least <= len(merged) and (most is None or len(merged) <= most)
            number = f"are not those of {method}, which merges {number_of_models(traits)}"
            require(holds, "models", number, merged, "Add or remove some.")
        require(
            len(self.all_models) >= 2 or (traits.siblings[1] == 1 and not traits.walks),
            "models",
            f"has too few: {method} needs at least two models",
            self.models,
            "Add one, or a base_model.",
        )
        return self

    @model_validator(mode="after")
    def _check_walk(self) -> Self:
        method = self.merge_method
        if METHODS[method].walks:
            require(
                not self.smooth, "smooth", f"cannot be combined with {method}", True, "Remove it."
            )
            require(
                not self.filters,
                "filters",
                f"cannot be combined with {method}",
                self.filters,
                "Remove it.",
            )
            require(
                self.tokenizer_source != "union" or len(self.all_models) <= 2,
                "tokenizer_source",
                f"cannot be union here: {method} mixes other models in each candidate, and their "
                "union of tokens would change with them",
                self.tokenizer_source,
                "Set it to base, or name one model.",
            )
        return self

    @model_validator(mode="after")
    def _check_filters(self) -> Self:
        filters = self.filters or ()
        for i, text in enumerate(filters):
            decides = text not in ("", "*") and not any(earlier in text for earlier in filters[:i])
            require(
                decides,
                "filters",
                "contains one that has no effect",
                text,
                "Remove it: an earlier filter, or every tensor, matches it.",
            )
        return self
