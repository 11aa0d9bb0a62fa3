"""The number of CPU threads that answers fastest, measured on the model itself.

Threads wait for each other at every layer. For a small model that costs more than they bring, and
on a busy machine, where one of them has no core, many times more.
"""

from __future__ import annotations

import time
from typing import Any

import torch

LARGEST = 100_000_000  # parameters; larger models use what they are given
SECONDS = 0.5  # of the whole trial
ROWS = 8  # prompts of a step
WORSE = 1.5  # times the best seconds, at which more threads are not tried


def fastest_threads(model: Any) -> int | None:
    """The best count up to torch's own; None where there is nothing to choose.

    That is a larger model, another device, or a single thread. torch's setting is left as it is.
    """
    most = torch.get_num_threads()
    parameters = list(model.parameters())
    on_cpu = all(parameter.device.type == "cpu" for parameter in parameters)
    if most == 1 or not on_cpu or sum(p.numel() for p in parameters) >= LARGEST:
        return None
    counts = [1]
    while counts[-1] * 2 < most:
        counts.append(counts[-1] * 2)
    counts.append(most)
    seconds: dict[int, float] = {}
    try:
        for count in counts:
            torch.set_num_threads(count)
            seconds[count] = _seconds_per_step(model, SECONDS / len(counts))
            if seconds[count] > WORSE * min(seconds.values()):
                break
    finally:
        torch.set_num_threads(most)
    return min(seconds, key=lambda count: seconds[count])


def _seconds_per_step(model: Any, limit: float) -> float:
    """The mean over steps, not the least: what a step waits for another process counts too."""
    tokens = torch.zeros((ROWS, 1), dtype=torch.long)
    began = time.perf_counter()
    steps = 0
    with torch.inference_mode():
        model(input_ids=tokens, use_cache=False)  # threads start
        first = time.perf_counter()
        while not steps or time.perf_counter() - began < limit:
            model(input_ids=tokens, use_cache=False)
            steps += 1
    return (time.perf_counter() - first) / steps
