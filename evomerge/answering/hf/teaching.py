"""How far a model's next-token distributions are from a teacher's, with a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from evomerge.answering.engine import NextTokens
from evomerge.answering.hf.references import TokenPair, answer_logits, row_sums

# tokens of a distribution that are kept: of 500 answers of 1,000 tokens that is 1 GB
KEPT = 256
LEAST = 1e-6  # of a share that is a difference of fp32 sums; below it nothing is known


@torch.inference_mode()
def next_tokens(model: Any, pairs: Sequence[TokenPair]) -> list[NextTokens]:
    """The model's distributions of each pair's second tokens."""
    logits, _, _ = answer_logits(model, pairs)
    logprobs, tokens = logits.log_softmax(dim=-1).topk(min(KEPT, logits.shape[-1]))
    lengths = [len(answer) for _, answer in pairs]
    rows = zip(tokens.int().cpu().split(lengths), logprobs.cpu().split(lengths), strict=True)
    return [NextTokens(*row) for row in rows]


def divergences(model: Any, pairs: Sequence[TokenPair], teachers: Sequence[NextTokens]) -> Tensor:
    """Each pair's KL(teacher || model), the mean per token, (rows,) in fp32, in nats.

    The tokens that a teacher does not name are one: that divergence is a lower bound of the whole.
    """
    logits, _, shares = answer_logits(model, pairs)
    tokens = torch.cat([teacher.tokens for teacher in teachers]).to(logits.device).long()
    wanted = torch.cat([teacher.logprobs for teacher in teachers]).to(logits.device)
    found = logits.gather(1, tokens) - logits.logsumexp(dim=-1, keepdim=True)
    p, q = wanted.exp(), found.exp()
    named = (p * (wanted - found)).sum(dim=-1)
    if tokens.shape[-1] == logits.shape[-1]:
        return row_sums(named, shares)
    p_rest = (1 - p.sum(dim=-1)).clamp(min=LEAST)
    q_rest = (1 - q.sum(dim=-1)).clamp(min=LEAST)
    return row_sums(named + p_rest * (p_rest / q_rest).log(), shares)
