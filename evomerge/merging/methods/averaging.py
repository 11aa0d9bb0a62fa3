"""The methods that average the models themselves: linear and spherical, in fp32, rounded once.

And passthrough, which takes a single one.

Bit-equal on the CPU to mergekit 0.1.5. All tensors of a call have one shape and one dtype; the
result has them too.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from evomerge.errors import RecipeError
from evomerge.merging.tensor_plan import TensorPlan

PARALLEL = 0.9995  # |cos| above which slerp is linear interpolation
SLERP_CHUNK = 1 << 20  # elements that slerp holds in fp32 at a time
SMALLEST = 1e-8  # a norm up to it does not divide


def linear(
    base: Tensor | None,
    models: Iterable[Tensor],
    plan: TensorPlan,
    generator: torch.Generator | None = None,
) -> Tensor:
    """out = sum_m w_m x_m, divided by sum_m w_m when `normalize`; the base is one of the models.

    Wortsman et al. 2022, arXiv 2203.05482. Raises RecipeError on weights that sum to 0.
    """
    if plan.normalize and torch.tensor(plan.weights).sum() == 0:
        raise RecipeError(
            "the weights sum to 0, so they cannot be normalised",
            found=plan.weights,
            remedy="Change one of them.",
        )
    tensors = list(models)
    rounded = torch.tensor(plan.weights, dtype=torch.float32, device=tensors[0].device)
    total = torch.zeros_like(tensors[0], dtype=torch.float32)
    for tensor, weight in zip(tensors, rounded, strict=True):
        total.addcmul_(tensor, weight)
    if plan.normalize:
        total.div_(rounded.sum())
    return total.to(tensors[0].dtype)


def slerp(
    base: Tensor | None,
    others: Iterable[Tensor],
    plan: TensorPlan,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Spherical interpolation of two tensors taken as vectors: t = 0 is the base, t = 1 the other.

    out = (sin((1 - t) a) base + sin(t a) other) / sin(a), a the angle between them: Shoemake 1985,
    SIGGRAPH, p. 247. Nearly parallel vectors are interpolated linearly.
    """
    assert base is not None
    (other,) = others
    v0, v1 = base.reshape(1, -1), other.reshape(1, -1)
    if not v0.numel():
        return base.clone()
    step = torch.tensor([[plan.parameters["t"]]], dtype=torch.float32, device=base.device)
    cosine = _cosine(v0, v1)
    straight = cosine.abs() > PARALLEL
    angle = torch.acos(torch.where(straight, 0, cosine))
    share0 = torch.where(straight, 1 - step, torch.sin((1 - step) * angle) / torch.sin(angle))
    share1 = torch.where(straight, step, torch.sin(step * angle) / torch.sin(angle))
    out = torch.empty_like(v0)
    for chunk in _chunks(v0):
        out[:, chunk] = share0 * v0[:, chunk].float() + share1 * v1[:, chunk].float()
    return out.reshape(base.shape)


def passthrough(
    base: Tensor | None,
    models: Iterable[Tensor],
    plan: TensorPlan,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The one model as it is, times its `scale`: for layers that are stacked in another order."""
    (model,) = models
    (scale,) = plan.by_sibling["scale"]
    return model if scale == 1 else model * scale


def _cosine(v0: Tensor, v1: Tensor) -> Tensor:
    """The cosine of the angle between two vectors (1, n), as (1, 1) in fp32."""
    norm0, norm1 = _norm(v0), _norm(v1)
    parts = []
    for chunk in _chunks(v0):
        products = (v0[:, chunk].float() / norm0) * (v1[:, chunk].float() / norm1)
        parts.append(products.sum(dim=1, keepdim=True))
    return torch.stack(parts).sum(dim=0).clamp(-1, 1)


def _norm(v: Tensor) -> Tensor:
    """The norm of a vector (1, n), as (1, 1) in fp32; 1 in place of 0."""
    parts = []
    for chunk in _chunks(v):
        parts.append(torch.linalg.vector_norm(v[:, chunk].float(), dim=1, keepdim=True))
    norm = torch.linalg.vector_norm(torch.stack(parts), dim=0)
    return torch.where(norm > SMALLEST, norm, 1)


def _chunks(v: Tensor) -> list[slice]:
    return [slice(start, start + SLERP_CHUNK) for start in range(0, v.shape[1], SLERP_CHUNK)]
