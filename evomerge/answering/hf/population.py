"""A whole generation in one pass: the rows of one batch belong to different candidates.

Every candidate of plain task arithmetic is base + sum_m w_m delta_m, tensor by tensor, and every
layer is linear in its weights. So with a weight per row, w (rows,), a linear layer gives each row
its own candidate's output:

    y = x B^T + sum_m (w_m * x) D_m^T        the same as [x, w * x] [B, D]^T

and base and deltas are read once for all candidates. What that costs is arithmetic: 1 + m products
in place of one. So it pays while few rows wait on the reading of weights or on the overhead of
calls (`pays`), and loses with many rows. Where one call brings many tokens of each candidate, as
prompts do, its weights are merged for that call, a tensor at a time.

Base and deltas are those that the LiveModel keeps, not copies of them; its live parameters are left
as they are.
A merged weight is rounded to its dtype and this sum is not: fp32 gives the merged model's tokens,
bf16 does not always.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evomerge.answering.engine import Answer, Settings, pack
from evomerge.answering.hf.decode import Hooks, Output, decodable, decode
from evomerge.answering.hf.engine import Ask, TransformersEngine
from evomerge.answering.hf.sampling import Rules
from evomerge.errors import RecipeError
from evomerge.merging import quantized
from evomerge.merging.live import LiveModel
from evomerge.merging.methods.deltas import add_weighted
from evomerge.merging.placement import Inputs, is_out_of_memory
from evomerge.merging.stream import MergePlan
from evomerge.recipe import Recipe, scalar

PLAIN = {"normalize": False, "lambda": 1.0}  # what a recipe must set, if it sets them
# tokens of one candidate from which merging its weights once more is cheaper than more products
GROUPED = 256
Forward = Callable[..., Tensor]
AnswerRows = Callable[..., list[Output]]


def suits(recipe: Recipe) -> bool:
    """Whether a recipe is base + sum_m w_m delta_m with every layer in its place: nothing
    normalised, scaled or moved.
    """
    levels = [recipe.parameters, *(piece.parameters for piece in recipe.slices)]
    plain = all(
        value == PLAIN[key]
        for key in PLAIN
        for level in levels
        if key in level
        for value in _values(key, level[key])
    )
    end, in_place = 0, True
    for piece in recipe.slices:
        ranges = {source.layers for source in piece.sources}
        start, stop = next(iter(ranges)) or (end, end)
        in_place, end = in_place and len(ranges) == 1 and start == end, stop
    stays = recipe.tokenizer is None and recipe.out_dtype in (None, recipe.dtype)
    return recipe.merge_method == "task_arithmetic" and plain and in_place and stays


def pays(candidates: int, prompts: int, parameters: int, device: str) -> bool:
    """Whether one pass is surely faster than candidate after candidate, by docs/PERFORMANCE.md;
    where nobody measured, it is not.
    """
    return device == "cpu" and candidates >= 8 and prompts <= 4 and parameters <= 50_000_000


class PopulationEngine(TransformersEngine):
    """The transformers engine that can also answer for many candidates in one pass."""

    def suits(self, recipes: Sequence[Recipe]) -> bool:
        """Whether `answer_all` takes these recipes."""
        return self.live is not None and PopulationModel(self.model, self.live).suits(recipes)

    def answer_all(
        self, recipes: Sequence[Recipe], prompts: Sequence[str], settings: Settings = None
    ) -> list[list[Answer]]:
        """Every candidate's answers to every prompt, [candidate][prompt]. The live model keeps the
        weights it has.

        A batch has `batch_size` prompts of every candidate, within `batch_tokens`; out of memory it
        is halved as in `answer`. Raises RecipeError where a recipe does not suit, EngineError as
        `answer` does.
        """
        assert self.live is not None, "an engine without siblings merges nothing"
        rows = self.encode(prompts, self._new_tokens(prompts, settings))
        own = [self.generation] * len(prompts) if settings is None else settings
        asks = [Ask(*ask) for ask in zip(prompts, rows, own, strict=True)]
        outputs: dict[tuple[int, int], Output] = {}
        waiting = [
            (candidate, prompt)
            for prompt in range(len(prompts))
            for candidate in range(len(recipes))
        ]
        budget = self.settings.batch_tokens
        with PopulationModel(self.model, self.live).of(recipes) as answer:
            while waiting:
                most = min(
                    (b for b in (budget, self.limits.get("batch_tokens")) if b is not None),
                    default=None,
                )
                lengths = [len(asks[prompt].row) for _, prompt in waiting]
                new = [asks[prompt].settings.max_new_tokens for _, prompt in waiting]
                part = [
                    waiting[i]
                    for i in pack(lengths, new, self.settings.batch_size * len(recipes), most)[0]
                ]
                found = self._attempt_part(
                    answer,
                    [c for c, _ in part],
                    [asks[prompt] for _, prompt in part],
                    outputs.values(),
                )
                if found is None:
                    self._halve([asks[prompt] for _, prompt in part])
                    continue
                outputs |= dict(zip(part, found, strict=True))
                waiting = [pair for pair in waiting if pair not in outputs]
        return [
            [self._finish(outputs[c, prompt], ask.settings) for prompt, ask in enumerate(asks)]
            for c in range(len(recipes))
        ]

    def _attempt_part(
        self,
        answer: AnswerRows,
        candidates: Sequence[int],
        asks: Sequence[Ask],
        done: Collection[Output],
    ) -> list[Output] | None:
        """The outputs of some rows, one of each candidate and prompt, or None when memory did not
        suffice; `done` are earlier ones.
        """
        ended, made = len(done), sum(len(output.tokens) for output in done)
        heard = self.watch
        watch = None if heard is None else (lambda more, new: heard(ended + more, made + new))
        rules = [self.rules_of(ask.settings) for ask in asks]
        seeds = [self.seed_of(ask) for ask in asks] if any(r.do_sample for r in rules) else []
        try:
            return answer(
                candidates, [ask.row for ask in asks], rules, seeds, Hooks(self._stops(asks), watch)
            )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        return None  # only here have the error and all that its frames held been let go


class PopulationModel:
    """A LiveModel's module whose rows are of different candidates for a while."""

    def __init__(self, model: Any, live: LiveModel) -> None:
        """`model`: the module whose parameters `live` merges."""
        self.model, self.live = model, live
        self._plan: MergePlan | None = None  # the last one

    def suits(self, recipes: Sequence[Recipe]) -> bool:
        """Whether `of` takes the recipes: they `suits`, and so do architecture, dtypes, and where
        the models wait.
        """
        return all(suits(recipe) and self._fits(self._plan_of(recipe)) for recipe in recipes)

    @contextmanager
    def of(self, recipes: Sequence[Recipe]) -> Iterator[AnswerRows]:
        """Until the context ends, rows can be answered by candidates: answer(candidates, prompts,
        rules, seeds, hooks).

        That is `decode`, row i with the weights of recipes[candidates[i]]. Raises RecipeError where
        a recipe does not suit.
        """
        plans = [self._plan_of(recipe) for recipe in recipes]
        for recipe, plan in zip(recipes, plans, strict=True):
            if not (suits(recipe) and self._fits(plan)):
                raise RecipeError(
                    "a recipe cannot share a pass",
                    found=recipe.merge_method,
                    remedy="Set engine.population: false.",
                )
        weights = Weights(plans, self.live)

        def answer(
            candidates: Sequence[int],
            prompts: Sequence[Sequence[int]],
            rules: Rules | Sequence[Rules],
            seeds: Sequence[int] = (),
            hooks: Hooks | None = None,
        ) -> list[Output]:
            given = hooks or Hooks()
            selecting = Hooks(
                given.stopped,
                given.watch,
                lambda order: weights.select([candidates[row] for row in order]),
            )
            return decode(self.model, prompts, rules, seeds, selecting, share=False)

        with self._per_row(weights):
            yield answer

    def _plan_of(self, recipe: Recipe) -> MergePlan:
        self._plan = MergePlan(
            recipe,
            {ref: self.live._find(ref) for ref in recipe.models},
            self.live.random_seed,
            after=self._plan,
        )
        return self._plan

    def _fits(self, plan: MergePlan) -> bool:
        """Whether every tensor is its own place's base plus deltas, in one dtype, all of it kept on
        the device.
        """
        live = self.live
        # hooks that move tensors would be passed by
        if len(set(getattr(self.model, "hf_device_map", {}).values())) > 1:
            return False
        if plan.layout.restacked or not decodable(self.model) or set(plan.names) != set(live.names):
            return False
        for name in live.names:
            how = plan.tensors[name]
            at_home = (
                how.base is not None
                and plan.models[how.base[0]] is live.base
                and all(source == name for _, source in how.inputs)
            )
            kept = live.resident.places[name] == "device" and not quantized.is_quantized(
                live.live[name]
            )
            if not (at_home and kept and plan.pure(name, live.resident.parameters[name].dtype)):
                return False
        return all(
            _forward_for(module) is not None for module in self.model.modules() if _own(module)
        )

    @contextmanager
    def _per_row(self, weights: Weights) -> Iterator[None]:
        """The model with forwards that know rows; with its own again when the context ends."""
        names = {id(parameter): name for name, parameter in self.live.live.items()}
        inputs = dict(self.live.resident.stream(self.live.names, deltas=True))
        before: list[tuple[nn.Module, Any]] = []
        try:
            for module in list(self.model.modules()):
                make = _forward_for(module) if _own(module) else None
                if make is not None:
                    tensors = {
                        key: PerRow(inputs[names[id(p)]], weights, names[id(p)])
                        for key, p in _own(module).items()
                    }
                    before.append((module, module.__dict__.get("forward")))
                    module.forward = make(module, tensors)
            yield
        finally:
            for module, forward in before:
                if forward is None:
                    del module.forward
                else:  # one that was put there before, as accelerate does
                    module.forward = forward


