"""A recipe as merged tensors, one at a time, for any destination."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, reduce
from typing import Any

import torch

from evomerge.errors import RecipeError
from evomerge.merging.checkpoints.config_defaults import config_value
from evomerge.merging.checkpoints.model_folder import ModelFolder
from evomerge.merging.methods.dare_draws import Draws
from evomerge.merging.odd_tensors import is_infinite_mask, with_whole_rows
from evomerge.merging.open_recipe import make_layout
from evomerge.merging.tensor_merge import (
    ChunkedMerge,
    check_overflow,
    load_finite,
    merge_tensors,
)
from evomerge.merging.tensor_plan import PlannedTensors, TensorPlan, kept
from evomerge.merging.unknown_tensors import tell_what_is_unknown
from evomerge.recipe import Recipe

# elements that go through an element-wise method at once: 1 MB in bf16 stays in a core's cache
CHUNK = 1 << 19
FLOAT32_MAX = torch.finfo(torch.float32).max


class MergePlan:
    """The plan of a recipe on its models: names, shapes and dtypes of the merged tensors.

    Each of them is merged on demand.
    """

    def __init__(
        self,
        recipe: Recipe,
        models: Mapping[str, ModelFolder],
        random_seed: int = 0,
        after: MergePlan | None = None,
    ) -> None:
        """Raises RecipeError when the recipe does not fit the models; nothing is merged yet.

        `after`: an earlier plan of the same models and seed, whose findings are used again.
        """
        self.recipe, self.models = recipe, models
        self.donor = models[recipe.donor]
        self.layout = make_layout(recipe, models)
        same_models = after is not None and after.models == models
        self.names: Sequence[str]
        if after is not None and same_models and after.layout.lenders == self.layout.lenders:
            self.names = after.names
        else:
            self.names = self.layout.names(models)
        if after is not None and same_models and after.recipe.tokenizer == recipe.tokenizer:
            self.vocabulary = after.vocabulary
        self.tensors = PlannedTensors(self.names, self._tensor)
        if after is None:
            tell_what_is_unknown(self.donor.ref, self.layout.architecture.rule, self._stays())
        self._check_numbers()
        states = None if after is None else after.draws.states
        self.draws: Draws = Draws(random_seed, self._draw_counts(), states)

    @property
    def differs_in_a_layer(self) -> bool:
        """Whether tensors of one layer may be merged in different ways or dtypes."""
        method = self.layout.method
        draws = method.draws or method.samples > 0
        return draws or self.layout.filtered or self.recipe.dtype is None

    def _tensor(self, name: str) -> TensorPlan:
        """A tensor's plan.

        It stays what its lender has where it is of whole numbers, where another model lacks it,
        which only one that is not loaded may, and where it is a mask's infinity.
        """
        inputs = self.layout.inputs(name)
        if not self._is_float(name) or not all(map(self._has, inputs)):
            return kept(*self._lender(name))
        dtype = dtype_named(self.recipe.dtype)
        if any(is_infinite_mask(self.models[ref], source, dtype) for ref, source in inputs):
            return kept(*self._lender(name))
        plan = self.layout.plan(name)
        if self.layout.method.ranks:
            return with_whole_rows(plan, name, self.models)
        return plan

    def _lender(self, name: str) -> tuple[str, str]:
        """The tensor whose shape and dtype the merged one has."""
        first = self.layout.inputs(name)[0]
        if self.layout.stays(name) or not self._has(first):
            return self.recipe.donor, name
        return first

    def _has(self, tensor: tuple[str, str]) -> bool:
        model = self.models[tensor[0]]
        return model.stored(tensor[1]) in model.files

    def _is_float(self, name: str) -> bool:
        ref, source = self._lender(name)
        return self.models[ref].dtype(source).is_floating_point

    def _stays(self) -> dict[str, bool]:
        """The tensors of an unknown role, and whether they are kept."""
        unplaced = self.layout.architecture.unplaced
        names = [name for name in unplaced if name in self.tensors and self._is_float(name)]
        return {name: self.tensors[name].is_copy for name in names}

    def _one_of_each(self) -> list[str]:
        """One merged tensor of each layer, and all outside the layers."""
        found: dict[object, str] = {}
        for name in self.names:
            parts = self.layout.architecture.split(name)
            place = name if parts is None else parts[1]
            if place not in found and self._is_float(name):
                found[place] = name
        return list(found.values())

    @cached_property
    def vocabulary(self) -> Any:
        """How rows of embeddings and head move to the output's tokenizer; None where they stay."""
        if self.recipe.tokenizer is None:
            return None
        from evomerge.merging.vocabulary.alignment import make_vocabulary

        vocabulary = make_vocabulary(self.recipe.tokenizer, self.recipe.base_model, self.models)
        for ref, model in self.models.items():
            if model.has_short_table and not vocabulary.keeps(ref):
                raise RecipeError(
                    f"`tokenizer_source` would move rows of {model.layers_embeddings}, which has "
                    "fewer than the embeddings",
                    where=ref,
                    found=self.recipe.tokenizer.source,
                    remedy="Merge models of one tokenizer.",
                )
        return vocabulary

    @property
    def unties(self) -> bool:
        """Whether the merged head is no longer the embeddings, as the donor's configuration says.

        So it is where one of the models that it is made of has a head of its own.
        """
        if not any(self.models[ref].is_untied() for ref in self.layout.head_givers):
            return False
        tied = config_value(self.donor.config, "tie_word_embeddings")
        return self.donor.head not in self.donor.keys or bool(tied)

    def _check_numbers(self) -> None:
        """Raise RecipeError where a weight is infinite in its dtype: the tensors would be NaN."""
        rounds = self.layout.method.rounds_weights
        names = self.names
        if not self.layout.filtered:
            names = self._one_of_each()
        for name in names:
            plan = self.tensors[name]
            if plan.is_copy:
                continue
            dtype = self.working_dtype(name)
            limit = torch.finfo(dtype).max if rounds else FLOAT32_MAX
            for number in (*plan.weights, plan.scale):
                if abs(number) > limit:
                    raise RecipeError(
                        f"a weight is infinite in {dtype}",
                        where=name,
                        found=number,
                        remedy="Use a smaller one.",
                    )

    def _draw_counts(self) -> dict[str, int]:
        """How many random numbers each tensor takes, in the order in which mergekit merges."""
        counts: dict[str, int] = {}
        if not self.layout.method.draws and not self.layout.method.samples:
            return counts
        for name in self.names:
            plan = self.tensors[name]
            if plan.draws or plan.samples:
                counts[name] = plan.random_numbers(torch.Size(self.shape(name)).numel())
        drawing = [name for name, count in counts.items() if count]
        drawing.sort(key=lambda name: (max(key for _, key in self.tensors[name].inputs), name))
        return {name: counts[name] for name in drawing}

    def generator(self, name: str) -> torch.Generator | None:
        """The stream of random numbers where the tensor's begin; None where it takes none."""
        if name in self.draws.starts:
            return self.draws.generator(name)
        return None

    def holder(self, name: str) -> str:
        """The merged tensor that a parameter holds: the embeddings, for a head that stays tied."""
        return name if name in self.tensors else self.donor.embeddings

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the merged tensor."""
        ref, source = self.tensors[name].inputs[0]
        shape = self.models[ref].shape(source)
        if self._moves_rows(name):
            return (self.vocabulary.size, *shape[1:])
        return shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of the merged tensor: `out_dtype`, or the one that the method gives."""
        working = self.working_dtype(name)
        if not working.is_floating_point:
            return working
        if self._widens(name):
            return torch.float32
        return dtype_named(self.recipe.out_dtype) or working

    def _widens(self, name: str) -> bool:
        """Whether the method's float32 is what is stored, as in mergekit."""
        widens = self.layout.method.widens and self.recipe.out_dtype is None
        tensor = self.tensors[name]
        return widens and not tensor.is_copy and bool(tensor.siblings)

    def working_dtype(self, name: str) -> torch.dtype:
        """The recipe's `dtype`; without one, the widest that the tensor has on disk."""
        named = dtype_named(self.recipe.dtype)
        found = [self.models[ref].dtype(source) for ref, source in self.tensors[name].inputs]
        if named is not None and found[0].is_floating_point:
            return named
        return reduce(torch.promote_types, found)

    def merge(self, name: str, device: Any = "cpu") -> torch.Tensor:
        """One merged tensor, computed on `device`. Raises ModelError on NaN or infinite weights."""
        if torch.device(device).type == "cpu" and self.elementwise(name):
            return self._merge_in_chunks(name)
        plan, dtype = self.tensors[name], self.working_dtype(name)
        tensors = {}
        for ref, source in plan.inputs:
            tensors[ref] = load_finite(self.models[ref], source, dtype, device)
        if self._moves_rows(name):
            tensors = self.vocabulary.align(tensors, self.layout.position(name).piece.base_model)
        merged = merge_tensors(plan, tensors, self.generator(name)).to(self.dtype(name))
        check_overflow(merged, name)
        return merged

    def needs_no_cast_or_realignment(self, name: str, dtype: torch.dtype) -> bool:
        """Whether the tensor can be merged from its inputs alone.

        It is merged in `dtype`, stays in it, and none of its rows moves.
        """
        same = self.working_dtype(name) == dtype and (
            self.dtype(name) == dtype or self._widens(name)
        )
        return same and not self._moves_rows(name)

    def elementwise(self, name: str) -> bool:
        """Whether every element of the merged tensor depends on its own place only."""
        by_element = self.layout.method.elementwise or self.tensors[name].is_copy
        return by_element and not self._moves_rows(name)

    def chunked(self, name: str) -> ChunkedMerge:
        """Prepare an element-wise tensor to be merged in chunks."""
        inputs = {}
        for ref, source in self.tensors[name].inputs:
            inputs[ref] = self.models[ref].get_tensor(source).reshape(-1)
        return ChunkedMerge(self.tensors[name], self.models, inputs, self.working_dtype(name))

    def _merge_in_chunks(self, name: str) -> torch.Tensor:
        """Merge a whole tensor, with only one chunk at a time in progress, and in the cache."""
        chunked = self.chunked(name)
        out = torch.empty(self.shape(name), dtype=self.dtype(name))
        flat = out.reshape(-1)
        for start in range(0, flat.numel(), CHUNK):
            chunked.merge_into(flat[start : start + CHUNK], start)
        return out

    def _moves_rows(self, name: str) -> bool:
        return name in self.donor.vocabulary and self.vocabulary is not None


def merged_tensors(
    recipe: Recipe, models: Mapping[str, ModelFolder], random_seed: int = 0
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) on the CPU, sorted by name."""
    plan = MergePlan(recipe, models, random_seed)
    for name in plan.names:
        yield name, plan.merge(name)


def dtype_named(name: str | None) -> torch.dtype | None:
    """torch's dtype of that name; None stays None."""
    if name is None:
        return None
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise RecipeError("unknown dtype", found=name, remedy="Use bfloat16, float16 or float32.")
    return dtype
