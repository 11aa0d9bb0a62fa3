"""How a GPU's memory is shared out: the live model, keys and values, then base and siblings.

Pure functions of sizes in bytes. `Resident` places by them, and `evomerge check --gpu` shows what
that will be on another GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evomerge.errors import ModelError
from evomerge.merging.checkpoints.size import kv_cache_bytes

CONTEXT = 0.6e9  # of CUDA itself, and the kernels that it has loaded
PROMPT = 512  # tokens of the longest prompt, before the prompts are known
# Of what the live model leaves, the most that base and siblings may take: gradient steps and long
# prompts need room besides the keys and values of a batch.
SHARE = 0.6
ACTIVATIONS = 0.05  # of what the live model leaves, beside keys and values


@dataclass(frozen=True)
class MemoryPlan:
    """What is where, in bytes. `short`: by how much the GPU is too small; 0 where it suffices."""

    live: float
    cache: float  # keys and values of one batch
    models: float  # base and siblings
    on_device: float  # of `models`; the rest waits in host memory or on disk
    short: float


def plan_memory(memory: float, live: float, cache: float, models: float) -> MemoryPlan:
    """The plan for a GPU of so much memory: each part only where those before it fit."""
    free = memory - CONTEXT - live
    short = max(0.0, cache - _for_answers(free))
    return MemoryPlan(live, cache, models, min(models, room_for_models(free, cache)), short)


def room_for_models(free: float, cache: float) -> float:
    """What base and siblings may take of the memory that the live model leaves free."""
    return max(0.0, min(SHARE * free, _for_answers(free) - cache))


def largest_batch(memory: float, live: float, cache_of_one: float) -> int:
    """Most answers of a batch whose keys and values fit beside the live model; 0: not one."""
    return max(0, int(_for_answers(memory - CONTEXT - live) // cache_of_one))


def _for_answers(free: float) -> float:
    """What activations leave; negative where the live model itself does not fit."""
    return free - ACTIVATIONS * max(0.0, free)


def batch_cache_bytes(
    config: Mapping[str, Any],
    rows: int,
    max_new_tokens: int,
    bytes_per_number: int,
    batch_tokens: int | None = None,
) -> float:
    """Keys and values of so many answers with prompts of PROMPT tokens, at most `batch_tokens`.

    0 for a model whose configuration does not tell.
    """
    tokens = rows * (PROMPT + max_new_tokens)
    if batch_tokens is not None:
        tokens = min(tokens, batch_tokens)
    try:
        return float(kv_cache_bytes(config, tokens, bytes_per_number))
    except ModelError:
        return 0.0
