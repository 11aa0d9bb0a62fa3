"""A recipe as merged tensors, one at a time, whatever takes them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

import torch

from evomerge.errors import ModelError, RecipeError
from evomerge.merging.checkpoints.model_folder import (
    VOCABULARY,
    ModelFolder,
    check_fit,
    num_layers,
    open_model,
)
from evomerge.merging.layout import How, Layout
from evomerge.merging.methods import functions as methods
from evomerge.merging.methods.dare_draws import Draws
from evomerge.recipe import Recipe

# elements that go through an element-wise method at once: 1 MB in bf16 stays in a core's cache
CHUNK = 1 << 19
ELEMENTWISE = ("task_arithmetic", "linear")


def open_recipe(recipe: Recipe) -> dict[str, ModelFolder]:
    """Every model of a recipe by its reference, checked to fit the first one; the base comes first."""
    models = {ref: open_model(ref) for ref in recipe.models}
    first, *others = models.values()
    check_fit(first, others, same_vocabulary=recipe.tokenizer is None)
    return models


class MergePlan:
    """What a recipe makes of its models: names, shapes and dtypes of the merged tensors, and each
    of them when asked for.
    """

    def __init__(
        self,
        recipe: Recipe,
        models: Mapping[str, ModelFolder],
        random_seed: int = 0,
        after: MergePlan | None = None,
    ) -> None:
        """Raises RecipeError when the recipe does not fit the models; nothing is read or merged
        yet.

        `after`: an earlier plan of the same models and seed, whose findings are used again.
        """
        self.recipe, self.models = recipe, models
        self.donor = models[recipe.donor]
        architectures = self.donor.config.get("architectures") or [""]
        self.layout = Layout(recipe, num_layers(self.donor.config), architectures[0])
        self.names = self.layout.names([self.donor, *models.values()])
        if (
            after is not None
            and after.recipe.tokenizer == recipe.tokenizer
            and after.models == models
        ):
            self.vocabulary = after.vocabulary
        self.hows = {name: self.layout.how(name) for name in self.names}
        self._check_numbers()
        # as mergekit merges
        order = sorted(
            self.hows, key=lambda name: (max(source for _, source in self.hows[name].inputs), name)
        )
        counts = {
            n: self.hows[n].draws * torch.Size(self.shape(n)).numel()
            for n in order
            if self.hows[n].draws
        }
        self.draws: Draws = Draws(
            random_seed, counts, None if after is None else after.draws.states
        )

    @cached_property
    def vocabulary(self) -> Any:
        """How rows of embeddings and head move to the output's tokenizer; None where they stay."""
        if self.recipe.tokenizer is None:
            return None
        from evomerge.merging.vocabulary import make_vocabulary

        return make_vocabulary(self.recipe.tokenizer, self.recipe.base_model, self.models)

    def _check_numbers(self) -> None:
        """Raise RecipeError where a weight would be infinite in the dtype that it is rounded to:
        the tensors would be NaN.
        """
        for name, how in self.hows.items():
            limit = torch.finfo(
                torch.float32 if how.method == "linear" else self.working_dtype(name)
            ).max
            for number in (*how.weights, how.scale):
                if abs(number) > limit:
                    raise RecipeError(
                        f"a weight is infinite in {self.working_dtype(name)}",
                        where=name,
                        found=number,
                        remedy="Write a smaller one.",
                    )

    def shape(self, name: str) -> tuple[int, ...]:
        ref, source = self.hows[name].inputs[0]
        shape = self.models[ref].shape(source)
        return (
            (self.vocabulary.size, *shape[1:])
            if name in VOCABULARY and self.vocabulary is not None
            else shape
        )

    def dtype(self, name: str) -> torch.dtype:
        """Of the merged tensor: `out_dtype`, or the dtype it is merged in."""
        return dtype_named(self.recipe.out_dtype) or self.working_dtype(name)

    def working_dtype(self, name: str) -> torch.dtype:
        """The recipe's `dtype`; without one, the widest that the tensor has on disk."""
        named = dtype_named(self.recipe.dtype)
        return named or reduce(
            torch.promote_types,
            (self.models[ref].dtype(source) for ref, source in self.hows[name].inputs),
        )

    def merge(self, name: str, device: Any = "cpu") -> torch.Tensor:
        """One merged tensor, computed on `device`. Raises ModelError on NaN or infinite weights."""
        pieces = self.pieces(name) if torch.device(device).type == "cpu" else None
        if pieces is not None:
            return self._merge_in_chunks(name, pieces)
        how, dtype = self.hows[name], self.working_dtype(name)
        tensors = {
            ref: load_finite(self.models[ref], source, dtype, device) for ref, source in how.inputs
        }
        if name in VOCABULARY and self.vocabulary is not None:
            tensors = self.vocabulary.align(tensors, self.layout.place(name).piece.base_model)
        return bounded(
            combine(how, tensors, self.draws.generator(name) if how.draws else None).to(
                self.dtype(name)
            ),
            name,
        )

    def pure(self, name: str, dtype: torch.dtype) -> bool:
        """Whether the tensor is merged in `dtype`, stays in it, and no row of it moves: then it
        needs no files beside its inputs.
        """
        moves = name in VOCABULARY and self.vocabulary is not None
        return not moves and self.working_dtype(name) == dtype == self.dtype(name)

    def elementwise(self, name: str) -> bool:
        """Whether every number of the merged tensor depends on its own place only."""
        return self.hows[name].method in ELEMENTWISE and (
            name not in VOCABULARY or self.vocabulary is None
        )

    def pieces(self, name: str) -> Pieces | None:
        """The tensor as pieces that are merged one by one; None where the method, or a change of
        tokens, needs it whole.
        """
        how = self.hows[name]
        if not self.elementwise(name):
            return None
        inputs = {
            ref: self.models[ref].get_tensor(source).reshape(-1) for ref, source in how.inputs
        }
        return Pieces(how, self.models, inputs, self.working_dtype(name))

    def _merge_in_chunks(self, name: str, pieces: Pieces) -> torch.Tensor:
        """A whole tensor of which only a piece at a time is in between, and in the cache."""
        out = torch.empty(self.shape(name), dtype=self.dtype(name))
        flat = out.reshape(-1)
        for start in range(0, flat.numel(), CHUNK):
            pieces.merge_into(flat[start : start + CHUNK], start)
        return out


