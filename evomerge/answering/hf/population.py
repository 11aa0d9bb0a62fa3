"""A whole generation in one pass: the rows of one batch belong to different candidates.

This suits plain task arithmetic, where every tensor of a candidate is base + sum_m w_m delta_m; see
per_row.py. It costs arithmetic: 1 + m products instead of one. It pays as long as a few rows wait
for weights to be read or for the overhead of calls (`is_faster`), and is slower with many rows.

Base and deltas are those that the LiveModel keeps, not copies of them; its live parameters stay as
they are. A merged weight is rounded to its dtype, and this sum is not: fp32 gives the merged
model's tokens, bf16 does not always.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from evomerge.answering.engine import Answer, PromptSettings, items_at
from evomerge.answering.hf.batching import BatchExecutor
from evomerge.answering.hf.decode import Hooks, Output, decodable, decode
from evomerge.answering.hf.per_row import PerRow, RowWeights, forward_maker, own_parameters
from evomerge.answering.hf.sampling import SamplingParams
from evomerge.errors import RecipeError
from evomerge.merging import quantized
from evomerge.merging.live import LiveModel
from evomerge.merging.stream import MergePlan
from evomerge.recipe import Recipe, scalar

# the values that a recipe must have where it sets these keys
PLAIN = {"normalize": False, "lambda": 1.0}
AnswerRows = Callable[..., list[Output]]


def suits(recipe: Recipe) -> bool:
    """Whether a recipe is base + sum_m w_m delta_m with every layer in its place.

    Nothing may be normalised, scaled or moved.
    """
    if recipe.merge_method != "task_arithmetic" or recipe.tokenizer is not None:
        return False
    if recipe.out_dtype not in (None, recipe.dtype):
        return False
    for level in (recipe.parameters, *(piece.parameters for piece in recipe.slices)):
        for key in PLAIN.keys() & level.keys():
            if any(value != PLAIN[key] for value in _values(key, level[key])):
                return False
    return _in_place(recipe)


def _in_place(recipe: Recipe) -> bool:
    """Whether the slices take each layer from its own place, in every model."""
    end = 0
    for piece in recipe.slices:
        ranges = {source.layers for source in piece.sources}
        start, stop = next(iter(ranges)) or (end, end)
        if len(ranges) != 1 or start != end:
            return False
        end = stop
    return True


def _values(key: str, setting: Any) -> Iterator[float | bool]:
    """Every value that a parameter takes anywhere: all those of a gradient or of filters."""
    for item in setting if isinstance(setting, list) else [setting]:
        if isinstance(item, Mapping):
            yield from _values(key, item["value"])
        else:
            yield scalar(key, item)


def is_faster(candidates: int, prompts: int, parameters: int, device: str) -> bool:
    """Whether one pass is certain to be faster than one candidate after another.

    By the measurements in docs/PERFORMANCE.md; False where there are none.
    """
    return device == "cpu" and candidates >= 8 and prompts <= 4 and parameters <= 50_000_000


class TransformersPopulation:
    """See `BatchedCandidatesCapability`."""

    def __init__(self, model: Any, live: LiveModel, executor: BatchExecutor) -> None:
        """`model`: the module whose parameters `live` merges."""
        self.model, self.live, self.executor = model, live, executor

    def suits(self, recipes: Sequence[Recipe]) -> bool:
        """Whether these recipes can share a pass of this model."""
        return PopulationModel(self.model, self.live).suits(recipes)

    def is_faster(self, candidates: int, prompts: int) -> bool:
        """Whether one pass of this model is certain to be faster."""
        parameters = list(self.model.parameters())
        numbers = sum(p.numel() for p in parameters)
        return is_faster(candidates, prompts, numbers, parameters[0].device.type)

    def __call__(
        self, recipes: Sequence[Recipe], prompts: Sequence[str], settings: PromptSettings = None
    ) -> list[list[Answer]]:
        """Every candidate's answers, [candidate][prompt].

        A batch has `batch_size` prompts of every candidate, within `batch_tokens`; out of memory it
        is halved as in `Engine.answer`. Raises RecipeError for a recipe that does not suit,
        EngineError as `Engine.answer` does.
        """
        count = len(recipes)
        requests = self.executor.requests(prompts, settings)
        # all candidates of the first prompt, then of the second
        rows = []
        for request in requests:
            rows += [request] * len(recipes)
        with PopulationModel(self.model, self.live).of(recipes) as answer_rows:

            def run_batch(batch: Sequence[int], hooks: Hooks) -> list[Output]:
                candidates = [i % count for i in batch]
                return answer_rows(
                    candidates, *self.executor.inputs_of(items_at(rows, batch)), hooks
                )

            answers = self.executor.run(rows, self.executor.section.batch_size * count, run_batch)
        return [answers[candidate::count] for candidate in range(count)]


class PopulationModel:
    """A LiveModel's module whose rows temporarily belong to different candidates."""

    def __init__(self, model: Any, live: LiveModel) -> None:
        """`model`: the module whose parameters `live` merges."""
        self.model, self.live = model, live
        self._plan: MergePlan | None = None  # the last one

    def suits(self, recipes: Sequence[Recipe]) -> bool:
        """Whether `of` takes the recipes.

        That depends on the recipes, and on the model's architecture, its dtypes, and where base and
        siblings are kept.
        """
        return all(suits(recipe) and self._fits(self._plan_of(recipe)) for recipe in recipes)

    @contextmanager
    def of(self, recipes: Sequence[Recipe]) -> Iterator[AnswerRows]:
        """Provide, until the context ends, the function with which candidates answer.

        answer(candidates, prompts, params, seeds, hooks) is `decode`, row i with the weights of
        recipes[candidates[i]]. Raises RecipeError for a recipe that does not suit.
        """
        plans = [self._plan_of(recipe) for recipe in recipes]
        for recipe, plan in zip(recipes, plans, strict=True):
            if not (suits(recipe) and self._fits(plan)):
                raise RecipeError(
                    "this recipe cannot share a forward pass",
                    found=recipe.merge_method,
                    remedy="Set engine.population: false.",
                )
        weights = RowWeights(plans, self.live)

        def answer(
            candidates: Sequence[int],
            prompts: Sequence[Sequence[int]],
            params: SamplingParams | Sequence[SamplingParams],
            seeds: Sequence[int] = (),
            hooks: Hooks | None = None,
        ) -> list[Output]:
            """Answer each prompt with the weights of the candidate of the same index."""
            given = hooks or Hooks()

            def select(order: list[int]) -> None:
                weights.select(items_at(candidates, order))

            selecting = replace(given, on_rows=select)
            return decode(self.model, prompts, params, seeds, selecting, share=False)

        with self._per_row(weights):
            yield answer

    def _plan_of(self, recipe: Recipe) -> MergePlan:
        self._plan = self.live.plan(recipe, after=self._plan)
        return self._plan

    def _fits(self, plan: MergePlan) -> bool:
        """Whether every tensor is the base of the same place plus deltas, kept on the device."""
        # hooks that move tensors would be bypassed
        if len(set(getattr(self.model, "hf_device_map", {}).values())) > 1:
            return False
        names = self.live.names
        if plan.layout.restacked or not decodable(self.model) or set(plan.names) != set(names):
            return False
        for module in self.model.modules():
            if own_parameters(module) and forward_maker(module) is None:
                return False
        return all(self._tensor_fits(plan, name) for name in names)

    def _tensor_fits(self, plan: MergePlan, name: str) -> bool:
        live, how = self.live, plan.tensors[name]
        if how.base is None or plan.models[how.base[0]] is not live.base:
            return False
        if any(source != name for _, source in how.inputs):
            return False
        if live.resident.places[name] != "device" or quantized.is_quantized(live.live[name]):
            return False
        return plan.needs_no_cast_or_realignment(name, live.resident.parameters[name].dtype)

    @contextmanager
    def _per_row(self, weights: RowWeights) -> Iterator[None]:
        """The model with forwards by row; with its own again when the context ends."""
        names = {id(parameter): name for name, parameter in self.live.live.items()}
        inputs = dict(self.live.resident.stream(self.live.names, deltas=True))
        before: list[tuple[nn.Module, Any]] = []
        try:
            for module in list(self.model.modules()):
                own = own_parameters(module)
                make = forward_maker(module) if own else None
                if make is None:
                    continue
                tensors = {}
                for key, parameter in own.items():
                    name = names[id(parameter)]
                    tensors[key] = PerRow(inputs[name], weights, name)
                before.append((module, module.__dict__.get("forward")))
                module.forward = make(module, tensors)
            yield
        finally:
            for module, forward in before:
                if forward is None:
                    del module.forward
                else:  # a hook that something else, such as accelerate, had set
                    module.forward = forward
