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


@dataclass(frozen=True)
class Rules:
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


class Choice:
    """One token per row from its logits: the largest, or drawn by a seed of the row's own. Rows of
    one way choose together.
    """

    def __init__(self, rules: Sequence[Rules], seeds: Sequence[int], device: torch.device) -> None:
        self.device = device
        self.ways = [replace(r, max_new_tokens=0, ends=frozenset()) for r in rules]  # of the rows
        self.processors = {way: way.processors() for way in dict.fromkeys(self.ways)}
        self.sampled = any(way.do_sample for way in self.ways)
        if self.sampled:
            most = max(r.max_new_tokens for r in rules)
            draws = torch.zeros(len(rules), most, dtype=torch.float64)  # (rows, steps)
            for row, rule, seed in zip(draws, rules, seeds, strict=True):
                row[: rule.max_new_tokens] = torch.rand(
                    rule.max_new_tokens,
                    dtype=torch.float64,
                    generator=torch.Generator().manual_seed(seed),
                )
            self.draws = draws.to(device)
        self._group()

    def __call__(self, logits: Tensor, ids: Tensor, step: int) -> Tensor:
        """logits (rows, vocabulary), ids (rows, columns) -> (rows,)."""
        if len(self.groups) == 1:
            return self._of(
                self.ways[0], logits, ids, self.draws[:, step : step + 1] if self.sampled else None
            )
        chosen = torch.empty(len(logits), dtype=torch.long, device=logits.device)
        for way, rows in self.groups.items():
            chosen[rows] = self._of(
                way,
                logits[rows],
                ids[rows],
                self.draws[rows, step : step + 1] if self.sampled else None,
            )
        return chosen

    def keep(self, order: Iterable[int]) -> None:
        rows = list(order)
        self.ways = [self.ways[row] for row in rows]
        if self.sampled:
            self.draws = self.draws[rows]
        self._group()

    def _group(self) -> None:
        self.groups = {
            way: torch.tensor(
                [row for row, own in enumerate(self.ways) if own == way], device=self.device
            )
            for way in dict.fromkeys(self.ways)
        }

    def _of(self, way: Rules, logits: Tensor, ids: Tensor, draws: Tensor | None) -> Tensor:
        """The choice of rows of one way; draws (rows, 1)."""
        if self.processors[way]:
            logits = self.processors[way](ids, logits.float())  # type: ignore[arg-type]  # subclasses of Tensor that do not exist at run time
        if not way.do_sample:
            return logits.argmax(-1)
        assert draws is not None
        # the inverse of this distribution function, at the row's draw
        below = logits.double().softmax(-1).cumsum(-1)
        drawn = torch.searchsorted(below, draws * below[:, -1:], right=True)
        # above it only where weights have made NaN
        return drawn.clamp(max=logits.shape[-1] - 1)[:, 0]
