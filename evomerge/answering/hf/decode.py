"""The decode loop: many prompts through one model at once, each row only as long as its answer.

It does three things that a plain batched `generate` does not. A row whose answer has ended leaves
the batch and the cache immediately, so one long answer does not hold thirty short ones. Columns
that are padding in every remaining row are no longer read. And tokens that all prompts begin with
are computed once; their keys and values are copied to the rows.

It chooses what `generate` chooses: the same forward pass, positions and logits processors. A row's
draws come from its own seed, so they do not depend on its neighbours. The order of tokens in a row
is

    [shared prefix][padding][rest of the prompt][answer]

and columns of padding are masked, wherever they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from evomerge.answering.engine import items_at
from evomerge.answering.hf.kv_cache import SlotKVCache, filled, group_by_padding
from evomerge.answering.hf.sampling import SamplingParams, TokenSampler

SHARED = 8  # common tokens from which one more forward pass for them pays


@dataclass
class Output:
    """New tokens of one prompt, without the end token; `ended` is False if they were cut off."""

    tokens: list[int] = field(default_factory=list)
    ended: bool = False


@dataclass(frozen=True)
class Hooks:
    """What a caller may add to the loop.

    `is_complete` says whether a prompt's new tokens end its answer, given its index and the tokens.
    `on_progress` gets (answers ended, new tokens) of the batch after every step. `on_rows` gets the
    prompts' indices in the order of the batch, before the first forward pass and whenever rows have
    left. `on_finished` gets a prompt's index and its output when it leaves. `should_stop` says
    whether all rows must end now.
    """

    is_complete: Callable[[int, list[int]], bool] | None = None
    on_progress: Callable[[int, int], None] | None = None
    on_rows: Callable[[list[int]], None] | None = None
    on_finished: Callable[[int, Output], None] | None = None
    should_stop: Callable[[], bool] | None = None


@torch.inference_mode()
def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    seeds: Sequence[int] = (),
    hooks: Hooks | None = None,
    share: bool = True,
) -> list[Output]:
    """Answer token lists, none of them empty, with common or individual sampling parameters.

    One seed per prompt is needed if any is sampled. `share` must be False if rows of one batch have
    different weights. The model must be `decodable`.
    """
    hooks = hooks or Hooks()
    outputs = [Output() for _ in prompts]
    alive = list(range(len(prompts)))  # the prompt of each row
    if isinstance(params, SamplingParams):
        params = [params] * len(prompts)
    most = max(p.max_new_tokens for p in params)
    forward = Forward(model, prompts, most)
    if hooks.on_rows:
        hooks.on_rows(alive)
    sample = TokenSampler(params, seeds, forward.device)
    logits = forward.start(SHARED if share else None)  # (rows, vocabulary)
    for step in range(most):
        chosen = sample(logits, forward.ids, step)  # (rows,)
        keep = []
        for row, token in enumerate(chosen.tolist()):
            index = alive[row]
            output = outputs[index]
            output.ended = token in params[index].ends
            if not output.ended:
                output.tokens.append(token)
                if hooks.is_complete:
                    output.ended = hooks.is_complete(index, output.tokens)
            if not output.ended and step + 1 < params[index].max_new_tokens:
                keep.append(row)
            elif hooks.on_finished:
                hooks.on_finished(index, output)
        if hooks.on_progress:
            tokens = sum(len(output.tokens) for output in outputs)
            hooks.on_progress(len(prompts) - len(keep), tokens)
        if not keep or (hooks.should_stop and hooks.should_stop()):
            break
        if len(keep) < len(alive):
            order = filled(keep)
            alive = items_at(alive, order)
            chosen = chosen[torch.tensor(order, device=chosen.device)]
            forward.keep(order)
            sample.keep(order)
            if hooks.on_rows:
                hooks.on_rows(alive)
        logits = forward.step(chosen)
    return outputs


def cache_argument(model: Any) -> str | None:
    """The argument of the model's forward that takes a cache; None if it takes none.

    transformers 5.24 calls it `cache`, earlier releases and models with their own code
    `past_key_values`. A `cache` of a kind of its own, as xLSTM's, does not count.
    """
    known = inspect.signature(model.forward).parameters
    if "cache" in known:
        kinds = [get_origin(kind) or kind for kind in get_args(known["cache"].annotation)]
        # the annotation of older models says `tuple` or `list`
        if any(kind in (tuple, list) or issubclass(kind, Cache) for kind in kinds):
            return "cache"
    return "past_key_values" if "past_key_values" in known else None


def decodable(model: Any) -> bool:
    """Whether the model's cache holds only keys and values; others need `generate`."""
    if cache_argument(model) is None:
        return False
    layers = DynamicCache(config=model.config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with; at least one token of each is left over."""
    # every other prompt is between the smallest and the largest
    first, last = min(map(tuple, prompts)), max(map(tuple, prompts))
    most = min(map(len, prompts)) - 1
    return next((i for i in range(most) if first[i] != last[i]), most)


class Forward:
    """The forward passes of one batch, on a cache that rows leave.

    A faster way to run steps (CUDA graphs over a static cache, a compiled step) needs only what
    `decode` uses: `device`, `ids`, `start`, `step`, `keep`.
    """

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        self.model, self.prompts, self.max_new_tokens = model, prompts, max_new_tokens
        self.device = model.get_input_embeddings().weight.device
        known = inspect.signature(model.forward).parameters
        self.positioned = "position_ids" in known
        # arguments of every pass
        self.extra: dict[str, Any] = {"use_cache": True}
        self.cache_argument = cache_argument(model) or "past_key_values"
        if "logits_to_keep" in known:
            self.extra["logits_to_keep"] = 1
        layers = DynamicCache(config=model.config).layers
        # A sliding window counts columns, gaps too; GPT-Neo's does, although its layers look plain.
        self.plain = model.config.model_type != "gpt_neo" and all(
            type(layer) is DynamicLayer for layer in layers
        )

    @property
    def ids(self) -> Tensor:
        """(rows, columns) tokens so far; padding repeats a token of the row.

        A repetition penalty therefore sees no other token.
        """
        return self._ids[:, self._at : self._end]

    def start(self, share: int | None) -> Tensor:
        """Read the prompts; returns logits (rows, vocabulary).

        A common prefix of at least `share` tokens is computed once; with None no padding is left
        out either.
        """
        grouped = share is not None and self.positioned and self.plain
        prefix = 0
        if grouped and share is not None and len(self.prompts) > 1:
            prefix = shared_prefix(self.prompts)
            if prefix < share:
                prefix = 0
        lengths = torch.tensor(list(map(len, self.prompts)))
        width = int(lengths.max())
        gaps = (width - lengths).tolist()  # columns of padding
        self._cache = self._make_cache(len(self.prompts), width + self.max_new_tokens)
        self._fill(prefix, width, width - lengths)
        # columns that could be cut off on the left
        self._gaps = [0] * len(gaps) if prefix else gaps
        self._at, self._end = 0, width
        # positions of the answers' tokens
        self._next = lengths[:, None].to(self.device)
        positions = (self._mask.cumsum(-1) - 1).clamp(min=0)[:, :width]
        if not grouped:
            return self._run(self._ids[:, :width], self._mask[:, :width], positions)
        if prefix:
            self._read_prefix(prefix, positions)
        logits = []
        for group in group_by_padding(gaps):
            logits.append(self._read_group(group, prefix, width, positions, min(gaps[group])))
        return torch.cat(logits)

    def _read_prefix(self, prefix: int, positions: Tensor) -> None:
        """Compute the shared prefix once, in the first row, and copy its keys and values to all."""
        self._run(self._ids[:1, :prefix], self._mask[:1, :prefix], positions[:1, :prefix])
        for layer in self._slots():
            layer.spread(len(self.prompts))

    def _fill(self, prefix: int, width: int, gaps: Tensor) -> None:
        """Set mask and tokens, (rows, columns); `gaps`, (rows,), follow the prefix."""
        room = self.max_new_tokens
        columns = torch.arange(width + room)
        mask = (columns < prefix) | (columns >= prefix + gaps[:, None])
        ids = []
        for prompt in self.prompts:
            padding = [prompt[0]] * (width - len(prompt))
            ids.append([*prompt[:prefix], *padding, *prompt[prefix:], *[prompt[0]] * room])
        self._mask = mask.long().to(self.device)
        self._ids = torch.tensor(ids, device=self.device)

    def _read_group(
        self, group: slice, prefix: int, width: int, positions: Tensor, gap: int
    ) -> Tensor:
        """Read the rest of some rows' prompts without the `gap` columns that are padding in all.

        Returns their logits.
        """
        at = 0 if prefix else gap
        for layer in self._slots():
            layer.window(group.start, at, prefix + gap)
        logits = self._run(
            self._ids[group, prefix + gap : width],
            self._mask[group, at:width],
            positions[group, prefix + gap :],
        )
        for layer in self._slots():
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
        """Keep only these rows, in this order."""
        index = torch.tensor(order, device=self.device)
        self._mask, self._ids, self._next = self._mask[index], self._ids[index], self._next[index]
        self._gaps = items_at(self._gaps, order)
        if self.plain:
            self._at = min(self._gaps)
        for layer in self._cache.layers:
            if isinstance(layer, SlotKVCache):
                layer.keep(order, self._at)
            else:
                assert isinstance(layer, DynamicLayer)
                layer.reorder_cache(index)  # type: ignore[arg-type]  # int64, as it requires

    def _slots(self) -> list[SlotKVCache]:
        """The layers of a plain cache."""
        layers = [layer for layer in self._cache.layers if isinstance(layer, SlotKVCache)]
        assert len(layers) == len(self._cache.layers), "only plain layers share a prefix"
        return layers

    def _run(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        extra = {**self.extra, self.cache_argument: self._cache}
        if self.positioned:
            extra["position_ids"] = positions
        out = self.model(input_ids=ids, attention_mask=mask, **extra)
        logits: Tensor = out.logits[:, -1]
        return logits.to(self.device)

    def _make_cache(self, rows: int, columns: int) -> Cache:
        layers = DynamicCache(config=self.model.config).layers
        for i, layer in enumerate(layers):
            if type(layer) is DynamicLayer:
                layers[i] = SlotKVCache(rows, columns)
        return Cache(layers=layers)
