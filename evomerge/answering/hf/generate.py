"""Answering with transformers' own `generate`, for models that `decode` does not support."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList, set_seed

from evomerge.answering.encode import prompt_seed
from evomerge.answering.engine import items_at
from evomerge.answering.hf.batching import BatchExecutor, Request, pad_rows
from evomerge.answering.hf.decode import Hooks, Output
from evomerge.answering.hf.sampling import SamplingParams
from evomerge.study import GenerationSection


def generate_all(
    model: Any, executor: BatchExecutor, requests: Sequence[Request], hooks: Hooks
) -> list[Output]:
    """`generate` for each group of prompts with the same settings, in order of appearance.

    Only the hooks `on_finished` and `should_stop` are called.
    """
    outputs = [Output() for _ in requests]
    groups: dict[GenerationSection, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(request.settings, []).append(index)
    for settings, indices in groups.items():
        if hooks.should_stop is not None and hooks.should_stop():
            break
        found = _generate(model, executor, items_at(requests, indices), settings, hooks)
        for index, output in zip(indices, found, strict=True):
            outputs[index] = output
            complete = output.ended or len(output.tokens) == settings.max_new_tokens
            if complete and hooks.on_finished is not None:
                hooks.on_finished(index, output)
    return outputs


@torch.inference_mode()
def _generate(
    model: Any,
    executor: BatchExecutor,
    requests: Sequence[Request],
    settings: GenerationSection,
    hooks: Hooks,
) -> list[Output]:
    """One call of `generate`: all rows run to the end of the longest answer."""
    pad = executor.tokenizer.pad_token_id
    device = model.get_input_embeddings().weight.device
    input_ids, mask = pad_rows([request.tokens for request in requests], pad, True, device)
    width = input_ids.shape[1]

    def stop(ids: torch.Tensor, scores: object) -> torch.Tensor:
        # transformers' own `stop_strings` fail with tokenizers that have no rule for joining tokens
        over = hooks.should_stop is not None and hooks.should_stop()
        ended = []
        for row in ids[:, width:].tolist():
            stopped = bool(settings.stop) and executor.has_stop(row, settings.stop)
            ended.append(over or stopped)
        return ids.new_tensor(ended).bool()

    stopping = StoppingCriteriaList()
    if settings.stop or hooks.should_stop is not None:
        stopping.append(stop)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if settings.do_sample:
            seed = executor.seed if settings.seed is None else settings.seed
            set_seed(prompt_seed(seed, "\0".join(request.prompt for request in requests)))
        output = model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            generation_config=_config(executor.params_of(settings), pad),
            stopping_criteria=stopping,
        )
    return [_until_end(executor, row, settings.stop) for row in output[:, width:].tolist()]


def _config(params: SamplingParams, pad: int) -> Any:
    """The parameters as transformers' configuration, with nothing from the model's own."""
    make: Any = GenerationConfig  # its constructor is not annotated
    drawing = {}
    if params.do_sample:
        drawing = {"temperature": params.temperature, "top_p": params.top_p, "top_k": 0}
    return make(
        max_new_tokens=params.max_new_tokens,
        do_sample=params.do_sample,
        repetition_penalty=params.repetition_penalty,
        eos_token_id=sorted(params.ends) or None,
        pad_token_id=pad,
        **drawing,
    )


def _until_end(executor: BatchExecutor, tokens: list[int], stops: Sequence[str]) -> Output:
    """The tokens that `decode` would have returned for a row, which `generate` pads."""
    kept: list[int] = []
    for token in tokens:
        if token in executor.end_tokens:
            return Output(kept, ended=True)
        kept.append(token)
        if stops and executor.has_stop(kept, stops):
            return Output(kept, ended=True)
    return Output(kept)
