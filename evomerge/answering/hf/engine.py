"""The transformers engine: one live model, weights replaced in place, its own decode loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from evomerge.answering.engine import Answer, EngineSpec, OnAnswer, PromptSettings, Watch, items_at
from evomerge.answering.hf.batching import BatchExecutor
from evomerge.answering.hf.decode import Hooks, Output, decodable, decode
from evomerge.answering.hf.generate import generate_all
from evomerge.answering.hf.gradient import TransformersGradient
from evomerge.answering.hf.likelihood import TransformersLikelihood
from evomerge.answering.hf.loading import context_of, load_model, load_tokenizer
from evomerge.answering.hf.population import TransformersPopulation
from evomerge.answering.thoughts import Marks
from evomerge.errors import EngineError
from evomerge.merging.live import LiveModel
from evomerge.merging.memory_plan import batch_cache_bytes
from evomerge.recipe import Recipe


class TransformersEngine:
    """Answers with `decode`, and with transformers' `generate` for caches `decode` does not know.

    Gradients and passes over a population need siblings.
    """

    def __init__(self, spec: EngineSpec) -> None:
        """Raises EngineError: the model does not fit the devices; ModelError as loading does."""
        if spec.engine.threads is not None:
            torch.set_num_threads(spec.engine.threads)
        self.tokenizer = load_tokenizer(spec.base, spec.engine.trust_remote_code)
        dtype = getattr(torch, spec.dtype)
        self.model = load_model(spec.base, spec.engine, dtype, merged=bool(spec.siblings))
        self.live = _open_live(self.model, spec) if spec.siblings else None
        self.context = context_of(self.model.config)
        ends = _end_tokens(self.model, self.tokenizer)
        self.executor = BatchExecutor(spec, self.tokenizer, self.context, ends)
        self.limits = self.executor.limits
        self.likelihood = TransformersLikelihood(self.model, self.tokenizer)
        self.gradient: TransformersGradient | None = None
        self.batched_candidates: TransformersPopulation | None = None
        if self.live is not None:
            self.gradient = TransformersGradient(self.model, self.live, self.executor)
            self.batched_candidates = TransformersPopulation(self.model, self.live, self.executor)

    @property
    def marks(self) -> Marks | None:
        """See `Engine`."""
        return self.executor.read.marks

    @property
    def watch(self) -> Watch | None:
        """See `Engine`."""
        return self.executor.watch

    @watch.setter
    def watch(self, watch: Watch | None) -> None:
        self.executor.watch = watch

    def apply(self, recipe: Recipe) -> None:
        """Give the live model the recipe's weights, in place."""
        assert self.live is not None, "an engine without siblings merges nothing"
        self.live.apply(recipe)

    def batches(self, prompts: Sequence[str], settings: PromptSettings = None) -> list[list[int]]:
        """Indices of the prompts in batches of `batch_size` and `batch_tokens`, longest first.

        `limits` do not change them.
        """
        return self.executor.batches(self.executor.requests(prompts, settings))

    def answer(
        self,
        prompts: Sequence[str],
        settings: PromptSettings = None,
        on_answer: OnAnswer | None = None,
        deadline: float | None = None,
    ) -> list[Answer]:
        """Answer one batch, in parts where memory requires it; see `BatchExecutor.run`.

        Raises EngineError: out of memory with one prompt, or a prompt that leaves no room in the
        context.
        """
        requests = self.executor.requests(prompts, settings)

        def run_batch(batch: Sequence[int], hooks: Hooks) -> list[Output]:
            part = items_at(requests, batch)
            if not decodable(self.model):
                return generate_all(self.model, self.executor, part, hooks)
            return decode(self.model, *self.executor.inputs_of(part), hooks)

        rows = self.executor.section.batch_size
        return self.executor.run(requests, rows, run_batch, on_answer, deadline)


def _open_live(model: Any, spec: EngineSpec) -> LiveModel:
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise EngineError(
            "the model does not fit the devices: parts of it are offloaded to the CPU or the disk, "
            "where they cannot be merged",
            where="engine.device_map",
            found=spec.engine.device_map,
            remedy="Use engine.quantization: 4bit, or more GPUs.",
        )
    section, new = spec.engine, spec.generation.max_new_tokens
    width = getattr(torch, spec.dtype).itemsize
    config, most = spec.base.config, section.batch_tokens
    cache = batch_cache_bytes(config, section.batch_size, new, width, most)
    return LiveModel(model, spec.base, spec.siblings, spec.seed, section.residency, cache)


def _end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The model's end tokens; nothing else in its generation_config.json is used."""
    ends: Any = getattr(model.generation_config, "eos_token_id", None)
    if ends is None:
        ends = tokenizer.eos_token_id
    if isinstance(ends, list):
        return frozenset(ends)
    return frozenset() if ends is None else frozenset([ends])
