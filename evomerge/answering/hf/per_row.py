"""Layers whose rows belong to different candidates: a merge weight per row.

Every layer of the candidates is linear in its weights, base + sum_m w_m delta_m. So with a weight
per row, w (rows,), a linear layer gives each row its own candidate's output:

    y = x B^T + sum_m (w_m * x) D_m^T        the same as [x, w * x] [B, D]^T

and base and deltas are read once for all candidates. Where one call brings many tokens of each
candidate, as prompts do, its weights are merged for that call, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evomerge.merging.live import LiveModel
from evomerge.merging.methods.deltas import add_weighted
from evomerge.merging.placement import Inputs
from evomerge.merging.stream import MergePlan

# tokens of one candidate from which merging its weights once is cheaper than more products
GROUPED = 256
Forward = Callable[..., Tensor]


class RowWeights:
    """The merge weights of the batch's rows, by tensor and sibling."""

    def __init__(self, plans: Sequence[MergePlan], live: LiveModel) -> None:
        """Tensors with equal weights, such as a slice's, share a table (siblings, candidates)."""
        self._of: dict[str, int] = {}  # tensor -> its table
        self._tables: list[Tensor] = []
        self._rows: list[Tensor] = []  # the tables by row, (siblings, rows)
        self.groups: list[Tensor] = []  # the rows of each candidate that has any
        self._last: tuple[Tensor | None, Tensor | None, list[Tensor]] = (None, None, [])
        known: dict[object, int] = {}
        for name in live.names:
            parameter = live.resident.parameters[name]
            columns = [_sibling_weights(plan, name, live) for plan in plans]
            key = (tuple(columns), parameter.device, parameter.dtype)
            if key not in known:
                known[key] = len(self._tables)
                table = torch.tensor(columns, dtype=parameter.dtype, device=parameter.device)
                table = table.view(len(plans), len(live.siblings))
                self._tables.append(table.t().contiguous())
            self._of[name] = known[key]

    def select(self, candidates: Sequence[int]) -> None:
        """Assign row i to candidates[i] from now on."""
        index = torch.tensor(candidates)
        self.groups = [torch.nonzero(index == c)[:, 0] for c in dict.fromkeys(candidates)]
        self._rows = [table[:, index.to(table.device)] for table in self._tables]

    def of(self, name: str) -> Tensor:
        """A tensor's weights, (siblings, rows)."""
        return self._rows[self._of[name]]

    def times(self, x: Tensor, name: str) -> list[Tensor]:
        """w_m * x for each sibling; kept, since the next layer often needs the same."""
        rows = self.of(name)
        if x is not self._last[0] or rows is not self._last[1]:
            products = [x * weight.view(-1, *[1] * (x.dim() - 1)) for weight in rows]
            self._last = x, rows, products
        return self._last[2]


def _sibling_weights(plan: MergePlan, name: str, live: LiveModel) -> tuple[float, ...]:
    """The weight that a candidate gives to each sibling's delta of one tensor."""
    how = plan.tensors[name]
    weights = [0.0] * len(live.siblings)
    for (ref, _), weight in zip(how.siblings, how.weights, strict=True):
        for m, sibling in enumerate(live.siblings):
            if sibling is plan.models[ref]:
                weights[m] = weight
    return tuple(weights)


class PerRow:
    """A parameter that differs by row: base + sum_m w_m delta_m."""

    def __init__(self, inputs: Inputs, weights: RowWeights, name: str) -> None:
        self.base, self.deltas = inputs.base, list(inputs.others)
        self.weights, self.name = weights, name

    def merged(self, dims: int, take: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        """The merged bits of every row, (rows, 1…, n), of a small parameter or of what is taken."""
        weights = self.weights.of(self.name)
        weights = weights.view(*weights.shape, *[1] * (dims - 1))  # (siblings, rows, 1…)
        parts = [take(delta) * weight for delta, weight in zip(self.deltas, weights, strict=True)]
        total: Tensor = parts[0]
        if len(parts) > 1:
            total = torch.stack(parts).sum(dim=0)  # as add_weighted rounds
        return total.add_(take(self.base))

    def of_candidates(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows, merged tensor) of one candidate after another, with the live model's bits."""
        for rows in self.weights.groups:
            weights = self.weights.of(self.name)[:, rows[0]].tolist()
            yield rows.to(self.base.device), add_weighted(self.base, self.deltas, weights)


def forward_maker(
    module: nn.Module,
) -> Callable[[nn.Module, Mapping[str, PerRow]], Forward] | None:
    """What makes the module's forward by row; None for an unknown kind of module."""
    if type(module) is nn.Linear:
        return _linear_forward
    if type(module) is nn.Embedding and module.max_norm is None:
        return _embedding_forward
    known = type(module).__name__.endswith("RMSNorm") and not isinstance(module, nn.RMSNorm)
    if known and own_parameters(module).keys() == {"weight"}:
        return _norm_forward
    return None


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's parameters without those of its submodules."""
    return {key: p for key, p in module._parameters.items() if p is not None}


def _linear_forward(module: nn.Module, tensors: Mapping[str, PerRow]) -> Forward:
    weight, bias = tensors["weight"], tensors.get("bias")
    turned = [delta.T for delta in weight.deltas]

    def forward(x: Tensor) -> Tensor:
        """x (rows, columns, in) -> (rows, columns, out)."""
        if x.numel() >= GROUPED * x.shape[-1] * len(weight.weights.groups):
            y = x.new_empty(*x.shape[:-1], weight.base.shape[0])
            for rows, merged in weight.of_candidates():
                y[rows] = F.linear(x[rows], merged)
        else:
            y = F.linear(x, weight.base)
            flat = y.view(-1, y.shape[-1])
            for scaled, delta in zip(weight.weights.times(x, weight.name), turned, strict=True):
                flat.addmm_(scaled.view(-1, x.shape[-1]), delta)
        return y if bias is None else y.add_(bias.merged(x.dim()))

    return forward


def _embedding_forward(module: nn.Module, tensors: Mapping[str, PerRow]) -> Forward:
    weight = tensors["weight"]

    def forward(ids: Tensor) -> Tensor:
        """ids (rows, columns) -> (rows, columns, n)."""
        return weight.merged(ids.dim() + 1, lambda table: F.embedding(ids, table))

    return forward


def _norm_forward(module: nn.Module, tensors: Mapping[str, PerRow]) -> Forward:
    weight, own, original = tensors["weight"], module._parameters, module.forward

    def forward(x: Tensor) -> Tensor:
        """The module's own computation; its weight (rows, 1…, n) broadcasts over x (rows, …, n)."""
        kept = own["weight"]
        try:
            own["weight"] = weight.merged(x.dim())  # type: ignore[assignment]
            result: Tensor = original(x)
            return result
        finally:
            own["weight"] = kept

    return forward
