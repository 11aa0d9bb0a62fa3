"""What is known of each merge method without torch: its sources, parameters and their limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class MethodParameter:
    """A parameter that some method has besides weight, density and the like."""

    default: float | bool | None = None  # None: the recipe must give one
    low: float | None = None  # the least that a recipe may give
    high: float | None = None
    kind: Literal["number", "whole", "switch"] = "number"
    per_model: bool = False  # each sibling has its own, else one for all of them
    search: tuple[float, float] | None = None  # the range of its gene; None: it is not searched
    # the gene is a share of min(density, 1 - density), the most that the density leaves
    within_density: bool = False

    @property
    def start(self) -> float:
        """The gene's first mean: the default, or the middle where that is not inside the range."""
        assert self.search is not None
        low, high = self.search
        if self.default is None or self.within_density or not low < self.default < high:
            return (low + high) / 2
        return float(self.default)


@dataclass(frozen=True, kw_only=True)
class MethodTraits:
    """What a merge method needs and does; `evomerge.merging.methods` has the functions."""

    link: str = ""  # Markdown for a model card
    # a base model among the sources; else the base, if there is one, is a source like the others
    needs_base: bool = True
    optional_base: bool = False  # needs none, but one that is there is not like the others
    siblings: tuple[int, int | None] = (0, None)  # fewest and most sources besides the base
    takes_deltas: bool = False  # the function gets siblings minus base, else the siblings
    elementwise: bool = False  # each element depends on its own place only: merged in chunks
    weighted: bool = True  # needs the parameter `weight` of every sibling
    normalizes: bool = True  # takes the parameter `normalize`, if it is weighted
    scales: bool = True  # takes `lambda` and `rescale`, if it takes deltas
    has_densities: bool = False  # takes the parameter `density` of every sibling, 1 by default
    draws: bool = False  # thins deltas out at random where the density is below 1
    samples: int = 0  # draws so many numbers for a tensor of more elements
    rounds_weights: bool = True  # to the dtype of the tensors; else they keep more digits
    # what a recipe's weights and t may be rounded to without changing a bit of the merge, so that
    # recipes that merge alike share their answers; None: every digit may count
    same_when_rounded_to: Literal["dtype", "float32"] | None = None
    finite: bool = False  # finite tensors give finite ones, so that the result is not looked at
    widens: bool = False  # gives float32 whatever it gets
    normalize: bool = False  # the parameter's default
    search_normalizes: bool = False  # a search does, as mergekit-evolve's, whatever the default
    rescale: bool = False  # the parameter's default
    walks: bool = False  # a search walks from model to model by `t`, and has no weights
    built_in: bool = True  # False: a user's own; set where it is registered
    in_mergekit: bool = True  # False for one of the package that mergekit lacks
    # further parameters; a plain number is its default, and None means that the recipe must give it
    parameters: Mapping[str, MethodParameter | float | None] = field(default_factory=dict)

    @cached_property
    def own(self) -> Mapping[str, MethodParameter]:
        """The further parameters, each in full."""
        full = {}
        for name, given in self.parameters.items():
            if isinstance(given, MethodParameter):
                full[name] = given
            else:
                full[name] = MethodParameter(default=given)
        return full

    @property
    def sets_base_apart(self) -> bool:
        """Whether a base among the sources has another part than the siblings."""
        return self.needs_base or self.optional_base

    @property
    def only_here(self) -> bool:
        """Whether mergekit cannot merge what a recipe with this method says."""
        return not (self.built_in and self.in_mergekit)

    @property
    def keeps_a_lone_base(self) -> bool:
        """Whether a base without siblings is merged to itself, as in mergekit."""
        by_deltas = self.needs_base and self.takes_deltas and self.weighted
        return by_deltas and self.siblings[0] == 0 and not self.only_here

    @property
    def is_random(self) -> bool:
        """Whether a seed decides the merged bits."""
        return self.draws or self.samples > 0

    @property
    def searched(self) -> Mapping[str, MethodParameter]:
        """The further parameters that have genes."""
        return {name: own for name, own in self.own.items() if own.search is not None}

    @property
    def normalizes_in_search(self) -> bool:
        """Whether a search divides by the sum of the weights, unless told otherwise."""
        return self.normalize or self.search_normalizes

    @property
    def searchable(self) -> bool:
        """Whether its recipes have numbers that a search can set."""
        return self.weighted or self.walks or len(self.searched) > 0

    @property
    def weighs_parents(self) -> bool:
        """Whether weights of 1 and 0 give a sibling alone, and of 0 the base."""
        return self.weighted and not self.optional_base

    @property
    def by_source(self) -> frozenset[str]:
        """The parameters that each source may have for itself."""
        names = {name for name, parameter in self.own.items() if parameter.per_model}
        return frozenset(names | {"weight", "density"})

    @property
    def ranks(self) -> bool:
        """Whether a number's chance to be kept follows its rank in its row."""
        return any(parameter.within_density for parameter in self.own.values())

    @property
    def reads(self) -> frozenset[str]:
        """The parameters of a recipe that may decide something, and `int8_mask`, on every card."""
        names = {"int8_mask", *self.parameters}
        if self.weighted:
            names.add("weight")
        if self.weighted and self.normalizes:
            names.add("normalize")
        if self.has_densities:
            names.add("density")
        if self.takes_deltas and self.scales:
            names |= {"lambda", "rescale"}
        return frozenset(names)


