"""The log-likelihood of references, and its gradient by the genome's numbers for the price of one
backward pass.

Every merged tensor is W = B + sum_m w_m D_m, and every weight is linear in the vector, w_m = sum_j
C_mj x_j. So

    d loss / d x_j = sum over tensors and siblings of C_mj <d loss / d W, D_m>

A tensor's gradient is reduced to these few products as soon as it is there, and freed: the
gradients of the whole model are never held. Rounding is passed over: a weight that is rounded to
bf16 has the slope of the one that is not.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache, DynamicLayer

from evomerge.answering.encode import Encoder
from evomerge.answering.engine import pack
from evomerge.answering.hf.decode import SHARED, decodable, shared_prefix
from evomerge.errors import StudyFileError
from evomerge.genome.weights import Genome
from evomerge.merging import quantized
from evomerge.merging.checkpoints.model_folder import VOCABULARY
from evomerge.merging.live import LiveModel
from evomerge.merging.stream import MergePlan
from evomerge.merging.tensor_merge import load_finite

# tokens, padding included, of one forward and backward pass: what is kept for backward grows with
# them
MICRO_TOKENS = 2048
PIECE = 1 << 20  # numbers of a tensor that are multiplied in fp32 at a time
Pair = tuple[list[int], list[int]]  # tokens of a prompt, and of the reference after it


@dataclass(frozen=True)
class Likelihood:
    """Of one vector: each reference's mean log-likelihood per token, and how their mean changes
    with each number, (d,).
    """

    values: tuple[float, ...]  # nats
    gradient: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)


def check_gradient(genome: Genome) -> None:
    """Raise StudyFileError for a genome whose merged tensors are not linear in its numbers."""
    if genome.method != "task_arithmetic" or genome.normalize:
        found = (
            f"{genome.method}, normalized" if genome.method == "task_arithmetic" else genome.method
        )
        raise StudyFileError(
            "is for task_arithmetic without normalize",
            where="search.warm_start",
            found=found,
            remedy="Leave it out, or change the method.",
        )


class GradientModel:
    """A LiveModel's module whose weights are known as a linear function of a genome's vector."""

    def __init__(self, model: Any, live: LiveModel, genome: Genome) -> None:
        """Raises StudyFileError for a genome that is not linear, and for a live model in 4 bits."""
        check_gradient(genome)
        if any(quantized.is_quantized(parameter) for parameter in live.live.values()):
            raise StudyFileError(
                "a model in 4 bits has no gradient",
                where="search.warm_start",
                remedy="Leave out engine.quantization.",
            )
        self.model, self.live, self.genome = model, live, genome
        self.slopes = self._slopes()

    def __call__(
        self, pairs: Sequence[Pair], vector: Sequence[float], micro_tokens: int = MICRO_TOKENS
    ) -> Likelihood:
        """The live model gets the vector's weights and keeps them. Memory that does not suffice is
        the caller's business.
        """
        self.live.apply(self.genome.decode(vector))
        total = torch.zeros(self.genome.dimensions, dtype=torch.float64)
        values = [0.0] * len(pairs)
        with self._reducing(total):
            for batch in batches(pairs, micro_tokens):
                with torch.enable_grad():
                    means = likelihoods(self.model, [pairs[i] for i in batch])
                    (means.sum() / len(pairs)).backward()
                for i, value in zip(batch, means.tolist(), strict=True):
                    values[i] = value
                del means
        return Likelihood(tuple(values), tuple(total.tolist()))

    @contextmanager
    def _reducing(self, total: Tensor) -> Iterator[None]:
        """Until the context ends, backward adds to `total`, (d,), and leaves no gradient behind."""
        before = {name: parameter.requires_grad for name, parameter in self.live.live.items()}
        handles = []
        try:
            for name, parameter in self.live.live.items():
                parameter.requires_grad_(name in self.slopes)
                if name in self.slopes:
                    handles.append(
                        parameter.register_post_accumulate_grad_hook(
                            partial(self._reduce, name, total)
                        )
                    )
            yield
        finally:
            for handle in handles:
                handle.remove()
            for name, parameter in self.live.live.items():
                parameter.grad = None
                parameter.requires_grad_(before[name])

    @torch.no_grad()
    def _reduce(self, name: str, total: Tensor, parameter: Tensor) -> None:
        """Add a tensor's share of the gradient by the vector, and let the tensor's own gradient go."""
        gradient = parameter.grad
        assert gradient is not None
        parameter.grad = None
        for delta, slope in zip(self._deltas(name), self.slopes[name], strict=True):
            if slope:
                product = inner(gradient[: len(delta)], delta)
                for j, coefficient in slope.items():
                    total[j] += coefficient * product

    def _deltas(self, name: str) -> Sequence[Tensor]:
        """Sibling - base on the parameter's device, one per sibling; rows of a vocabulary as they
        stand in the merged model.
        """
        plan = self._plan
        if name not in VOCABULARY or plan.vocabulary is None:
            ((_, inputs),) = self.live.resident.stream([name], deltas=True)
            return inputs.others
        slot, how = self.live.resident.parameters[name], plan.tensors[name]
        tensors = {
            ref: load_finite(plan.models[ref], source, slot.dtype, slot.device)
            for ref, source in how.inputs
        }
        aligned = plan.vocabulary.align(tensors, plan.layout.position(name).piece.base_model)
        found = {id(plan.models[ref]): aligned[ref] for ref, _ in how.siblings}
        assert how.base is not None
        base = aligned[how.base[0]]
        return [
            found[id(s)] - base if id(s) in found else torch.zeros_like(base)
            for s in self.live.siblings
        ]

    def _slopes(self) -> dict[str, list[dict[int, float]]]:
        """Of each tensor, for each sibling: {number of the vector: how its weight grows with it}.
        From decode, at unit vectors.
        """
        d, live = self.genome.dimensions, self.live
        slopes: dict[str, list[dict[int, float]]] = {
            name: [{} for _ in live.siblings] for name in live.names
        }
        index = {id(sibling): m for m, sibling in enumerate(live.siblings)}
        plan: MergePlan | None = None
        for j in range(d):
            recipe = self.genome.decode([float(i == j) for i in range(d)])
            plan = MergePlan(
                recipe,
                {ref: live._find(ref) for ref in recipe.models},
                live.random_seed,
                after=plan,
            )
            for name in live.names:
                how = plan.tensors[name]
                for (ref, _), weight in zip(how.siblings, how.weights, strict=True):
                    # the base among the siblings changes nothing
                    m = index.get(id(plan.models[ref]))
                    if weight and m is not None:
                        slopes[name][m][j] = weight
        assert plan is not None, "a genome has numbers"
        self._plan = plan
        return {name: rows for name, rows in slopes.items() if any(rows)}


def likelihoods(model: Any, pairs: Sequence[Pair]) -> Tensor:
    """Each reference's mean log-likelihood per token under the model as it is, (rows,) in fp32,
    differentiable.
    """
    device = model.get_input_embeddings().weight.device
    rows = [prompt + reference for prompt, reference in pairs]
    width, first = max(map(len, rows)), min(len(prompt) for prompt, _ in pairs) - 1
    ids = torch.tensor([row + [row[0]] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    share = [
        [0.0] * (len(p) - 1 - first) + [1 / len(r)] * len(r) + [0.0] * (width - len(p) - len(r))
        for p, r in pairs
    ]
    known = inspect.signature(model.forward).parameters
    # the head is much of a small model
    extra: dict[str, Any] = {"logits_to_keep": width - first} if "logits_to_keep" in known else {}
    prefix = min(first, shared_prefix(rows)) if len(rows) > 1 and plain(model) else 0
    prefix = prefix if prefix >= SHARED else 0
    cache = _prefix(model, ids[:1, :prefix], len(rows)) if prefix else None
    out = model(
        input_ids=ids[:, prefix:],
        attention_mask=mask,
        past_key_values=cache,
        use_cache=cache is not None,
        **extra,
    )
    logits = out.logits[:, first - width : -1]
    weight = torch.tensor(share, device=logits.device)
    chosen = weight > 0  # (rows, columns): of the rest no logits are turned to fp32
    losses = F.cross_entropy(
        logits[chosen].float(), ids.to(logits.device)[:, first + 1 :][chosen], reduction="none"
    )
    return -torch.zeros_like(weight).masked_scatter(chosen, losses * weight[chosen]).sum(dim=1)


def plain(model: Any) -> bool:
    """Whether the model's cache holds every key and value, so that a prefix can be computed once
    for all rows.
    """
    return decodable(model) and all(
        type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers
    )


def _prefix(model: Any, ids: Tensor, rows: int) -> DynamicCache:
    """Keys and values of tokens (1, columns) for so many rows; gradients go back through them."""
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer)
        assert layer.keys is not None
        assert layer.values is not None
        layer.keys, layer.values = (
            layer.keys.expand(rows, -1, -1, -1),
            layer.values.expand(rows, -1, -1, -1),
        )
    return cache


def batches(pairs: Sequence[Pair], tokens: int) -> list[list[int]]:
    """Indices of the pairs, longest first, in batches of at most so many tokens with padding."""
    return pack(
        [len(prompt) + len(reference) for prompt, reference in pairs], 0, len(pairs), tokens
    )


def inner(a: Tensor, b: Tensor) -> float:
    """<a, b> in fp32 pieces, added in double."""
    x, y = a.reshape(-1), b.reshape(-1)
    parts = [
        torch.dot(x[i : i + PIECE].float(), y[i : i + PIECE].float())
        for i in range(0, x.numel(), PIECE)
    ]
    return float(torch.stack(parts).double().sum()) if parts else 0.0


def make_pair(encode: Encoder, prompt: str, reference: str, end: int | None) -> Pair:
    """A prompt's tokens and those of the reference as the model would have said it, end token
    included, as far as an answer goes.

    Where the tokenizer cuts prompt and reference as it cuts the prompt alone, the rest is the
    reference: some tokenizers put a space in front of a text that stands alone.
    """
    (head,) = encode([prompt])
    tokenizer: Any = encode.tokenizer
    joint = list(tokenizer(prompt + reference, add_special_tokens=False)["input_ids"])
    alone = list(tokenizer(reference, add_special_tokens=False)["input_ids"])
    said = joint[len(head) :] if joint[: len(head)] == head else alone
    return head, [*said, *([] if end is None else [end])][: encode.max_new_tokens]
