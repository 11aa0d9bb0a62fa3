"""Greedy answers and references' likelihoods from one reading of the prompts.

The engine reads every prompt twice, once to answer it and once before its reference; where answers
are a word or two, reading is nearly all of the work. Here the reference is read from the prompt's
keys and values, which are then cut back for the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from evomerge.answering.engine import Answer, items_at
from evomerge.answering.hf.batching import pad_rows
from evomerge.answering.hf.decode import cache_argument, shared_prefix
from evomerge.answering.hf.engine import TransformersEngine
from evomerge.answering.hf.references import TokenPair
from evomerge.answering.prompts import Prompter
from evomerge.tasks import Task

ROWS = 64  # prompts read together, of like length
KEPT = 0.75  # share of unfinished rows below which the others are dropped from the cache


@dataclass(frozen=True)
class Read:
    """What one task's reading gave."""

    answer: Answer
    nats: float  # minus the mean log-likelihood of a reference's token


def read_tasks(
    engine: TransformersEngine, prompter: Prompter, tasks: Sequence[Task], most: int
) -> list[Read]:
    """Each task's answer of at most so many tokens, and its reference's likelihood, by the weights
    that the engine's model has now.
    """
    assert engine.gradient is not None
    texts = [prompter.render(task.input) for task in tasks]
    pairs = [
        engine.gradient.pair(text, task.output) for text, task in zip(texts, tasks, strict=True)
    ]
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]))
    found: dict[int, Read] = {}
    for at in range(0, len(order), ROWS):
        batch = order[at : at + ROWS]
        tokens, nats = _read(engine, items_at(pairs, batch), most)
        for i, row, value in zip(batch, tokens, nats, strict=True):
            new, ended = row
            found[i] = Read(engine.executor.read(texts[i], new, ended, ()), value)
    return [found[i] for i in range(len(pairs))]


@torch.inference_mode()
def _read(
    engine: TransformersEngine, pairs: Sequence[TokenPair], most: int
) -> tuple[list[tuple[list[int], bool]], list[float]]:
    """Each row's new tokens, and whether it ended; and minus its reference's mean likelihood."""
    model: Any = engine.model
    prompts = [prompt for prompt, _ in pairs]
    prefix = shared_prefix(prompts)
    cache = DynamicCache(config=model.config)
    if prefix:
        start = torch.tensor([prompts[0][:prefix]], device=model.device)
        positions = torch.arange(prefix, device=model.device)[None]
        _forward(model, start, torch.ones_like(start), positions, cache, logits_to_keep=1)
        cache.batch_repeat_interleave(len(pairs))
    ids, seen = pad_rows([prompt[prefix:] for prompt in prompts], None, True, model.device)
    mask = torch.cat([torch.ones(len(pairs), prefix, dtype=seen.dtype), seen], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    last = _forward(model, ids, mask, positions[:, prefix:], cache, logits_to_keep=1)
    width, ends = mask.shape[1], positions[:, -1:] + 1
    nats = _reference_nats(model, [reference for _, reference in pairs], mask, ends, cache, last)
    more = cache.get_seq_length() - width
    if more:
        cache.crop(-more)
    rows: list[tuple[list[int], bool]] = [([], False) for _ in pairs]
    alive = list(range(len(pairs)))  # the row of each that is still decoded
    for step in range(most):
        chosen = last.argmax(dim=-1)  # (alive, 1)
        for row, token in zip(alive, chosen[:, 0].tolist(), strict=True):
            new, ended = rows[row]
            if not ended:
                ended = token in engine.executor.end_tokens
                rows[row] = (new if ended else [*new, token]), ended
        left = [i for i, row in enumerate(alive) if not rows[row][1]]
        if not left or step + 1 == most:
            break
        if len(left) <= KEPT * len(alive):
            kept = torch.tensor(left, device=mask.device)
            cache.batch_select_indices(kept)
            alive = items_at(alive, left)
            chosen, mask, ends = chosen[kept], mask[kept], ends[kept]
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        last = _forward(model, chosen, mask, ends + step, cache)
    return rows, nats


def _reference_nats(
    model: Any,
    references: Sequence[list[int]],
    mask: Tensor,
    ends: Tensor,
    cache: DynamicCache,
    last: Tensor,
) -> list[float]:
    """Of references after what the cache holds, whose last logits (rows, 1, vocabulary) are given.

    `ends`, (rows, 1), are the positions that come next.
    """
    targets, own = pad_rows(references, None, False, mask.device)
    logits = last
    if targets.shape[1] > 1:
        longer = torch.cat([mask, own[:, :-1]], dim=1)
        positions = ends + torch.arange(targets.shape[1] - 1)
        more = _forward(model, targets[:, :-1], longer, positions, cache)
        logits = torch.cat([last, more], dim=1)
    each = logits.float().log_softmax(dim=-1).gather(2, targets[..., None])[..., 0]
    means: Tensor = -(each * own).sum(dim=1) / own.sum(dim=1)
    return [float(value) for value in means]


def _forward(
    model: Any, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache, **more: Any
) -> Tensor:
    """Logits, (rows, columns, vocabulary), of the last columns where `logits_to_keep` says so."""
    name = cache_argument(model)
    assert name is not None, "a model with a plain cache"
    more |= {"position_ids": positions, "use_cache": True, name: cache}
    out = model(input_ids=ids, attention_mask=mask, **more)
    logits: Tensor = out.logits
    return logits
