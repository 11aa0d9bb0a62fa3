"""out = r(b + r(d * r(w))) in one pass over memory, compiled where this machine can do that.

Two torch operations pass over the live weights three times; compiled, it is one reading of base and
delta and one writing. Compiling takes some 3 to 15 seconds, so it is for models whose merge is long
enough to notice. `deltas.add_weighted_into` names all places that compute this.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from evomerge.merging.methods.deltas import add_weighted_into

log = logging.getLogger(__name__)
# number of parameters from which a search's candidates make up for the seconds of compiling
WORTH_IT = 400_000_000
Kernel = Callable[[Tensor, Tensor, Tensor, float], None]


def kernel(device: torch.device, dtype: torch.dtype, parameters: int) -> Kernel:
    """`add_weighted_into`, or its compiled form for a large model: the same bits."""
    compiled = None
    if parameters >= WORTH_IT:
        compiled = _compiled(device.type, dtype)
    return compiled or add_weighted_into


@cache
def _compiled(device: str, dtype: torch.dtype) -> Kernel | None:
    """None where this machine cannot compile, or the result would not be equal in every bit."""

    def step(out: Tensor, base: Tensor, delta: Tensor, weight: Tensor) -> None:
        out.copy_(base + delta * weight)

    # Without emulate_precision_casts the product would stay in fp32: one rounding too few.
    one_pass = torch.compile(
        step, dynamic=True, options={"emulate_precision_casts": True, "compile_threads": 1}
    )

    def run(out: Tensor, base: Tensor, delta: Tensor, weight: float) -> None:
        one_pass(
            out.view(-1),
            base.view(-1),
            delta.view(-1),
            torch.tensor(weight, dtype=base.dtype, device=base.device),
        )

    try:
        for elements in (5, 100_003):
            base, delta, out, wanted = _sample(elements, device, dtype)
            run(out, base, delta, 0.7310585786300049)
            add_weighted_into(wanted, base, delta, 0.7310585786300049)
            if not torch.equal(out, wanted):
                log.warning(
                    "the compiled merge differs from the plain one, so the plain one is used"
                )
                return None
    except Exception as error:
        # no compiler, no Triton, an unknown device: torch has a different error for each
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        log.info("the merge is not compiled: %s", reason)
        return None
    return run


def _sample(
    elements: int, device: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Base and delta of all magnitudes, and two places for results."""
    generator = torch.Generator().manual_seed(elements)
    base = torch.randn(elements, generator=generator).to(device=device, dtype=dtype)
    delta = torch.randn(elements, generator=generator).to(device=device, dtype=dtype) * 0.01
    return base, delta, torch.empty_like(base), torch.empty_like(base)
