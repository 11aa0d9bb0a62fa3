"""`search:` how CMA-ES searches, and when it ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from evomerge.console import seconds
from evomerge.recipe import METHODS
from evomerge.study.section import (
    Numbers,
    Pair,
    Paths,
    Section,
    Seed,
    StudyName,
    Text,
    as_tuple,
    require,
)

LARGEST_WEIGHT = 1000  # also of a method's own numbers
SMALLEST_RANGE = 1e-6
SMALLEST_OWN_RANGE = 1e-9  # thresholds are as small as 1e-6
SMALLEST_DENSITY = 0.001  # what is kept is multiplied by its inverse
SUBSET = 16  # tasks of a first generation where `search.subset` says nothing


def _ranges(value: object) -> object:
    """Two moderate numbers for each name, as a tuple."""
    remedy = "Write the lowest and the highest value of each, such as {gamma: [0, 0.1]}."
    require(isinstance(value, Mapping), "", "is not a mapping", value, remedy)
    assert isinstance(value, Mapping)
    ranges = {}
    for name, pair in value.items():
        fine = isinstance(name, str) and isinstance(pair, list | tuple) and len(pair) == 2
        for number in pair if fine else ():
            fine = fine and type(number) in (int, float)
            fine = fine and (number == 0 or 1e-9 <= abs(number) <= 1e15)
        require(fine, "", f"has no range for `{name}`", pair, remedy)
        ranges[name] = tuple(pair)
    return ranges


class SearchSection(Section):
    """CMA-ES (Hansen 2016) over the weights."""

    trials: int = Field(
        default=240,
        ge=1,
        le=10**6,
        description="Number of candidates, to which the references (parents and uniform weights) "
        "and the mean are added.",
    )
    population: int | None = Field(
        default=None,
        ge=4,
        le=10**5,
        description="Candidates per generation; null: 4 + floor(3 ln d).",
    )
    ranking: Literal["all", "subset", "race"] = Field(
        default="subset",
        description="What a candidate answers. all: every search task; subset: the tasks of its "
        "generation; race: those, until it is eliminated.",
    )
    subset: int | None = Field(
        default=None,
        ge=2,
        le=10**6,
        description="Number of tasks of the first generation, more as the step size shrinks; null: "
        "16.",
    )
    sampling: Literal["informative", "uniform"] = Field(
        default="informative",
        description="How subset and race draw a generation's tasks. informative: those on which "
        "models differ more often, each counted by the inverse of its chance; uniform: all alike.",
    )
    race_error: float = Field(
        default=0.05,
        ge=1e-6,
        lt=1,
        examples=[0.05],
        description="With race: how often a generation may lose a candidate of its better half.",
    )
    finalists: int = Field(
        default=3,
        ge=1,
        le=10**4,
        description="Number of trials, and of parents and uniform weights, that are compared on "
        "the validation tasks, besides the distribution's mean.",
    )
    recipes: Paths = Field(
        default=(), description="mergekit YAML files that are the first candidates."
    )
    vectors: Annotated[tuple[Numbers, ...], BeforeValidator(as_tuple)] = Field(
        default=(), description="Vectors of the genome that are the first candidates."
    )
    source_study: StudyName | None = Field(
        default=None,
        description="A finished study of the same genome and storage: its distribution is the "
        "first one.",
    )
    warm_start: Literal["auto", "likelihood", "parents"] | None = Field(
        default="auto",
        description="Gradient steps give the first distribution. likelihood: on the references' "
        "likelihood; parents: towards the parent that answers a task better, without references; "
        "auto: the first for a single sibling and tasks with references, else the second, where "
        "the method and the engine allow it; null: none.",
    )
    warm_start_steps: int = Field(
        default=16, ge=1, le=10**5, description="Steps of the warm start."
    )
    lr_adapt: bool = Field(
        default=True, description="Learning-rate adaptation for noise (Nomura et al. 2023)."
    )
    time_limit: Text | None = Field(
        default=None,
        description="90s, 55m, 1h30m or 2d: after it no candidate starts; the mean and the verdict "
        "follow.",
    )
    max_cost: float | None = Field(
        default=None,
        ge=1e-6,
        le=10**12,
        description="A limit on cost, in the currency of the judge's prices and of hourly_price.",
    )
    hourly_price: float = Field(
        default=0.0, ge=0, le=10**9, description="Price of the machine per hour."
    )
    min_sigma: float | None = Field(
        default=None,
        ge=1e-9,
        le=1000,
        description="Ends the search once the step size is below this.",
    )
    patience: int | None = Field(
        default=None,
        gt=0,
        le=10**6,
        description="Ends the search after this many generations without a gain of their mean "
        "beyond noise.",
    )
    sigma: float = Field(
        default=0.3,
        ge=1e-6,
        le=1000,
        examples=[0.3],
        description="First step size, in units of the weight; other numbers take the same share "
        "of their range.",
    )
    start: float | None = Field(
        default=None,
        ge=-LARGEST_WEIGHT,
        le=LARGEST_WEIGHT,
        examples=[0.5],
        description="First mean, the same for every weight; null: 1, and of several models whose "
        "weights are not normalised an equal share of 1. slerp takes the same share of its range; "
        "null: the middle.",
    )
    bounds: Pair | None = Field(
        default=None,
        description="Lowest and highest weight; null: 0 to 2, or -2 to 2 with "
        "allow_negative_weights.",
    )
    start_density: float | None = Field(
        default=None, gt=0, le=1, description="First mean of every density; null: 0.8."
    )
    density_bounds: Pair | None = Field(
        default=None,
        description="Lowest and highest density, from 0.001 to 1; null: 0.1 to 1.",
    )
    parameter_bounds: Annotated[dict[str, Pair], BeforeValidator(_ranges)] = Field(
        default={},
        description="Lowest and highest value of the method's own numbers, such as {gamma: [0, "
        "0.1]}, in place of those of docs/METHODS.md. Of della's epsilon: as shares of the most "
        "that the density leaves.",
    )
    uniform: Numbers = Field(
        default=(0.25, 0.5, 0.75, 1.25),
        description="Weights used for all slices alike, as references that a search must beat.",
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16", description="Precision of the merge and of the live model."
    )
    seed: Seed = Field(default=0, description="Seed of the search.")

    @property
    def demanded_start(self) -> str | None:
        """The warm start that must be possible; None where there is none, or only if it can be."""
        if self.warm_start == "auto":
            return None
        return self.warm_start

    def first_tasks(self, searched: int) -> int:
        """How many of the search tasks rank a first generation."""
        if self.ranking == "all":
            return searched
        return min(searched, self.subset or SUBSET)

    @field_validator("time_limit")
    @classmethod
    def _check_duration(cls, text: str | None) -> str | None:
        holds = text is None or seconds(text) is not None
        require(holds, "", "is not a duration above 0", text, "Write 90s, 55m, 1h30m or 2d.")
        return text

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if self.bounds is not None:
            low, high = self.bounds
            require(
                -LARGEST_WEIGHT <= low <= high - SMALLEST_RANGE and high <= LARGEST_WEIGHT,
                "bounds",
                "is not a range of weights",
                self.bounds,
                f"Write [lowest, highest], at least {SMALLEST_RANGE} apart, from -{LARGEST_WEIGHT} "
                f"to {LARGEST_WEIGHT}.",
            )
        if self.density_bounds is not None:
            sparse, dense = self.density_bounds
            require(
                SMALLEST_DENSITY <= sparse <= dense - SMALLEST_RANGE and dense <= 1,
                "density_bounds",
                "is not a range of densities",
                self.density_bounds,
                f"Write [lowest, highest], above 0 (at least {SMALLEST_DENSITY}) and at most 1.",
            )
        return self

    @model_validator(mode="after")
    def _check_start(self) -> Self:
        first = len(self.recipes) + len(self.vectors)
        require(
            self.subset is None or self.ranking != "all",
            "subset",
            "applies only to `ranking: subset` or `race`",
            self.subset,
            "Set one of them, or remove it.",
        )
        require(
            first == 0 or self.population is None or first <= self.population,
            "population",
            f"is too small for the {first} first candidates",
            self.population,
            f"Use at least {first}.",
        )
        require(
            self.source_study is None or self.demanded_start is None,
            "source_study",
            "sets the start, and so does `warm_start`",
            self.source_study,
            "Remove one of them.",
        )
        return self


def check_parameter_bounds(given: Mapping[str, tuple[float, float]], method: str) -> None:
    """State the rules on `search.parameter_bounds`, which depend on the method."""
    searched = METHODS[method].searched
    for name, (low, high) in given.items():
        key = f"search.parameter_bounds.{name}"
        own = searched.get(name)
        if own is None:
            genes = ", ".join(searched) or "none"
            what = f"has no effect: of {method}'s own numbers a search sets {genes}"
            require(False, key, what, [low, high], "Name one of these, or remove it.")
            continue
        least, most = float(-LARGEST_WEIGHT), float(LARGEST_WEIGHT)
        if own.low is not None:
            least = max(least, own.low)
        if own.high is not None:
            most = min(most, own.high)
        if own.within_density:
            assert own.search is not None
            most = own.search[1]
        require(
            least <= low <= high - SMALLEST_OWN_RANGE and high <= most,
            key,
            "is not a range of this parameter",
            [low, high],
            f"Write [lowest, highest], from {least:g} to {most:g}.",
        )
