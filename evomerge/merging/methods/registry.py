"""The merge methods by name: the six built in, and those that a user registers.

What a recipe must know of a method without torch is in `evomerge.recipe.METHODS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from evomerge import recipe
from evomerge.errors import InputError, RecipeError
from evomerge.merging.methods import averaging, deltas
from evomerge.merging.tensor_plan import TensorPlan


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
    ) -> Tensor: ...


@dataclass(frozen=True)
class MergeMethod:
    """A merge function, and what it is called with."""

    merge: MergeFunction
    needs_base: bool = True  # else the base is one of the siblings
    takes_deltas: bool = False  # `others` are siblings minus base, else the siblings
    elementwise: bool = False  # each number depends on its own place only: merged in chunks
    weighted: bool = True  # needs the parameter `weight` of every sibling
    has_densities: bool = False  # takes the parameter `density` of every sibling, 1 by default
    draws: bool = False  # thins deltas out at random where the density is below 1
    rounds_weights: bool = True  # to the dtype of the tensors; else it computes in float32
    normalize: bool = False  # the parameter's default
    rescale: bool = False  # the parameter's default
    # further parameters with their defaults; None: the recipe must give one
    parameters: Mapping[str, float | None] = field(default_factory=dict)


def register_method(name: str, method: MergeMethod, link: str = "") -> None:
    """Let recipes name a merge method of your own in `merge_method`, on disk and live.

    `link` is Markdown for the model card. Answers are cached by recipe: a function that has been
    changed needs a new name. Register it in every process that merges.
    Raises InputError when the name is taken.

        def mean(base, others, plan, generator):
            return base + sum(others) * plan.parameters["share"]

        register_method("mean", MergeMethod(
            mean, takes_deltas=True, elementwise=True, weighted=False, parameters={"share": 0.5}
        ))
    """
    if name in recipe.METHODS:
        raise InputError(
            "a merge method with this name already exists",
            where=name,
            remedy="Choose another name.",
        )
    _METHODS[name] = method
    recipe.METHODS[name] = recipe.Method(
        link or name,
        method.needs_base,
        ("weight",) if method.weighted else (),
        tuple(method.parameters),
    )


def get_method(name: str) -> MergeMethod:
    """The method that a checked recipe names. Raises KeyError for any other name."""
    return _METHODS[name]


def _task_arithmetic(
    base: Tensor | None,
    others: Iterable[Tensor],
    plan: TensorPlan,
    generator: torch.Generator | None,
) -> Tensor:
    assert base is not None
    return deltas.task_arithmetic(base, others, plan.weights, plan.normalize, plan.scale)


def _ties(
    base: Tensor | None,
    others: Iterable[Tensor],
    plan: TensorPlan,
    generator: torch.Generator | None,
) -> Tensor:
    assert base is not None
    return deltas.ties(
        base, others, plan.weights, plan.densities, plan.normalize, plan.scale, plan.rescale
    )


def _dare_ties(
    base: Tensor | None,
    others: Iterable[Tensor],
    plan: TensorPlan,
    generator: torch.Generator | None,
) -> Tensor:
    assert base is not None
    return deltas.dare_ties(
        base,
        others,
        plan.weights,
        plan.densities,
        generator or torch.Generator(),  # without one nothing is drawn
        plan.normalize,
        plan.scale,
        plan.rescale,
    )


def _dare_linear(
    base: Tensor | None,
    others: Iterable[Tensor],
    plan: TensorPlan,
    generator: torch.Generator | None,
) -> Tensor:
    assert base is not None
    return deltas.dare_linear(
        base,
        others,
        plan.weights,
        plan.densities,
        generator or torch.Generator(),  # without one nothing is drawn
        plan.normalize,
        plan.scale,
        plan.rescale,
    )


def _linear(
    base: Tensor | None,
    others: Iterable[Tensor],
    plan: TensorPlan,
    generator: torch.Generator | None,
) -> Tensor:
    """Raises RecipeError on weights that sum to 0."""
    if plan.normalize and torch.tensor(plan.weights).sum() == 0:
        raise RecipeError(
            "the weights sum to 0, so they cannot be normalised",
            found=plan.weights,
            remedy="Change one of them.",
        )
    return averaging.linear(list(others), plan.weights, plan.normalize)


def _slerp(
    base: Tensor | None,
    others: Iterable[Tensor],
    plan: TensorPlan,
    generator: torch.Generator | None,
) -> Tensor:
    assert base is not None
    (other,) = others
    return averaging.slerp(base, other, plan.parameters["t"])


_METHODS = {
    "task_arithmetic": MergeMethod(_task_arithmetic, takes_deltas=True, elementwise=True),
    "ties": MergeMethod(_ties, takes_deltas=True, has_densities=True, normalize=True),
    "dare_ties": MergeMethod(
        _dare_ties, takes_deltas=True, has_densities=True, draws=True, rescale=True
    ),
    "dare_linear": MergeMethod(
        _dare_linear, takes_deltas=True, has_densities=True, draws=True, rescale=True
    ),
    "linear": MergeMethod(
        _linear, needs_base=False, elementwise=True, rounds_weights=False, normalize=True
    ),
    "slerp": MergeMethod(_slerp, weighted=False, parameters={"t": None}),
}
