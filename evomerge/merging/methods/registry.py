"""The merge methods by name: those of mergekit 0.1.5, and those that a user adds.

What is known of a method without torch, its traits, is in `evomerge.recipe.METHODS`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from torch import Tensor

from evomerge.errors import InputError
from evomerge.merging.methods import averaging, consensus, deltas, spherical, towards
from evomerge.merging.tensor_plan import TensorPlan
from evomerge.recipe import BUILT_IN, METHODS, MethodTraits


class MergeFunction(Protocol):
    """Merges one tensor. All tensors of a call have one shape, dtype and device.

    `base` is None for methods that need none; `others` come in the order of `plan.siblings`, and
    may be read once only. The result has the inputs' shape and dtype. Methods that draw get a
    `generator` where a density is below 1.
    """

    def __call__(
        self,
        base: Tensor | None,
        others: Iterable[Tensor],
        plan: TensorPlan,
        generator: torch.Generator | None,
        /,
    ) -> Tensor: ...


@dataclass(frozen=True)
class MergeMethod(MethodTraits):
    """A merge function, and what it is called with."""

    merge: MergeFunction


def register_method(name: str, method: MergeMethod, link: str = "") -> None:
    """Let recipes and study files name a merge method of your own in `merge_method`.

    A search sets weights and densities alone. `link` is Markdown for the model card. Answers are
    cached by recipe: a function that has been changed needs a new name. Register it in every
    process that merges. Raises InputError when the name is taken.

        def mean(base, others, plan, generator):
            return base + sum(others) * plan.parameters["share"]

        register_method("mean", MergeMethod(
            mean, takes_deltas=True, elementwise=True, weighted=False, parameters={"share": 0.5}
        ))
    """
    if name in METHODS:
        raise InputError(
            "a merge method with this name already exists",
            where=name,
            remedy="Choose another name.",
        )
    METHODS[name] = _METHODS[name] = replace(method, link=link or method.link or name)


def get_method(name: str) -> MergeMethod:
    """The method that a checked recipe names. Raises KeyError for any other name."""
    return _METHODS[name]


_FUNCTIONS: dict[str, MergeFunction] = {
    "task_arithmetic": deltas.task_arithmetic,
    "ties": deltas.ties,
    "dare_ties": deltas.dare_ties,
    "dare_linear": deltas.dare_linear,
    "linear": averaging.linear,
    "slerp": averaging.slerp,
    "passthrough": averaging.passthrough,
    "nuslerp": spherical.nuslerp,
    "multislerp": spherical.multislerp,
    "karcher": spherical.karcher,
    "della": deltas.della,
    "della_linear": deltas.della_linear,
    "breadcrumbs": deltas.breadcrumbs,
    "breadcrumbs_ties": deltas.breadcrumbs_ties,
    "model_stock": towards.model_stock,
    "sce": consensus.sce,
    "nearswap": towards.nearswap,
    "arcee_fusion": towards.arcee_fusion,
    "ram": consensus.ram,
    "ramplus_tl": consensus.ramplus_tl,
}


def with_function(traits: MethodTraits, merge: MergeFunction) -> MergeMethod:
    """The method of these traits."""
    return MergeMethod(merge, **{item.name: getattr(traits, item.name) for item in fields(traits)})


_METHODS: dict[str, MergeMethod] = {
    name: with_function(METHODS[name], merge) for name, merge in _FUNCTIONS.items()
}
assert _METHODS.keys() == set(BUILT_IN), "every method has traits and a function"
