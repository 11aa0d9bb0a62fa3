"""The gradient of the references' log-likelihood with respect to a genome's vector.

With teachers, of minus the divergence from their distributions in its place. It costs one backward
pass. Every merged tensor is W = B + sum_m w_m D_m, and every weight is linear in the vector,
w_m = sum_j C_mj x_j. So

    d loss / d x_j = sum over tensors and siblings of C_mj <d loss / d W, D_m>

A tensor's gradient is reduced to these few products as soon as it is computed, and freed: the
gradients of the whole model are never held together. Rounding is ignored: a weight that is rounded
to bf16 gets the slope of the one that is not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from evomerge.answering.engine import LikelihoodGradient, NextTokens, Pairs, items_at
from evomerge.answering.hf.batching import BatchExecutor, shrink_to_fit
from evomerge.answering.hf.references import TokenPair, batches, likelihoods, make_pair
from evomerge.answering.hf.teaching import divergences, next_tokens
from evomerge.errors import EngineError, StudyFileError
from evomerge.genome.genome import Genome
from evomerge.merging import quantized
from evomerge.merging.live import LiveModel
from evomerge.merging.stream import MergePlan
from evomerge.merging.tensor_merge import load_finite
from evomerge.recipe import Recipe

T = TypeVar("T")
log = logging.getLogger(__name__)
# tokens, with padding, of one forward and backward pass: what backward needs grows with them
MICRO_TOKENS = 2048
PIECE = 1 << 20  # numbers of a tensor that are multiplied in fp32 at a time


def check_gradient(genome: Genome) -> None:
    """Raise StudyFileError for a genome whose merged tensors are not linear in its vector."""
    if genome.method == "task_arithmetic" and not genome.normalize:
        return
    normalized = ", normalized" if genome.method == "task_arithmetic" else ""
    raise StudyFileError(
        "requires task_arithmetic without normalize",
        where="search.warm_start",
        found=genome.method + normalized,
        remedy="Leave it out, or change the method.",
    )


class TransformersGradient:
    """See `GradientCapability`."""

    def __init__(self, model: Any, live: LiveModel, executor: BatchExecutor) -> None:
        """`model`: the module whose parameters `live` merges."""
        self.model, self.live, self.executor = model, live, executor
        self._known: GradientModel | None = None  # of the last genome

    def __call__(
        self,
        genome: Genome,
        vector: Sequence[float],
        pairs: Pairs,
        teachers: Sequence[NextTokens] | None = None,
    ) -> LikelihoodGradient:
        """The value and gradient at `vector`, (d,), over (prompt, reference) pairs.

        Raises EngineError: out of memory with one pair; StudyFileError for a genome that is not
        linear in its vector.
        """
        if self._known is None or self._known.genome != genome:
            self._known = GradientModel(self.model, self.live, genome)
        compute = self._known
        tokens = [self.pair(prompt, reference) for prompt, reference in pairs]
        return self._within_memory(tokens, lambda micro: compute(tokens, vector, micro, teachers))

    def teachers(self, recipe: Recipe, pairs: Pairs) -> list[NextTokens]:
        """See `GradientCapability.teachers`."""
        tokens = [self.pair(prompt, answer) for prompt, answer in pairs]
        self.live.apply(recipe)

        def compute(micro_tokens: int) -> list[NextTokens]:
            known: dict[int, NextTokens] = {}
            for batch in batches(tokens, micro_tokens):
                found = next_tokens(self.model, items_at(tokens, batch))
                known.update(zip(batch, found, strict=True))
            return [known[i] for i in range(len(tokens))]

        return self._within_memory(tokens, compute)

    def _within_memory(self, tokens: Sequence[TokenPair], compute: Callable[[int], T]) -> T:
        """The result of `compute`, which gets the most tokens of a pass.

        Out of memory, half of the tokens that failed become the limit `gradient_tokens`, and it is
        computed again. Raises EngineError: out of memory with one pair.
        """
        limits = self.executor.limits
        longest = max(len(prompt) + len(reference) for prompt, reference in tokens)

        def run() -> T:
            return compute(limits.get("gradient_tokens", MICRO_TOKENS))

        def shrink() -> None:
            """Halve the tokens of a pass; a single task cannot be divided."""
            micro = limits.get("gradient_tokens", MICRO_TOKENS)
            if micro <= longest:
                raise EngineError(
                    f"out of memory with the gradient of a single task of {longest} tokens",
                    remedy="Leave out search.warm_start, or use a device with more memory.",
                )
            limits["gradient_tokens"] = micro // 2
            log.warning(
                "out of memory with %d tokens: from now on gradients are computed for at most %d "
                "at a time",
                micro,
                micro // 2,
            )

        return shrink_to_fit(run, shrink)

    def pair(self, prompt: str, reference: str) -> TokenPair:
        """Tokens of a prompt, and of its reference up to one of the model's end tokens."""
        end: int | None = self.executor.tokenizer.eos_token_id
        ends = self.executor.end_tokens
        if ends and end not in ends:
            end = min(ends)
        return make_pair(self.executor.encode, prompt, reference, end)


