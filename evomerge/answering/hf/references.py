"""The mean log-likelihood per token of reference answers, differentiable by the weights."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache, DynamicLayer

from evomerge.answering.encode import Encoder
from evomerge.answering.hf.batching import pack, pad_rows
from evomerge.answering.hf.decode import SHARED, cache_argument, decodable, shared_prefix

TokenPair = tuple[list[int], list[int]]  # tokens of a prompt, and of the reference after it


def make_pair(encode: Encoder, prompt: str, reference: str, end: int | None) -> TokenPair:
    """A prompt's tokens, and the reference's as the model would have written them, with end token.

    They are cut to the length of an answer. Where the tokenizer cuts prompt and reference together
    as it cuts the prompt alone, the rest is the reference: some tokenizers put a space in front of
    a text on its own.
    """
    (head,) = encode([prompt])
    tokenizer: Any = encode.tokenizer
    joint = list(tokenizer(prompt + reference, add_special_tokens=False)["input_ids"])
    if joint[: len(head)] == head:
        written = joint[len(head) :]
    else:
        written = list(tokenizer(reference, add_special_tokens=False)["input_ids"])
    if end is not None:
        written.append(end)
    return head, written[: encode.max_new_tokens]


def batches(pairs: Sequence[TokenPair], tokens: int) -> list[list[int]]:
    """Indices of the pairs, longest first, in batches of at most so many tokens with padding."""
    lengths = [len(prompt) + len(reference) for prompt, reference in pairs]
    return pack(lengths, 0, len(pairs), tokens)


def likelihoods(model: Any, pairs: Sequence[TokenPair]) -> Tensor:
    """Each reference's mean log-likelihood per token, (rows,) in fp32, in nats, differentiable."""
    logits, tokens, shares = answer_logits(model, pairs)
    return -row_sums(F.cross_entropy(logits, tokens, reduction="none"), shares)


def answer_logits(model: Any, pairs: Sequence[TokenPair]) -> tuple[Tensor, Tensor, Tensor]:
    """The references' n tokens one row after another: fp32 logits (n, vocabulary), and ids (n,).

    Third, each column's share in its row's mean, (rows, columns): 0 where no token counts.
    """
    device = model.get_input_embeddings().weight.device
    rows = [prompt + reference for prompt, reference in pairs]
    first = min(len(prompt) for prompt, _ in pairs) - 1  # the first column whose logits count
    ids, mask = pad_rows(rows, None, False, device)
    width = ids.shape[1]
    extra: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        extra["logits_to_keep"] = width - first  # the head is a large part of a small model
    prefix = 0
    if len(rows) > 1 and has_plain_cache(model):
        prefix = min(first, shared_prefix(rows))
    if prefix < SHARED:
        prefix = 0
    if prefix:
        argument = cache_argument(model)
        assert argument is not None, "a model with a plain cache takes it"
        extra[argument] = _prefix_cache(model, ids[:1, :prefix], len(rows), argument)
    out = model(input_ids=ids[:, prefix:], attention_mask=mask, use_cache=prefix > 0, **extra)
    logits = out.logits[:, first - width : -1]
    weight = _token_weights(pairs, first, width).to(logits.device)
    chosen = weight > 0  # (rows, columns): the logits of the others are not converted to fp32
    targets = ids.to(logits.device)[:, first + 1 :]
    return logits[chosen].float(), targets[chosen], weight


def row_sums(values: Tensor, shares: Tensor) -> Tensor:
    """The weighted sum of each row, (rows,), of one value (n,) for each share above 0."""
    chosen = shares > 0
    return torch.zeros_like(shares).masked_scatter(chosen, values * shares[chosen]).sum(dim=1)


def _token_weights(pairs: Sequence[TokenPair], first: int, width: int) -> Tensor:
    """Each token's share in its reference's mean, (rows, width - 1 - first); 0 elsewhere."""
    shares = []
    for prompt, reference in pairs:
        before = len(prompt) - 1 - first
        after = width - len(prompt) - len(reference)
        shares.append([0.0] * before + [1 / len(reference)] * len(reference) + [0.0] * after)
    return torch.tensor(shares)


def has_plain_cache(model: Any) -> bool:
    """Whether the cache holds every key and value, so that rows can share a computed prefix."""
    if not decodable(model):
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def _prefix_cache(model: Any, ids: Tensor, rows: int, argument: str) -> DynamicCache:
    """Keys and values of tokens (1, columns) for so many rows; gradients flow back through them."""
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, use_cache=True, **{argument: cache})
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer)
        assert layer.keys is not None
        assert layer.values is not None
        layer.keys = layer.keys.expand(rows, -1, -1, -1)
        layer.values = layer.values.expand(rows, -1, -1, -1)
    return cache
