"""The decode loop: many prompts through one model at once, each row only as long as its answer.

Three things that a plain batched `generate` does not do. A row whose answer has ended leaves the batch and the cache at
once, so one long answer does not hold thirty short ones. Columns that pad every row that is left are not read any more.
And tokens that all prompts begin with are computed once; their keys and values are copied to the rows.

What is chosen is what `generate` chooses: the same forward pass, positions and logits processors. A row's draws come
from its own seed, so they do not depend on its neighbours. The order of tokens in a row is

    [shared prefix][padding][rest of the prompt][answer]

and columns of padding are masked, wherever they stand.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

SHARED = 8  # tokens that all prompts must begin with before one more forward pass for them pays
PASS = 256  # tokens of padding that cost as much as one more forward pass


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


@dataclass
class Output:
    """New tokens of one prompt, the end token left out; `ended` is False when `max_new_tokens` cut it off."""

    tokens: list[int] = field(default_factory=list)
    ended: bool = False


@dataclass(frozen=True)
class Hooks:
    """What a caller may put into the loop.

    `stopped` says of a prompt's number and its new tokens whether they end the answer. `watch` gets (answers ended, new
    tokens) of the batch after every step. `rows` gets the prompts' numbers in the order of the batch, before the first
    forward pass and whenever rows have left. `done` gets a prompt's number and its output when it leaves. `over` says
    whether all shall end as they are.
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
    """Answer token lists, none of them empty, by one set of rules or each by its own; one seed per prompt where any samples.

    `share` must be False where rows of one batch have different weights. Needs `decodable(model)`.
    """
    hooks, outputs, alive = hooks or Hooks(), [Output() for _ in prompts], list(range(len(prompts)))
    own = [rules] * len(prompts) if isinstance(rules, Rules) else list(rules)
    most = max(r.max_new_tokens for r in own)
    forward = Forward(model, prompts, most)
    if hooks.rows:
        hooks.rows(alive)
    choose = _Choice(own, seeds, forward.device)
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
    """Whether the model's cache holds keys and values alone: recurrent states and the like are `generate`'s business."""
    takes_it = "past_key_values" in inspect.signature(model.forward).parameters
    return takes_it and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=model.config).layers)


def filled(keep: Sequence[int]) -> list[int]:
    """The rows to keep, in an order that moves few: rows from the end stand where others have left."""
    n = len(keep)
    tail = iter([row for row in keep if row >= n])
    kept = set(keep)
    return [row if row in kept else next(tail) for row in range(n)]


def shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with; at least one token of each is left over."""
    first, last = min(map(tuple, prompts)), max(map(tuple, prompts))  # every other one lies between them
    most = min(map(len, prompts)) - 1
    return next((i for i in range(most) if first[i] != last[i]), most)


def alike(gaps: Sequence[int]) -> list[slice]:
    """Rows next to each other whose prompts are read together: a group's padding, in tokens, costs less than one more pass."""
    groups: list[slice] = []
    padding = 0
    for row, gap in enumerate(gaps):
        group = groups[-1] if groups else None
        if group is not None:
            least = min(gaps[group])
            padding = sum(gaps[group]) + gap - min(least, gap) * (row + 1 - group.start)
        if group is None or padding > PASS:
            groups.append(slice(row, row + 1))
        else:
            groups[-1] = slice(group.start, row + 1)
    return groups


