"""The decode loop: many prompts through one model at once, each row only as long as its answer.

Three things that a plain batched `generate` does not do. A row whose answer has ended leaves the
batch and the cache at once, so one long answer does not hold thirty short ones. Columns that pad
every row that is left are not read any more. And tokens that all prompts begin with are computed
once; their keys and values are copied to the rows.

What is chosen is what `generate` chooses: the same forward pass, positions and logits processors. A
row's draws come from its own seed, so they do not depend on its neighbours. The order of tokens in
a row is

    [shared prefix][padding][rest of the prompt][answer]

and columns of padding are masked, wherever they stand.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from evomerge.answering.hf.kv_cache import Rows, alike, filled
from evomerge.answering.hf.sampling import Choice, Rules

SHARED = 8  # tokens that all prompts must begin with before one more forward pass for them pays


@dataclass
class Output:
    """New tokens of one prompt, the end token left out; `ended` is False when `max_new_tokens` cut
    it off.
    """

    tokens: list[int] = field(default_factory=list)
    ended: bool = False


@dataclass(frozen=True)
class Hooks:
    """What a caller may put into the loop.

    `stopped` says of a prompt's number and its new tokens whether they end the answer. `watch` gets
    (answers ended, new tokens) of the batch after every step. `rows` gets the prompts' numbers in
    the order of the batch, before the first forward pass and whenever rows have left. `done` gets a
    prompt's number and its output when it leaves. `over` says whether all shall end as they are.
    """

    stopped: Callable[[int, list[int]], bool] | None = None
    watch: Callable[[int, int], None] | None = None
    rows: Callable[[list[int]], None] | None = None
    done: Callable[[int, Output], None] | None = None
    over: Callable[[], bool] | None = None


@torch.inference_mode()
def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    rules: Rules | Sequence[Rules],
    seeds: Sequence[int] = (),
    hooks: Hooks | None = None,
    share: bool = True,
) -> list[Output]:
    """Answer token lists, none of them empty, by one set of rules or each by its own; one seed per
    prompt where any samples.

    `share` must be False where rows of one batch have different weights. Needs `decodable(model)`.
    """
    hooks, outputs, alive = hooks or Hooks(), [Output() for _ in prompts], list(range(len(prompts)))
    own = [rules] * len(prompts) if isinstance(rules, Rules) else list(rules)
    most = max(r.max_new_tokens for r in own)
    forward = Forward(model, prompts, most)
    if hooks.rows:
        hooks.rows(alive)
    choose = Choice(own, seeds, forward.device)
    logits = forward.start(SHARED if share else None)  # (rows, vocabulary)
    for step in range(most):
        chosen = choose(logits, forward.ids, step)  # (rows,)
        keep = []
        for row, token in enumerate(chosen.tolist()):
            place = alive[row]
            output = outputs[place]
            output.ended = token in own[place].ends
            if not output.ended:
                output.tokens.append(token)
                output.ended = hooks.stopped is not None and hooks.stopped(place, output.tokens)
            if not output.ended and step + 1 < own[place].max_new_tokens:
                keep.append(row)
            elif hooks.done:
                hooks.done(place, output)
        if hooks.watch:
            hooks.watch(len(prompts) - len(keep), sum(len(output.tokens) for output in outputs))
        if not keep or (hooks.over and hooks.over()):
            break
        if len(keep) < len(alive):
            order = filled(keep)
            alive = [alive[row] for row in order]
            chosen = chosen[torch.tensor(order, device=chosen.device)]
            forward.keep(order)
            choose.keep(order)
            if hooks.rows:
                hooks.rows(alive)
        logits = forward.step(chosen)
    return outputs


def decodable(model: Any) -> bool:
    """Whether the model's cache holds keys and values alone: recurrent states and the like are
    `generate`'s business.
    """
    takes_it = "past_key_values" in inspect.signature(model.forward).parameters
    return takes_it and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
        for layer in DynamicCache(config=model.config).layers
    )


def shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with; at least one token of each is left over."""
    # every other one lies between them
    first, last = min(map(tuple, prompts)), max(map(tuple, prompts))
    most = min(map(len, prompts)) - 1
    return next((i for i in range(most) if first[i] != last[i]), most)