class GradientModel:
    """A LiveModel's module whose weights are known as a linear function of a genome's vector."""

    def __init__(self, model: Any, live: LiveModel, genome: Genome) -> None:
        """Raises StudyFileError for a genome that is not linear, and for a live model in 4 bits."""
        check_gradient(genome)
        if any(quantized.is_quantized(parameter) for parameter in live.live.values()):
            raise StudyFileError(
                "a 4-bit model has no gradient",
                where="search.warm_start",
                remedy="Leave out engine.quantization.",
            )
        self.model, self.live, self.genome = model, live, genome
        self.slopes = self._slopes()

    def __call__(
        self,
        pairs: Sequence[TokenPair],
        vector: Sequence[float],
        micro_tokens: int = MICRO_TOKENS,
        teachers: Sequence[NextTokens] | None = None,
    ) -> LikelihoodGradient:
        """Give the live model the vector's weights to keep; running out of memory raises."""
        self.live.apply(self.genome.decode(vector))
        total = torch.zeros(self.genome.dimensions, dtype=torch.float64)
        values = [0.0] * len(pairs)
        with self._reducing(total):
            for batch in batches(pairs, micro_tokens):
                with torch.enable_grad():
                    rows = items_at(pairs, batch)
                    if teachers is None:
                        means = likelihoods(self.model, rows)
                    else:
                        means = -divergences(self.model, rows, items_at(teachers, batch))
                    (means.sum() / len(pairs)).backward()
                for i, value in zip(batch, means.tolist(), strict=True):
                    values[i] = value
                del means
        return LikelihoodGradient(tuple(values), tuple(total.tolist()))

    @contextmanager
    def _reducing(self, total: Tensor) -> Iterator[None]:
        """Make backward add to `total`, (d,), and leave no gradients, until the context ends."""
        parameters = self.live.live
        before = {name: parameter.requires_grad for name, parameter in parameters.items()}
        handles = []
        try:
            for name, parameter in parameters.items():
                parameter.requires_grad_(name in self.slopes)
                if name in self.slopes:
                    reduce = partial(self._reduce, name, total)
                    handles.append(parameter.register_post_accumulate_grad_hook(reduce))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for name, parameter in parameters.items():
                parameter.grad = None
                parameter.requires_grad_(before[name])

    @torch.no_grad()
    def _reduce(self, name: str, total: Tensor, parameter: Tensor) -> None:
        """Add a tensor's share of the gradient to `total`, and free the tensor's own gradient."""
        gradient = parameter.grad
        assert gradient is not None
        parameter.grad = None
        for delta, slope in zip(self._deltas(name), self.slopes[name], strict=True):
            if slope:
                rows = gradient if delta.ndim == 0 else gradient[: len(delta)]
                product = inner(rows, delta)
                for j, coefficient in slope.items():
                    total[j] += coefficient * product

    def _deltas(self, name: str) -> Sequence[Tensor]:
        """Sibling - base on the parameter's device, one per sibling.

        Rows of a vocabulary are in the merged model's order.
        """
        plan, planned = self._plan, self.live.planned(self._plan, name)
        if planned not in plan.donor.vocabulary or plan.vocabulary is None:
            ((_, inputs),) = self.live.resident.stream([name], deltas=True)
            return inputs.others
        parameter, how = self.live.resident.parameters[name], plan.tensors[planned]
        tensors = {}
        for ref, source in how.inputs:
            model = plan.models[ref]
            tensors[ref] = load_finite(model, source, parameter.dtype, parameter.device)
        aligned = plan.vocabulary.align(tensors, plan.layout.position(planned).piece.base_model)
        found = {id(plan.models[ref]): aligned[ref] for ref, _ in how.siblings}
        assert how.base is not None
        base = aligned[how.base[0]]
        deltas = []
        for sibling in self.live.siblings:
            own = found.get(id(sibling))
            deltas.append(torch.zeros_like(base) if own is None else own - base)
        return deltas

    def _slopes(self) -> dict[str, list[dict[int, float]]]:
        """For each tensor and sibling, {index in the vector: derivative of the weight by it}.

        They come from decoding the unit vectors.
        """
        d, live = self.genome.dimensions, self.live
        index = {id(sibling): m for m, sibling in enumerate(live.siblings)}
        slopes: dict[str, list[dict[int, float]]] = {}
        for name in live.names:
            slopes[name] = [{} for _ in live.siblings]
        plan: MergePlan | None = None
        for j in range(d):
            recipe = self.genome.decode([float(i == j) for i in range(d)])
            plan = live.plan(recipe, after=plan)
            for name in live.names:
                how = plan.tensors[live.planned(plan, name)]
                if how.is_copy:
                    continue
                for (ref, _), weight in zip(how.siblings, how.weights, strict=True):
                    # the base among the siblings changes nothing
                    m = index.get(id(plan.models[ref]))
                    if weight and m is not None:
                        slopes[name][m][j] = weight
        assert plan is not None, "a genome has numbers"
        self._plan = plan
        return {name: rows for name, rows in slopes.items() if any(rows)}


def inner(a: Tensor, b: Tensor) -> float:
    """<a, b> in fp32 pieces, added in double."""
    x, y = a.reshape(-1), b.reshape(-1)
    if not x.numel():
        return 0.0
    parts = []
    for i in range(0, x.numel(), PIECE):
        parts.append(torch.dot(x[i : i + PIECE].float(), y[i : i + PIECE].float()))
    return float(torch.stack(parts).double().sum())