class Weights:
    """The weights of the rows at hand, by tensor and sibling."""

    def __init__(self, plans: Sequence[MergePlan], live: LiveModel) -> None:
        """Tensors that share their weights, such as those of one slice, share a table (siblings,
        candidates).
        """
        self._of: dict[str, int] = {}
        self._tables: list[Tensor] = []
        self._rows: list[Tensor] = []
        self.groups: list[Tensor] = []  # the rows of each candidate that has any
        self._last: tuple[Tensor | None, Tensor | None, list[Tensor]] = (None, None, [])
        known: dict[object, int] = {}
        for name in live.names:
            columns, slot = [], live.resident.parameters[name]
            for plan in plans:
                how = plan.tensors[name]
                given = {
                    id(plan.models[ref]): weight
                    for (ref, _), weight in zip(how.siblings, how.weights, strict=True)
                }
                columns.append(tuple(given.get(id(sibling), 0.0) for sibling in live.siblings))
            key = (tuple(columns), slot.device, slot.dtype)
            if key not in known:
                known[key] = len(self._tables)
                self._tables.append(
                    torch.tensor(columns, dtype=slot.dtype, device=slot.device)
                    .view(len(plans), len(live.siblings))
                    .t()
                    .contiguous()
                )
            self._of[name] = known[key]

    def select(self, candidates: Sequence[int]) -> None:
        """From now on row i is of candidates[i]."""
        index = torch.tensor(candidates)
        self.groups = [
            torch.nonzero(index == candidate)[:, 0] for candidate in dict.fromkeys(candidates)
        ]
        self._rows = [table[:, index.to(table.device)] for table in self._tables]

    def of(self, name: str) -> Tensor:
        """(siblings, rows)."""
        return self._rows[self._of[name]]

    def times(self, x: Tensor, name: str) -> list[Tensor]:
        """w_m * x for each sibling; kept for the next layer, which often reads the same x with the
        same weights.
        """
        rows = self.of(name)
        if x is not self._last[0] or rows is not self._last[1]:
            self._last = x, rows, [x * weight.view(-1, *[1] * (x.dim() - 1)) for weight in rows]
        return self._last[2]