class Forward:
    """The forward passes of one batch, on a cache that rows leave.

    All that a faster way to run steps must have (CUDA graphs over a static cache, a compiled step)
    is what `decode` uses: `device`, `ids`, `start`, `step`, `keep`.
    """

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        self.model, self.prompts, self.max_new_tokens = model, prompts, max_new_tokens
        self.device = model.get_input_embeddings().weight.device
        known = inspect.signature(model.forward).parameters
        self.positioned, self.extra = (
            "position_ids" in known,
            {"logits_to_keep": 1} if "logits_to_keep" in known else {},
        )
        layers = DynamicCache(config=model.config).layers
        # A sliding window counts columns, gaps too; GPT-Neo's does, though its layers look plain.
        self.plain = (
            all(type(layer) is DynamicLayer for layer in layers)
            and model.config.model_type != "gpt_neo"
        )

    @property
    def ids(self) -> Tensor:
        """(rows, columns) tokens so far. Padding holds a token of the row, so that no penalty meets
        any other.
        """
        return self._ids[:, self._at : self._end]

    def start(self, share: int | None) -> Tensor:
        """The prompts; returns logits (rows, vocabulary). A prefix of at least `share` tokens is
        computed once.
        """
        prompts = self.prompts
        prefix = (
            shared_prefix(prompts)
            if share is not None and len(prompts) > 1 and self.positioned and self.plain
            else 0
        )
        prefix = prefix if share is not None and prefix >= share else 0
        rows, width = len(prompts), max(map(len, prompts))
        self._cache = self._make_cache(rows, width + self.max_new_tokens)
        gaps = torch.tensor([width - len(prompt) for prompt in prompts])
        columns = torch.arange(width + self.max_new_tokens)
        mask = (columns < prefix) | (columns >= prefix + gaps[:, None])  # (rows, columns)
        ids = [
            [*p[:prefix], *[p[0]] * (width - len(p)), *p[prefix:], *[p[0]] * self.max_new_tokens]
            for p in prompts
        ]
        self._mask, self._ids = mask.long().to(self.device), torch.tensor(ids, device=self.device)
        # columns that could be cut off at the left
        self._gaps = gaps.tolist() if not prefix else [0] * rows
        self._at, self._end = 0, width
        # positions of the answers' tokens
        self._next = torch.tensor([[len(prompt)] for prompt in prompts], device=self.device)
        positions = (self._mask.cumsum(-1) - 1).clamp(min=0)[:, :width]
        if prefix:
            self._run(self._ids[:1, :prefix], self._mask[:1, :prefix], positions[:1, :prefix])
            for layer in self._cache.layers:
                assert isinstance(layer, Rows), "a prefix is shared among plain layers only"
                layer.spread(rows)
        if share is None or not self.positioned or not self.plain:
            return self._run(
                self._ids[:, prefix:width], self._mask[:, :width], positions[:, prefix:]
            )
        return torch.cat(
            [
                self._start_group(group, prefix, width, positions, gaps)
                for group in alike(gaps.tolist())
            ]
        )

    def _start_group(
        self, group: slice, prefix: int, width: int, positions: Tensor, gaps: Tensor
    ) -> Tensor:
        """The rest of some rows' prompts, without the columns that are padding in all of them;
        returns their logits.
        """
        gap = int(gaps[group].min())
        at = 0 if prefix else gap
        for layer in self._cache.layers:
            assert isinstance(layer, Rows)
            layer.window(group.start, at, prefix + gap)
        logits = self._run(
            self._ids[group, prefix + gap : width],
            self._mask[group, at:width],
            positions[group, prefix + gap :],
        )
        for layer in self._cache.layers:
            assert isinstance(layer, Rows)
            layer.window(0, 0, width)
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """One more token (rows,) for every row; returns logits (rows, vocabulary)."""
        self._ids[:, self._end] = tokens
        self._end += 1
        logits = self._run(tokens[:, None], self._mask[:, self._at : self._end], self._next)
        self._next = self._next + 1
        return logits

    def keep(self, order: Sequence[int]) -> None:
        """Only these rows stay, in this order."""
        index = torch.tensor(order, device=self.device)
        self._mask, self._ids, self._next = self._mask[index], self._ids[index], self._next[index]
        self._gaps = [self._gaps[row] for row in order]
        if self.plain:
            self._at = min(self._gaps)
        for layer in self._cache.layers:
            if isinstance(layer, Rows):
                layer.keep(order, self._at)
            else:
                assert isinstance(layer, DynamicLayer)
                layer.reorder_cache(index)  # type: ignore[arg-type]  # int64, as it wants

    def _run(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        placed = {"position_ids": positions} if self.positioned else {}
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
            **placed,
            **self.extra,
        )
        logits: Tensor = out.logits[:, -1]
        return logits.to(self.device)

    def _make_cache(self, rows: int, columns: int) -> Cache:
        layers = DynamicCache(config=self.model.config).layers
        return Cache(
            layers=[
                Rows(rows, columns) if type(layer) is DynamicLayer else layer for layer in layers
            ]
        )