class Forward:
    """The forward passes of one batch, on a cache that rows leave.

    All that a faster way to run steps must have (CUDA graphs over a static cache, a compiled step) is what `decode` uses:
    `device`, `ids`, `start`, `step`, `keep`.
    """

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        self.model, self.prompts, self.max_new_tokens = model, prompts, max_new_tokens
        self.device = model.get_input_embeddings().weight.device
        known = inspect.signature(model.forward).parameters
        self.positioned, self.extra = "position_ids" in known, {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        layers = DynamicCache(config=model.config).layers
        # A sliding window counts columns, gaps too; GPT-Neo's does, though its layers look plain.
        self.plain = all(type(layer) is DynamicLayer for layer in layers) and model.config.model_type != "gpt_neo"

    @property
    def ids(self) -> Tensor:
        """(rows, columns) tokens so far. Padding holds a token of the row, so that no penalty meets any other."""
        return self._ids[:, self._at : self._end]

    def start(self, share: int | None) -> Tensor:
        """The prompts; returns logits (rows, vocabulary). A prefix of at least `share` tokens is computed once."""
        prompts = self.prompts
        prefix = shared_prefix(prompts) if share is not None and len(prompts) > 1 and self.positioned and self.plain else 0
        prefix = prefix if share is not None and prefix >= share else 0
        rows, width = len(prompts), max(map(len, prompts))
        self._cache = self._make_cache(rows, width + self.max_new_tokens)
        gaps = torch.tensor([width - len(prompt) for prompt in prompts])
        columns = torch.arange(width + self.max_new_tokens)
        mask = (columns < prefix) | (columns >= prefix + gaps[:, None])  # (rows, columns)
        ids = [[*p[:prefix], *[p[0]] * (width - len(p)), *p[prefix:], *[p[0]] * self.max_new_tokens] for p in prompts]
        self._mask, self._ids = mask.long().to(self.device), torch.tensor(ids, device=self.device)
        self._gaps = gaps.tolist() if not prefix else [0] * rows  # columns that could be cut off at the left
        self._at, self._end = 0, width
        self._next = torch.tensor([[len(prompt)] for prompt in prompts], device=self.device)  # positions of the answers' tokens
        positions = (self._mask.cumsum(-1) - 1).clamp(min=0)[:, :width]
        if prefix:
            self._run(self._ids[:1, :prefix], self._mask[:1, :prefix], positions[:1, :prefix])
            for layer in self._cache.layers:
                assert isinstance(layer, Rows), "a prefix is shared among plain layers only"
                layer.spread(rows)
        if share is None or not self.positioned or not self.plain:
            return self._run(self._ids[:, prefix:width], self._mask[:, :width], positions[:, prefix:])
        return torch.cat([self._start_group(group, prefix, width, positions, gaps) for group in alike(gaps.tolist())])

    def _start_group(self, group: slice, prefix: int, width: int, positions: Tensor, gaps: Tensor) -> Tensor:
        """The rest of some rows' prompts, without the columns that are padding in all of them; returns their logits."""
        gap = int(gaps[group].min())
        at = 0 if prefix else gap
        for layer in self._cache.layers:
            assert isinstance(layer, Rows)
            layer.window(group.start, at, prefix + gap)
        logits = self._run(self._ids[group, prefix + gap : width], self._mask[group, at:width], positions[group, prefix + gap :])
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
        out = self.model(input_ids=ids, attention_mask=mask, past_key_values=self._cache, use_cache=True, **placed, **self.extra)
        logits: Tensor = out.logits[:, -1]
        return logits.to(self.device)

    def _make_cache(self, rows: int, columns: int) -> Cache:
        layers = DynamicCache(config=self.model.config).layers
        return Cache(layers=[Rows(rows, columns) if type(layer) is DynamicLayer else layer for layer in layers])


class Rows(DynamicLayer):
    """Keys and values (rows, heads, columns, dim) of one layer in memory for the longest answer.

    Nothing is copied when a column comes; when rows leave, only those that take their places are.
    """

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns
        self.first, self.at, self.end = 0, 0, 0  # the row and the columns that count; see `window`

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Append columns; returns views of all that count."""
        rows, _, more, _ = key_states.shape
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.all_keys, self.all_values = (
                x.new_zeros(self.rows, x.shape[1], self.columns, x.shape[3]) for x in (key_states, value_states)
            )
        some, span = slice(self.first, self.first + rows), slice(self.end, self.end + more)
        self.all_keys[some, :, span], self.all_values[some, :, span] = key_states, value_states
        self.end += more
        return self._view(rows)

    def window(self, first: int, at: int, end: int) -> None:
        """What comes belongs to the rows from `first` on; columns from `at` to `end` are there. Columns never written are 0."""
        self.first, self.at, self.end = first, at, end

    def spread(self, rows: int) -> None:
        """Copy the first row to all."""
        for all_ in (self.all_keys, self.all_values):
            all_[1:rows, :, : self.end] = all_[:1, :, : self.end]
        self._view(rows)

    def keep(self, order: Sequence[int], at: int) -> None:
        """See `Forward.keep`; columns before `at` do not count any more."""
        moved = [(to, row) for to, row in enumerate(order) if to != row]
        if moved:
            to, row = (torch.tensor(x, device=self.device) for x in zip(*moved, strict=True))
            for all_ in (self.all_keys, self.all_values):
                all_[to, :, at : self.end] = all_[row, :, at : self.end]
        self.at = at
        self._view(len(order))

    def get_seq_length(self) -> int:
        return self.end - self.at

    def _view(self, rows: int) -> tuple[Tensor, Tensor]:
        some, span = slice(self.first, self.first + rows), slice(self.at, self.end)
        self.keys, self.values = self.all_keys[some, :, span], self.all_values[some, :, span]
        return self.keys, self.values


class _Choice:
    """One token per row from its logits: the largest, or drawn by a seed of the row's own. Rows of one way choose together."""

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
                    rule.max_new_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
                )
            self.draws = draws.to(device)
        self._group()

    def __call__(self, logits: Tensor, ids: Tensor, step: int) -> Tensor:
        """logits (rows, vocabulary), ids (rows, columns) -> (rows,)."""
        if len(self.groups) == 1:
            return self._of(self.ways[0], logits, ids, self.draws[:, step : step + 1] if self.sampled else None)
        chosen = torch.empty(len(logits), dtype=torch.long, device=logits.device)
        for way, rows in self.groups.items():
            chosen[rows] = self._of(way, logits[rows], ids[rows], self.draws[rows, step : step + 1] if self.sampled else None)
        return chosen

    def keep(self, order: Iterable[int]) -> None:
        rows = list(order)
        self.ways = [self.ways[row] for row in rows]
        if self.sampled:
            self.draws = self.draws[rows]
        self._group()

    def _group(self) -> None:
        self.groups = {
            way: torch.tensor([row for row, own in enumerate(self.ways) if own == way], device=self.device)
            for way in dict.fromkeys(self.ways)
        }

    def _of(self, way: Rules, logits: Tensor, ids: Tensor, draws: Tensor | None) -> Tensor:
        """The choice of rows of one way; draws (rows, 1)."""
        if self.processors[way]:
            logits = self.processors[way](ids, logits.float())  # type: ignore[arg-type]  # subclasses of Tensor that do not exist at run time
        if not way.do_sample:
            return logits.argmax(-1)
        assert draws is not None
        below = logits.double().softmax(-1).cumsum(-1)  # the inverse of this distribution function, at the row's draw
        drawn = torch.searchsorted(below, draws * below[:, -1:], right=True)
        return drawn.clamp(max=logits.shape[-1] - 1)[:, 0]  # above it only where weights have made NaN
