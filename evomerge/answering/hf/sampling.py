"""How a token is chosen from its logits, and what ends an answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from evomerge.answering.engine import items_at


@dataclass(frozen=True)
class SamplingParams:
    """How a token is chosen and what ends an answer; names as in transformers."""

    max_new_tokens: int
    ends: frozenset[int] = frozenset()
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def processors(self) -> LogitsProcessorList:
        """transformers' own, in the order of its `generate`."""
        found = LogitsProcessorList()
        if self.repetition_penalty != 1.0:
            found.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.do_sample and self.temperature != 1.0:
            found.append(TemperatureLogitsWarper(self.temperature))
        if self.do_sample and self.top_p < 1.0:
            found.append(TopPLogitsWarper(self.top_p))
        return found


class TokenSampler:
    """One token per row from its logits: the largest, or drawn with the row's own seed.

    Rows with the same parameters are chosen together.
    """

    def __init__(
        self, params: Sequence[SamplingParams], seeds: Sequence[int], device: torch.device
    ) -> None:
        self.device = device
        # of each row, without what ends its answer
        self.kinds = [replace(p, max_new_tokens=0, ends=frozenset()) for p in params]
        self.processors = {kind: kind.processors() for kind in dict.fromkeys(self.kinds)}
        self.draws: Tensor | None = None  # (rows, steps)
        if any(kind.do_sample for kind in self.kinds):
            self.draws = _draws(params, seeds).to(device)
        self._group()

    def __call__(self, logits: Tensor, ids: Tensor, step: int) -> Tensor:
        """logits (rows, vocabulary), ids (rows, columns) -> (rows,)."""
        draws = None if self.draws is None else self.draws[:, step : step + 1]
        if len(self.groups) == 1:
            return self._choose(self.kinds[0], logits, ids, draws)
        chosen = torch.empty(len(logits), dtype=torch.long, device=logits.device)
        for kind, rows in self.groups.items():
            own = None if draws is None else draws[rows]
            chosen[rows] = self._choose(kind, logits[rows], ids[rows], own)
        return chosen

    def keep(self, order: Iterable[int]) -> None:
        """Keep only these rows, in this order."""
        rows = list(order)
        self.kinds = items_at(self.kinds, rows)
        if self.draws is not None:
            self.draws = self.draws[rows]
        self._group()

    def _group(self) -> None:
        rows_of: dict[SamplingParams, list[int]] = {}
        for row, kind in enumerate(self.kinds):
            rows_of.setdefault(kind, []).append(row)
        self.groups: dict[SamplingParams, Tensor] = {}
        for kind, rows in rows_of.items():
            self.groups[kind] = torch.tensor(rows, device=self.device)

    def _choose(
        self, kind: SamplingParams, logits: Tensor, ids: Tensor, draws: Tensor | None
    ) -> Tensor:
        """The tokens of rows of one kind; draws (rows, 1)."""
        if self.processors[kind]:
            # annotated for subclasses of Tensor that do not exist at run time
            logits = self.processors[kind](ids, logits.float())  # type: ignore[arg-type]
        if not kind.do_sample:
            return logits.argmax(-1)
        assert draws is not None
        # the inverse of this distribution function, at the row's draw
        below = logits.double().softmax(-1).cumsum(-1)
        drawn = torch.searchsorted(below, draws * below[:, -1:], right=True)
        # beyond the vocabulary only where weights have produced NaN
        return drawn.clamp(max=logits.shape[-1] - 1)[:, 0]


def _draws(params: Sequence[SamplingParams], seeds: Sequence[int]) -> Tensor:
    """Each row's numbers from 0 to 1, one for each step, (rows, steps)."""
    most = max(p.max_new_tokens for p in params)
    draws = torch.zeros(len(params), most, dtype=torch.float64)
    for row, own, seed in zip(draws, params, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        steps = own.max_new_tokens
        row[:steps] = torch.rand(steps, dtype=torch.float64, generator=generator)
    return draws
