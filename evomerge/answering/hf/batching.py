"""From prompts to batches that fit into memory, and from new tokens to answers."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from evomerge.answering.encode import Encoder, first_stop, prompt_seed
from evomerge.answering.engine import (
    Answer,
    EngineSpec,
    OnAnswer,
    PromptSettings,
    Watch,
    has_passed,
    items_at,
    settings_of_each,
)
from evomerge.answering.hf.decode import Hooks, Output
from evomerge.answering.hf.sampling import SamplingParams
from evomerge.answering.reply_reader import ReplyReader
from evomerge.errors import EngineError
from evomerge.merging.device_memory import is_out_of_memory
from evomerge.study import GenerationSection

log = logging.getLogger(__name__)
T = TypeVar("T")
STOP_MARGIN = 8  # extra tokens that are decoded to look for a stop string


def pack(
    lengths: Sequence[int], new_tokens: int | Sequence[int], rows: int, tokens: int | None = None
) -> list[list[int]]:
    """Indices of prompts of these lengths in batches, longest first; ties keep their order.

    A batch has at most `rows` prompts, and prompts x (longest + most new_tokens) is at most
    `tokens`, except for a batch of one.
    """
    if isinstance(new_tokens, int):
        new_tokens = [new_tokens] * len(lengths)
    batches: list[list[int]] = []
    longest = most = 0  # of the last batch
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        size = len(batches[-1]) + 1 if batches else 1
        needed = size * (longest + max(most, new_tokens[i]))
        if batches and size <= rows and (tokens is None or needed <= tokens):
            batches[-1].append(i)
            most = max(most, new_tokens[i])
        else:
            batches.append([i])
            longest, most = lengths[i], new_tokens[i]
    return batches


def shrink_to_fit(work: Callable[[], T], shrink: Callable[[], None]) -> T:
    """Return what `work` returns; whenever it runs out of memory, call `shrink` and run it again.

    `shrink` raises EngineError when nothing can be made smaller.
    """
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # only here are the error and everything that its frames held released
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        shrink()


def pad_rows(
    rows: Sequence[Sequence[int]], pad: int | None, left: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token lists as (ids, mask), both (rows, columns), padded on the left or on the right.

    `pad` None repeats a row's own first token.
    """
    width = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        gap, ones = width - len(row), [1] * len(row)
        padding = [row[0] if pad is None else pad] * gap
        if left:
            ids.append([*padding, *row])
            mask.append([0] * gap + ones)
        else:
            ids.append([*row, *padding])
            mask.append(ones + [0] * gap)
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


@dataclass(frozen=True)
class Request:
    """One prompt with its tokens and settings."""

    prompt: str
    tokens: list[int]
    settings: GenerationSection


# answers the requests with these indices, with these hooks, in that order
RunBatch = Callable[[Sequence[int], Hooks], list[Output]]