@dataclass(frozen=True)
class Pieces:
    """A tensor on the CPU of which every number depends on its own place only: any part can be
    merged alone.
    """

    how: How
    models: Mapping[str, ModelFolder]
    inputs: Mapping[str, torch.Tensor]  # by model: (numbers,), mapped, as on disk
    dtype: torch.dtype  # to merge in

    def merge_into(self, out: torch.Tensor, start: int) -> None:
        """Write the numbers from `start` on into `out`, (n,). Raises ModelError on NaN or infinite
        weights.
        """
        end, how = start + out.numel(), self.how
        tensors = {
            ref: finite(self.inputs[ref][start:end].to(self.dtype), self.models[ref], source)
            for ref, source in how.inputs
        }
        plain = (
            how.method == "task_arithmetic"
            and len(how.siblings) == 1
            and not how.normalize
            and how.scale == 1
        )
        if not plain or how.base is None or out.dtype != self.dtype:
            out.copy_(combine(how, tensors, None))
            bounded(out, how.inputs[0][1])
            return
        base = tensors[how.base[0]]
        torch.sub(tensors[how.siblings[0][0]], base, out=out)
        out.mul_(torch.tensor(how.weights[0], dtype=self.dtype))
        out.add_(0.0).add_(base)  # 0 first: a sum over one product turns -0 into 0
        bounded(out, how.inputs[0][1])


def merged_tensors(
    recipe: Recipe, models: Mapping[str, ModelFolder], random_seed: int = 0
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) on the CPU, sorted by name."""
    plan = MergePlan(recipe, models, random_seed)
    for name in plan.names:
        yield name, plan.merge(name)


def combine(
    how: How, tensors: Mapping[str, torch.Tensor], generator: torch.Generator | None
) -> torch.Tensor:
    """One merged tensor from its inputs by model, all of one shape and dtype. Raises RecipeError on
    weights that sum to 0.
    """
    siblings = [tensors[ref] for ref, _ in how.siblings]
    if how.method == "linear":
        if how.normalize and torch.tensor(how.weights).sum() == 0:
            raise RecipeError(
                "the weights sum to 0, so they cannot be normalised",
                found=how.weights,
                remedy="Change one of them.",
            )
        return methods.linear(siblings, how.weights, how.normalize)
    assert how.base is not None
    base = tensors[how.base[0]]
    if how.method == "slerp":
        return methods.slerp(base, siblings[0], how.t)
    return from_deltas(how, base, methods.differences(base, siblings), generator)


def from_deltas(
    how: How, base: torch.Tensor, deltas: Iterable[torch.Tensor], generator: torch.Generator | None
) -> torch.Tensor:
    """The same for the methods that add deltas to a base, from deltas that are there."""
    return methods.from_deltas(
        how.method,
        base,
        deltas,
        how.weights,
        how.densities,
        generator,
        how.normalize,
        how.scale,
        how.rescale,
    )


def load_finite(
    model: ModelFolder, name: str, dtype: torch.dtype, device: Any = "cpu"
) -> torch.Tensor:
    """A tensor in `dtype`. Raises ModelError when it holds NaN or infinite numbers."""
    return finite(model.get_tensor(name).to(device=device, dtype=dtype), model, name)


def finite(tensor: torch.Tensor, model: ModelFolder, name: str) -> torch.Tensor:
    """The tensor itself. Raises ModelError when it holds NaN or infinite numbers."""
    if tensor.numel():
        low, high = torch.aminmax(tensor)  # NaN goes through both; a fraction of isfinite's cost
        if not (math.isfinite(low.item()) and math.isfinite(high.item())):
            raise ModelError(
                f"tensor {name} holds NaN or infinite numbers",
                where=model.ref or model.path,
                remedy="Train or download the model again.",
            )
    return tensor


def bounded(merged: torch.Tensor, name: str) -> torch.Tensor:
    """The tensor itself. Raises RecipeError when it passed the end of float16; the other dtypes end
    where no weights are.
    """
    if (
        merged.dtype == torch.float16
        and merged.numel()
        and not all(math.isfinite(end.item()) for end in torch.aminmax(merged))
    ):
        raise RecipeError(
            f"merged tensor {name} passes float16's 65504",
            remedy="Write smaller weights, or out_dtype: bfloat16.",
        )
    return merged


def dtype_named(name: str | None) -> torch.dtype | None:
    """torch's dtype of that name; None stays None."""
    if name is None:
        return None
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise RecipeError("unknown dtype", found=name, remedy="Use bfloat16, float16 or float32.")
    return dtype