class PerRow:
    """A parameter that differs by row: base + sum_m w_m delta_m."""

    def __init__(self, inputs: Inputs, weights: Weights, name: str) -> None:
        self.base, self.deltas, self.weights, self.name = (
            inputs.base,
            list(inputs.others),
            weights,
            name,
        )

    def merged(self, dims: int, take: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        """Of a small parameter, or of what is taken of it: the merged bits of every row, (rows, 1…,
        n).
        """
        weights = [weight.view(-1, *[1] * (dims - 1)) for weight in self.weights.of(self.name)]
        parts = [take(delta) * weight for delta, weight in zip(self.deltas, weights, strict=True)]
        # as add_weighted rounds
        total = parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0)
        return total.add_(take(self.base))

    def of_candidates(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows, merged tensor) for each candidate of the batch, one at a time: the live model's
        bits.
        """
        for rows in self.weights.groups:
            weights = self.weights.of(self.name)[:, rows[0]].tolist()
            yield rows.to(self.base.device), add_weighted(self.base, self.deltas, weights)


def _linear(module: nn.Module, tensors: Mapping[str, PerRow]) -> Forward:
    weight, bias = tensors["weight"], tensors.get("bias")
    turned = [delta.T for delta in weight.deltas]

    def forward(x: Tensor) -> Tensor:
        """x (rows, columns, in) -> (rows, columns, out)."""
        if x.numel() >= GROUPED * x.shape[-1] * len(weight.weights.groups):
            y = x.new_empty(*x.shape[:-1], weight.base.shape[0])
            for rows, merged in weight.of_candidates():
                y[rows] = F.linear(x[rows], merged)
            return y if bias is None else y.add_(bias.merged(x.dim()))
        y = F.linear(x, weight.base)
        flat = y.view(-1, y.shape[-1])
        for scaled, delta in zip(weight.weights.times(x, weight.name), turned, strict=True):
            flat.addmm_(scaled.view(-1, x.shape[-1]), delta)
        return y if bias is None else y.add_(bias.merged(x.dim()))

    return forward


def _embedding(module: nn.Module, tensors: Mapping[str, PerRow]) -> Forward:
    weight = tensors["weight"]

    def forward(ids: Tensor) -> Tensor:
        """ids (rows, columns) -> (rows, columns, n)."""
        return weight.merged(ids.dim() + 1, lambda table: F.embedding(ids, table))

    return forward


def _norm(module: nn.Module, tensors: Mapping[str, PerRow]) -> Forward:
    weight, own, original = tensors["weight"], module._parameters, module.forward

    def forward(x: Tensor) -> Tensor:
        """The module's own computation, with a weight (rows, 1…, n) that broadcasts over x (rows,
        …, n).
        """
        kept = own["weight"]
        try:
            own["weight"] = weight.merged(x.dim())  # type: ignore[assignment]
            result: Tensor = original(x)
            return result
        finally:
            own["weight"] = kept

    return forward


def _forward_for(module: nn.Module) -> Callable[[nn.Module, Mapping[str, PerRow]], Forward] | None:
    """What makes the module's forward by row; None for a kind of module that is not known."""
    own = _own(module)
    if type(module) is nn.Linear:
        return _linear
    if type(module) is nn.Embedding and module.max_norm is None:
        return _embedding
    if (
        type(module).__name__.endswith("RMSNorm")
        and own.keys() == {"weight"}
        and not isinstance(module, nn.RMSNorm)
    ):
        return _norm
    return None


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    return {
        key: parameter for key, parameter in module._parameters.items() if parameter is not None
    }


def _values(key: str, setting: Any) -> Iterator[float | bool]:
    """Every value that a parameter takes anywhere: of a gradient and of filters all of them."""
    for item in setting if isinstance(setting, list) else [setting]:
        if isinstance(item, Mapping):
            yield from _values(key, item["value"])
        else:
            yield scalar(key, item)
