"""`evomerge check --gpu SIZE`: whether a study fits such a GPU, and what would make it fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evomerge.console import counted, size
from evomerge.merging.checkpoints.size import count_parameters
from evomerge.merging.memory_plan import (
    MemoryPlan,
    batch_cache_bytes,
    largest_batch,
    plan_memory,
)
from evomerge.searching.preflight.findings import Findings
from evomerge.searching.preflight.needs import BYTES, live_bytes
from evomerge.study import Study

MOST_GPUS = 64


def check_gpus(
    findings: Findings, study: Study, config: Mapping[str, Any], memories: Sequence[int]
) -> None:
    """A finding for each GPU, of so many bytes."""
    engine, width = study.engine, BYTES[study.search.dtype]
    parameters = count_parameters(config)
    live = live_bytes(config, parameters, width, engine.quantization)
    on_gpu = parameters * width * len(study.genome.all_models)
    rows = engine.batch_size
    if engine.kind == "vllm":
        on_gpu, rows = 0, 1  # it merges in host memory, and runs what its cache has room for
    new = study.generation.max_new_tokens
    cache = batch_cache_bytes(config, rows, new, width, engine.batch_tokens)
    one = batch_cache_bytes(config, 1, new, width, engine.batch_tokens)
    for memory in memories:
        name, plan = f"gpu {size(memory)}", plan_memory(memory, live, cache, on_gpu)
        if not plan.short:
            findings.add("ok", name, _described(plan, study, rows))
            continue
        fitting, fewer = [], _batch(memory, live, one, rows)
        if fewer:
            fitting.append(f"engine.batch_size: {fewer}")
        if engine.kind != "vllm" and engine.quantization is None:
            quantized = live_bytes(config, parameters, width, "4bit")
            left = _batch(memory, quantized, one, rows)
            smaller = f" with batch_size: {left}" if left and left < rows else ""
            if left:
                fitting.append(f"engine.quantization: 4bit ({size(quantized)} live){smaller}")
        gpus = _gpus_for(memory, live, cache)
        if gpus is not None:
            key, value = "device_map", "auto"
            if engine.kind == "vllm":
                key, value = "vllm.tensor_parallel_size", str(gpus)
            fitting.append(f"engine.{key}: {value} on {counted(gpus, 'such GPU')}")
        remedy = f"Set {', or '.join(fitting)}." if fitting else "Use a larger GPU."
        text = f"too small by {size(plan.short)}: {_needed(plan, rows)}"
        # batches that are too large are halved when memory runs out; a model cannot be
        findings.add("low" if fewer else "wrong", name, f"{text}. {remedy}")


def _batch(memory: float, live: float, one: float, rows: int) -> int:
    """How many of the answers fit a batch, of so many bytes each; 0: the live model does not."""
    if not one:  # a model whose cache is not known
        return 0 if plan_memory(memory, live, 0, 0).short else rows
    return min(rows, largest_batch(memory, live, one))


def _gpus_for(memory: float, live: float, cache: float) -> int | None:
    """The least number of such GPUs that hold the live model and its cache together."""
    for gpus in range(2, MOST_GPUS + 1):
        # each has its share of both
        if not plan_memory(memory, live / gpus, cache / gpus, 0).short:
            return gpus
    return None


def _needed(plan: MemoryPlan, rows: int) -> str:
    answers = counted(rows, "answer")
    return f"{size(plan.live)} live, about {size(plan.cache)} of keys and values ({answers})"


def _described(plan: MemoryPlan, study: Study, rows: int) -> str:
    """What is where."""
    text = _needed(plan, rows)
    residency = study.engine.residency
    if study.engine.kind == "vllm" or residency in ("host", "disk"):
        place = "on disk" if residency == "disk" else "in host memory"
        return f"{text}; base and siblings {place}"
    if plan.on_device >= plan.models:
        return f"{text}; base and siblings too ({size(plan.models)})"
    part = f"{size(plan.on_device)} of {size(plan.models)}"
    return f"{text}; {part} of base and siblings, the rest in host memory or on disk"
