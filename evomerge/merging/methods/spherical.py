"""The methods that mix on a sphere, several models and deltas too: nuslerp, multislerp, karcher.

Bit-equal on the CPU to mergekit 0.1.5: every step rounds to the dtype of the tensors, so that the
order of the steps decides the bits. All tensors of a call have one shape and one dtype; the result
has them too. For slerp itself see `averaging`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from evomerge.errors import RecipeError
from evomerge.merging.tensor_plan import TensorPlan

PARALLEL_SINE = 1e-8  # the sine of an angle up to which nuslerp is linear interpolation
SMALLEST_ROW = 1e-7  # a shorter row divides by this
SMALLEST_TOTAL = 1e-6  # a sum of weights below it means equal shares


def nuslerp(
    base: Tensor | None,
    models: Iterable[Tensor],
    plan: TensorPlan,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Slerp of two models, or with a base of their deltas; t is the second one's share of weight.

    Whole tensors are the vectors; without `nuslerp_flatten`, their rows are, and with
    `nuslerp_row_wise` too their columns. The formula is Shoemake's (1985, SIGGRAPH, p. 247), with
    lengths kept; the name and its parameters are mergekit's, which cites no paper.
    """
    first, second = models
    total = sum(plan.weights)
    t = 0.5
    if abs(total) >= SMALLEST_TOTAL:
        t = plan.weights[1] / total
    if base is not None:
        first, second = first - base, second - base
    if plan.parameters["nuslerp_flatten"]:
        mixed = _slerp_rows(first.reshape(-1), second.reshape(-1), t).reshape(first.shape)
    elif plan.parameters["nuslerp_row_wise"]:
        mixed = _slerp_rows(first.transpose(0, -1), second.transpose(0, -1), t).transpose(0, -1)
    else:
        mixed = _slerp_rows(first, second, t)
    mixed = mixed.reshape(first.shape)
    return mixed if base is None else base + mixed


def _slerp_rows(first: Tensor, second: Tensor, t: float) -> Tensor:
    """Each vector along the last dimension, (…, n), interpolated by its own angle."""
    units = []
    for v in (first, second):
        units.append(v / torch.norm(v, dim=-1, keepdim=True).clamp(min=SMALLEST_ROW))
    cosine = (units[0] * units[1]).sum(dim=-1, keepdim=True).clamp(-1, 1)
    straight = 1 - cosine.square() <= PARALLEL_SINE**2
    angle = torch.acos(torch.where(straight, 0, cosine))
    shares = torch.sin((1 - t) * angle), torch.sin(t * angle)
    curved = (shares[0] * first + shares[1] * second) / torch.sin(angle)
    return torch.where(straight, (1 - t) * first + t * second, curved)


