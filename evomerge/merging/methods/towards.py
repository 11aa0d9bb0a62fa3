"""The methods that go from the base some way towards its siblings, further where they agree.

Model stock, nearswap and Arcee fusion. Bit-equal on the CPU to mergekit 0.1.5. All tensors of a
call have one shape and one dtype.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

import torch
from torch import Tensor

from evomerge.merging.tensor_plan import TensorPlan

SMALLEST = 1e-6  # a norm, a difference or a divisor up to it does not divide
SMALLEST_CHANCE = 1e-8  # added to each of a softmax's, for the logarithm


def model_stock(
    base: Tensor | None,
    siblings: Iterable[Tensor],
    plan: TensorPlan,
    generator: torch.Generator | None = None,
) -> Tensor:
    """out = t mean + (1 - t) base, t = n c / (1 + (n - 1) c), c the mean cosine between n deltas.

    Jang et al. 2024, arXiv 2403.19522, section 4.2, eq. 5. The vectors are whole tensors, with
    `filter_wise` rows. Where the divisor vanishes, the base stays.
    """
    assert base is not None
    given = list(siblings)
    shape: tuple[int, ...] = (-1,)
    if plan.parameters["filter_wise"]:
        shape = (1, -1) if base.dim() == 1 else base.shape
    origin, points = base.reshape(shape), [sibling.reshape(shape) for sibling in given]
    deltas = [point - origin for point in points]
    cosines = [_cosine(one, other) for one, other in combinations(deltas, 2)]
    cosine = torch.stack(cosines).mean(dim=0).unsqueeze(-1)
    divisor = 1 + (len(points) - 1) * cosine
    vanishes = divisor.abs() < SMALLEST
    t = len(points) * cosine / torch.where(vanishes, 1, divisor)
    t = torch.where(vanishes, 0, t)
    mean = sum(points) / len(points)
    return (t * mean + (1 - t) * origin).reshape(base.shape)


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    """Between vectors along the last dimension, (…, n) to (…)."""
    lengths = torch.norm(one, dim=-1) * torch.norm(other, dim=-1)
    cosine: Tensor = (one * other).sum(dim=-1) / lengths.clamp(min=SMALLEST)
    return cosine.clamp(-1, 1)


def nearswap(
    base: Tensor | None,
    siblings: Iterable[Tensor],
    plan: TensorPlan,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Each element goes min(1, t / |x - b|) of the way to the sibling.

    Where they are nearer than t, it is the sibling's. Alchemonaut 2024,
    huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001.
    """
    assert base is not None
    (sibling,) = siblings
    distance = (base - sibling).abs().clamp(min=SMALLEST)
    share = (plan.parameters["t"] / distance).clamp(min=0, max=1)
    return share * sibling + (1 - share) * base


def arcee_fusion(
    base: Tensor | None,
    siblings: Iterable[Tensor],
    plan: TensorPlan,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The sibling where it matters most, else the base; in float32.

    An element matters by its difference times its row's Kullback-Leibler divergence between the two
    rows' softmaxes; what matters is at least median + 1.5 (q3 - q1), after Tukey's fences. Of large
    tensors the quartiles are a sample's. Arcee, arcee.ai: mergekit has it, and there is no paper.
    """
    assert base is not None
    (sibling,) = siblings
    importance = (sibling - base).abs() * _divergence(sibling, base)
    numbers = importance.reshape(-1)
    if numbers.numel() > plan.samples:
        assert generator is not None
        drawn = torch.randint(numbers.numel(), (plan.samples,), generator=generator)
        numbers = numbers[drawn.to(numbers.device)]
    ordered = torch.sort(numbers).values
    quarters = torch.tensor([0.25, 0.5, 0.75], device=ordered.device)
    q1, median, q3 = ordered[(quarters * (ordered.numel() - 1)).long()]
    chosen = importance >= median + 1.5 * (q3 - q1)
    merged: Tensor = base + (sibling - base) * chosen.float()
    return merged


def _divergence(sibling: Tensor, base: Tensor) -> Tensor:
    """KL(softmax(sibling), softmax(base)) of each vector along the last dimension, (…, 1)."""
    p = torch.softmax(sibling, dim=-1) + SMALLEST_CHANCE
    q = torch.softmax(base, dim=-1) + SMALLEST_CHANCE
    divergence: Tensor = torch.sum(p * torch.log(p / q), dim=-1, keepdim=True)
    return divergence