class BatchExecutor:
    """Answers requests batch by batch, within the engine section and what memory allows.

    An engine and its capabilities share one. `limits` and `watch` are those of `Engine`.
    """

    def __init__(
        self,
        spec: EngineSpec,
        tokenizer: PreTrainedTokenizerBase,
        context: int | None,
        end_tokens: frozenset[int],
    ) -> None:
        self.section = spec.engine
        self.generation = spec.generation
        self.seed = spec.seed
        self.tokenizer = tokenizer
        self.end_tokens = end_tokens
        self.encode = Encoder(tokenizer, context, spec.generation.max_new_tokens, spec.too_long)
        self.read = ReplyReader(tokenizer, spec.generation.reasoning)
        self.limits: dict[str, int] = {}
        self.watch: Watch | None = None

    def requests(self, prompts: Sequence[str], settings: PromptSettings = None) -> list[Request]:
        """The prompts with their tokens and settings. Raises EngineError for one too long."""
        own = settings_of_each(prompts, settings, self.generation)
        rows = self.encode(prompts, [g.max_new_tokens for g in own])
        return [Request(*parts) for parts in zip(prompts, rows, own, strict=True)]

    def batches(self, requests: Sequence[Request]) -> list[list[int]]:
        """Indices of the requests in batches of `batch_size` and `batch_tokens`, longest first.

        `limits` do not change them.
        """
        section = self.section
        return _packed(requests, section.batch_size, section.batch_tokens)

    def run(
        self,
        requests: Sequence[Request],
        rows: int,
        run_batch: RunBatch,
        on_answer: OnAnswer | None = None,
        deadline: float | None = None,
    ) -> list[Answer]:
        """Answers in the order of the requests, at most `rows` of them at a time.

        Out of memory, half of the tokens that failed become the limit, which is stored in `limits`,
        and everything that `on_answer` has not received is retried. Raises EngineError when a
        single request does not fit into memory.
        """
        run = _Run(self, requests, rows, run_batch, on_answer, deadline)
        while len(run.outputs) < len(requests) and not has_passed(deadline):
            shrink_to_fit(run.answer_next, run.shrink)
        return [self.answer_of(run.outputs.get(i, Output()), r) for i, r in enumerate(requests)]

    def inputs_of(
        self, requests: Sequence[Request]
    ) -> tuple[list[list[int]], list[SamplingParams], list[int]]:
        """What `decode` takes: tokens, sampling parameters, and seeds if any request is sampled."""
        tokens = [request.tokens for request in requests]
        params = [self.params_of(request.settings) for request in requests]
        if not any(p.do_sample for p in params):
            return tokens, params, []
        seeds = []
        for request in requests:
            own = request.settings.seed
            seeds.append(prompt_seed(self.seed if own is None else own, request.prompt))
        return tokens, params, seeds

    def params_of(self, g: GenerationSection) -> SamplingParams:
        """A prompt's own settings with the model's end tokens."""
        return SamplingParams(
            g.max_new_tokens,
            self.end_tokens,
            g.do_sample,
            g.temperature,
            g.top_p,
            g.repetition_penalty,
        )

    def has_stop(self, tokens: list[int], stops: Sequence[str]) -> bool:
        """Whether the latest tokens complete a stop string; a character has up to four tokens."""
        most = 4 * max(map(len, stops)) + STOP_MARGIN
        text = str(self.tokenizer.decode(tokens[-most:], skip_special_tokens=True))
        return first_stop(text, stops) is not None

    def answer_of(self, output: Output, request: Request) -> Answer:
        """The text up to a stop string, and the thoughts before it."""
        return self.read(request.prompt, output.tokens, output.ended, request.settings.stop)

    def first_batch(self, requests: Sequence[Request], rows: int) -> list[int]:
        """Indices of the first batch, within section and limits."""
        tokens = self.limits.get("batch_tokens", self.section.batch_tokens)
        if tokens is not None and self.section.batch_tokens is not None:
            tokens = min(tokens, self.section.batch_tokens)
        return _packed(requests, rows, tokens)[0]

    def halve(self, requests: Sequence[Request]) -> None:
        """Limit batches to half of the tokens that were too many. Raises EngineError at one."""
        width = max(len(request.tokens) for request in requests)
        new = max(request.settings.max_new_tokens for request in requests)
        if len(requests) == 1:
            raise EngineError(
                f"out of memory with a single prompt of {width} tokens and max_new_tokens {new}",
                remedy="Lower generation.max_new_tokens, shorten the task, "
                "or use a device with more memory.",
            )
        limit = len(requests) * (width + new) // 2
        self.limits["batch_tokens"] = limit
        log.warning(
            "out of memory with %d prompts: from now on batches have at most %d tokens",
            len(requests),
            limit,
        )


@dataclass
class _Run:
    """One call of `BatchExecutor.run`, part by part."""

    executor: BatchExecutor
    requests: Sequence[Request]
    rows: int
    run_batch: RunBatch
    on_answer: OnAnswer | None
    deadline: float | None
    outputs: dict[int, Output] = field(default_factory=dict)  # those that are kept, by index
    batch: list[int] = field(default_factory=list)  # the indices that are being answered

    def answer_next(self) -> None:
        """Answer as many of the requests that are left as fit together."""
        waiting = [i for i in range(len(self.requests)) if i not in self.outputs]
        if not waiting or has_passed(self.deadline):
            return
        first = self.executor.first_batch(items_at(self.requests, waiting), self.rows)
        self.batch = items_at(waiting, first)
        found = self.run_batch(self.batch, self._hooks(items_at(self.requests, self.batch)))
        self.outputs.update(zip(self.batch, found, strict=True))

    def shrink(self) -> None:
        """Halve the batches after one ran out of memory. Raises EngineError at one request."""
        self.executor.halve(items_at(self.requests, self.batch))

    def _hooks(self, batch: Sequence[Request]) -> Hooks:
        stops = [request.settings.stop for request in batch]
        watch, deadline = self.executor.watch, self.deadline
        ended = len(self.outputs)
        tokens = sum(len(output.tokens) for output in self.outputs.values())

        def is_complete(index: int, tokens: list[int]) -> bool:
            return bool(stops[index]) and self.executor.has_stop(tokens, stops[index])

        def on_progress(more: int, new: int) -> None:
            assert watch is not None
            watch(ended + more, tokens + new)

        return Hooks(
            is_complete=is_complete if any(stops) else None,
            on_progress=None if watch is None else on_progress,
            on_finished=None if self.on_answer is None else self._keep,
            should_stop=None if deadline is None else lambda: has_passed(deadline),
        )

    def _keep(self, index: int, output: Output) -> None:
        """Keep the output of a batch's request as soon as it has ended, and hand it on."""
        assert self.on_answer is not None
        i = self.batch[index]
        self.outputs[i] = output
        self.on_answer(i, self.executor.answer_of(output, self.requests[i]))


def _packed(requests: Sequence[Request], rows: int, tokens: int | None) -> list[list[int]]:
    lengths = [len(request.tokens) for request in requests]
    new = [request.settings.max_new_tokens for request in requests]
    return pack(lengths, new, rows, tokens)