def multislerp(
    base: Tensor | None,
    models: Iterable[Tensor],
    plan: TensorPlan,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Barycentric interpolation on a sphere: weights in the tangent plane at the weighted mean.

    Directions u_m = x_m / |x_m|, or of the deltas where there is a base; at p = sum_m w_m u_m over
    its length, the weighted mean of the logarithms of u_m is taken to first order, u_m - (u_m p) p,
    and mapped back by the exponential; the length is sum_m w_m |x_m|. Goddard 2025,
    goddard.blog/posts/multislerp-wow-what-a-cool-idea. Raises RecipeError where the weighted
    directions cancel out, or weights that are normalised do.
    """
    points = list(models)
    if len(points) == 1:
        return points[0]
    vectors = torch.stack(points)
    if base is not None:
        vectors -= base
    eps, rows = plan.parameters["eps"], vectors.reshape(len(points), -1)
    weights = _shares(plan, rows)
    lengths = torch.norm(rows, dim=-1, keepdim=True)
    directions = rows / (lengths + eps)
    mean = (directions * weights.view(-1, 1)).sum(0)
    size = torch.norm(mean)
    if size >= eps or size.isnan():
        flat = _exponential(mean / size, directions, weights, eps)
        mixed = flat * (lengths.squeeze(-1) * weights).sum()
    elif len(points) == 2:  # opposite directions have no shortest way: a straight line
        mixed = rows[0] * weights[0] + rows[1] * weights[1]
    else:
        raise RecipeError(
            "multislerp's weighted directions cancel out, so there is no mean on the sphere",
            where=plan.siblings[0][1],
            found=plan.weights,
            remedy="Change a weight.",
        )
    result: Tensor = mixed.view(vectors.shape[1:])
    return result if base is None else result + base


def _shares(plan: TensorPlan, like: Tensor) -> Tensor:
    """The weights in the tensors' dtype, (models,), divided by their sum if they are normalised."""
    weights = torch.tensor(plan.weights, dtype=like.dtype, device=like.device)
    if not plan.parameters["normalize_weights"]:
        return weights
    total = weights.sum()
    if total == 0:
        raise RecipeError(
            "the weights sum to 0, so they cannot be normalised",
            found=plan.weights,
            remedy="Change one of them, or set normalize_weights: false.",
        )
    return weights / total


def _exponential(mean: Tensor, directions: Tensor, weights: Tensor, eps: float) -> Tensor:
    """From `mean`, a unit (n,), along the weighted tangents to `directions`, (models, n)."""
    along = (directions * mean).sum(-1, keepdim=True)
    tangent = ((directions - along * mean) * weights.view(-1, 1)).sum(0)
    angle = torch.norm(tangent) + eps
    mapped: Tensor = mean * torch.cos(angle) + tangent * (torch.sin(angle) / angle)
    return mapped


def karcher(
    base: Tensor | None,
    models: Iterable[Tensor],
    plan: TensorPlan,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The Karcher mean of the models' directions, all alike, with the mean of their lengths.

    Iterations m <- exp_m(mean of log_m(u_i)) from the normalised mean, until the step's length is
    below `tol` or after `max_iter` of them: Karcher 1977, and for merging arXiv 2603.04972. Models
    that are all but zero have no direction.
    """
    points = list(models)
    if len(points) == 1:
        return points[0]
    tol, share = plan.parameters["tol"], 1.0 / len(points)
    lengths = [_length(point) for point in points]
    directions = []
    for point, length in zip(points, lengths, strict=True):
        if length.item() > tol:
            directions.append((point / length).to(point.dtype))
    if not directions:
        return torch.zeros_like(points[0])
    part = share / sum([share] * len(directions))
    mean = _start(directions, part, tol)
    for _ in range(int(plan.parameters["max_iter"])):
        tangent = _mean_logarithm(mean, directions, part, tol)
        angle = _length(tangent)
        if angle.item() < tol:
            break
        mean = (torch.cos(angle) * mean + torch.sin(angle) * (tangent / angle)).to(mean.dtype)
        length = _length(mean)
        if length.item() > tol:
            mean = (mean / length).to(mean.dtype)
    return sum(share * length for length in lengths) * mean


def _length(v: Tensor) -> Tensor:
    """The norm of a tensor as a vector, a single number in fp32."""
    length: Tensor = torch.linalg.vector_norm(v.float())
    return length


def _start(directions: Sequence[Tensor], part: float, tol: float) -> Tensor:
    """The normalised mean, or the first direction where all of them cancel out."""
    mean = torch.zeros_like(directions[0])
    for direction in directions:
        mean += part * direction
    length = _length(mean)
    if length.item() < tol:
        return directions[0].clone()
    return (mean / length).to(mean.dtype)


def _mean_logarithm(mean: Tensor, directions: Sequence[Tensor], part: float, tol: float) -> Tensor:
    """sum_i part * log_mean(u_i): along each great circle, by its angle."""
    tangent = torch.zeros_like(mean)
    for direction in directions:
        cosine = torch.dot(mean.flatten(), direction.flatten()).clamp(-1.0, 1.0)
        angle = torch.arccos(cosine)
        if angle.item() >= tol:
            tangent += part * (angle / torch.sin(angle)) * (direction - cosine * mean)
    return tangent