WEIGHTED_DELTAS = MethodTraits(takes_deltas=True, finite=True, same_when_rounded_to="dtype")
DARE_TRAITS = replace(WEIGHTED_DELTAS, has_densities=True, draws=True, rescale=True)
DELLA_TRAITS = replace(
    DARE_TRAITS,
    parameters={
        "epsilon": MethodParameter(
            default=0.15, low=0, high=1, per_model=True, search=(0.0, 0.95), within_density=True
        )
    },
)
BREADCRUMBS_TRAITS = replace(
    WEIGHTED_DELTAS,
    has_densities=True,
    parameters={
        "gamma": MethodParameter(default=0.01, low=0, high=1, per_model=True, search=(0.0, 0.2))
    },
)
# a difference up to it counts as none
THRESHOLD = MethodParameter(default=1e-5, low=0, search=(0.0, 1e-3))
RAM_TRAITS = MethodTraits(
    takes_deltas=True, weighted=False, scales=False, parameters={"epsilon": THRESHOLD}
)
METHODS: dict[str, MethodTraits] = {
    "task_arithmetic": replace(
        WEIGHTED_DELTAS,
        link="[Task Arithmetic](https://arxiv.org/abs/2212.04089)",
        elementwise=True,
    ),
    "ties": replace(
        WEIGHTED_DELTAS,
        link="[TIES](https://arxiv.org/abs/2306.01708)",
        has_densities=True,
        normalize=True,
    ),
    "dare_ties": replace(
        DARE_TRAITS,
        link="[DARE TIES](https://arxiv.org/abs/2311.03099)",
        search_normalizes=True,
    ),
    "dare_linear": replace(DARE_TRAITS, link="[Linear DARE](https://arxiv.org/abs/2311.03099)"),
    "linear": MethodTraits(
        link="[Linear](https://arxiv.org/abs/2203.05482)",
        needs_base=False,
        elementwise=True,
        rounds_weights=False,
        same_when_rounded_to="float32",
        finite=True,
        normalize=True,
    ),
    "slerp": MethodTraits(
        link="[SLERP](https://en.wikipedia.org/wiki/Slerp)",
        siblings=(1, 1),
        weighted=False,
        same_when_rounded_to="float32",
        finite=True,
        walks=True,
        parameters={"t": None},
    ),
    "passthrough": MethodTraits(
        link="Passthrough",
        needs_base=False,
        siblings=(1, 1),
        elementwise=True,
        weighted=False,
        rounds_weights=False,
        parameters={"scale": MethodParameter(default=1.0, per_model=True, search=(0.5, 1.5))},
    ),
    "nuslerp": MethodTraits(
        link="NuSLERP",
        needs_base=False,
        optional_base=True,
        siblings=(2, 2),
        normalizes=False,
        rounds_weights=False,
        parameters={
            "nuslerp_flatten": MethodParameter(default=True, kind="switch"),
            "nuslerp_row_wise": MethodParameter(default=False, kind="switch"),
        },
    ),
    "multislerp": MethodTraits(
        link="[Multi-SLERP](https://goddard.blog/posts/multislerp-wow-what-a-cool-idea)",
        needs_base=False,
        optional_base=True,
        siblings=(1, None),
        normalizes=False,
        parameters={
            "normalize_weights": MethodParameter(default=True, kind="switch"),
            "eps": MethodParameter(default=1e-8, low=0),
        },
    ),
    "karcher": MethodTraits(
        link="[Karcher Mean](https://arxiv.org/abs/2603.04972)",
        needs_base=False,
        siblings=(1, None),
        weighted=False,
        parameters={
            "max_iter": MethodParameter(default=10, low=0, high=10**6, kind="whole"),
            "tol": MethodParameter(default=1e-5, low=0),
        },
    ),
    "della": replace(
        DELLA_TRAITS, link="[DELLA](https://arxiv.org/abs/2406.11617)", normalize=True
    ),
    "della_linear": replace(DELLA_TRAITS, link="[Linear DELLA](https://arxiv.org/abs/2406.11617)"),
    "breadcrumbs": replace(
        BREADCRUMBS_TRAITS, link="[Model Breadcrumbs](https://arxiv.org/abs/2312.06795)"
    ),
    "breadcrumbs_ties": replace(
        BREADCRUMBS_TRAITS, link="[Model Breadcrumbs with TIES](https://arxiv.org/abs/2312.06795)"
    ),
    "model_stock": MethodTraits(
        link="[Model Stock](https://arxiv.org/abs/2403.19522)",
        siblings=(2, None),
        weighted=False,
        parameters={"filter_wise": MethodParameter(default=False, kind="switch")},
    ),
    "sce": MethodTraits(
        link="[SCE](https://arxiv.org/abs/2408.07990)",
        takes_deltas=True,
        weighted=False,
        scales=False,
        parameters={"select_topk": MethodParameter(default=1.0, low=0, high=1, search=(0.0, 1.0))},
    ),
    "nearswap": MethodTraits(
        link="[NearSwap](https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001)",
        siblings=(1, 1),
        elementwise=True,
        weighted=False,
        rounds_weights=False,
        parameters={"t": MethodParameter(low=0, search=(0.0, 0.01))},
    ),
    "arcee_fusion": MethodTraits(
        link="[Arcee Fusion](https://arcee.ai)",
        siblings=(1, 1),
        weighted=False,
        samples=1_000_000,
        widens=True,
    ),
    "ram": replace(
        RAM_TRAITS,
        link="[Reinforced Agent Merging](https://arxiv.org/abs/2601.13572)",
        elementwise=True,
    ),
    "ramplus_tl": replace(
        RAM_TRAITS,
        link="[Reinforced Agent Merging Plus (Tensor-Local)](https://arxiv.org/abs/2601.13572)",
        widens=True,
        parameters={
            "r": MethodParameter(default=0.1, low=0, search=(0.0, 1.0)),
            "alpha": MethodParameter(default=0.2, low=0, search=(0.0, 1.0)),
            "epsilon": THRESHOLD,
        },
    ),
}
