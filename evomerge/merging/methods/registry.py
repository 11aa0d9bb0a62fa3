"""The merge methods by name: those of mergekit 0.1.5, and those that a user adds.

What is known of a method without torch, its traits, is in `evomerge.recipe.METHODS`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from evomerge.errors import InputError, RecipeError
from evomerge.merging.methods import averaging, consensus, deltas, spherical, towards
from evomerge.merging.tensor_plan import TensorPlan
from evomerge.recipe import METHODS, OWN, MethodTraits
from evomerge.recipe.own_methods import OwnMethod


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
    METHODS[name] = _METHODS[name] = replace(
        method, merge=_on_copies(method.merge), link=link or method.link or name, built_in=False
    )


def _on_copies(merge: MergeFunction) -> MergeFunction:
    """The function, which may change what it is given: models are merged again and again."""

    def on_copies(
        base: Tensor | None,
        others: Iterable[Tensor],
        plan: TensorPlan,
        generator: torch.Generator | None,
        /,
    ) -> Tensor:
        own_base = None if base is None else base.clone()
        return merge(own_base, [other.clone() for other in others], plan, generator)

    return on_copies


def get_method(name: str) -> MergeMethod:
    """The method that a checked recipe names. Raises KeyError for any other name."""
    if name in OWN:
        return _own_method(name, OWN[name])
    return _METHODS[name]


@cache
def _own_method(name: str, own: OwnMethod) -> MergeMethod:
    """A user's own function, with every fault of it as a RecipeError."""

    def merge(
        base: Tensor | None,
        others: Iterable[Tensor],
        plan: TensorPlan,
        generator: torch.Generator | None,
        /,
    ) -> Tensor:
        """What the user's function returns. Raises RecipeError."""
        inputs, tensor = list(others), plan.inputs[0][1]
        like = inputs[0] if base is None else base
        try:
            merged = own.function(base, inputs, plan, generator, **plan.parameters)
        except RecipeError:
            raise
        except (Exception, SystemExit) as error:
            text = (str(error).splitlines() or [""])[0]
            raise RecipeError(
                f"{own.title} raises {type(error).__name__}: {text}",
                where=tensor,
                remedy="Correct the function.",
            ) from error
        if not isinstance(merged, Tensor):
            raise _another(own, tensor, type(merged).__name__)
        if merged.is_meta:  # it has no numbers
            raise _another(own, tensor, "a tensor on the meta device")
        if merged.shape != like.shape or merged.dtype != like.dtype:
            raise _another(own, tensor, f"{merged.dtype} {list(merged.shape)}")
        return merged.to(like.device)

    return with_function(METHODS[name], _on_copies(merge))


def _another(own: OwnMethod, tensor: str, found: str) -> RecipeError:
    return RecipeError(
        f"{own.title} does not return a tensor of its inputs' shape and dtype",
        where=tensor,
        found=found,
        remedy="Correct the function, for example with .to(others[0].dtype).",
    )


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
_IN_PACKAGE = {name for name, traits in METHODS.items() if traits.built_in}  # own ones may be read
assert _METHODS.keys() == _IN_PACKAGE, "every method has traits and a function"
