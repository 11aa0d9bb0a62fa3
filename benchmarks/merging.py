"""How fast a candidate is merged in place, as ratios within one run. The last line is one JSON object.

live_vs_copy: bytes per second of `combine_into` (reads base and delta, writes live) over those of Tensor.copy_.
live_vs_naive: its speed over `live.copy_(base + weight * delta)`. bf16, CPU, 440 M parameters in 20 tensors.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import torch

from evomerge.merging.methods import combine_into

TENSORS, NUMEL, ROUNDS = 20, 22_000_000, 5


def seconds(work: Callable[[], object]) -> float:
    """Median of a few rounds after a warm-up."""
    times = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    base, delta, live = ([torch.randn(NUMEL, generator=generator).bfloat16() for _ in range(TENSORS)] for _ in range(3))

    def in_place() -> None:
        for out, b, d in zip(live, base, delta, strict=True):
            combine_into(out, b, d, 0.7)

    def copy() -> None:
        for out, b in zip(live, base, strict=True):
            out.copy_(b)

    def naive() -> None:
        for out, b, d in zip(live, base, delta, strict=True):
            out.copy_(b + 0.7 * d)

    ours, plain, slow = seconds(in_place), seconds(copy), seconds(naive)
    print(f"{TENSORS * NUMEL / 1e6:.0f} M parameters: in place {ours:.3f} s, copy {plain:.3f} s, with temporaries {slow:.3f} s")
    print(json.dumps({"live_vs_copy": round((3 / ours) / (2 / plain), 3), "live_vs_naive": round(slow / ours, 2)}))


if __name__ == "__main__":
    main()
