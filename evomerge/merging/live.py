"""A live model whose weights are replaced in place, each candidate computed from the untouched base.

Adding a difference of weights to what is live would drift; see docs/LOG.md.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import torch

from evomerge.errors import ModelError
from evomerge.merging.layout import Layout, ModelFolder, num_layers
from evomerge.merging.methods import combine, combine_into
from evomerge.merging.stream import load_finite, merge_tensor, tensor_names
from evomerge.recipe import Recipe

log = logging.getLogger(__name__)
SHARE = 0.6  # of the free memory that base and deltas may take; the rest is for keys and values


class LiveModel:
    """`apply` writes a recipe's weights into the parameters of `model`, each on its own device.

    Base and deltas stay beside the live parameters when they fit (`resident`); otherwise every candidate streams
    them from the mapped files.
    """

    def __init__(self, model: torch.nn.Module, base: ModelFolder, siblings: Sequence[ModelFolder]) -> None:
        """Raises ModelError when the live model lacks a tensor of the files, or a tensor is not finite."""
        self.base = base
        self.siblings = list(siblings)
        self.live = dict(model.named_parameters())
        self.names = tensor_names(base)
        for name in self.names:
            if name not in self.live:
                raise ModelError(
                    f"the live model has no parameter {name}", where=base.path, remedy="This architecture cannot be merged in place."
                )
        self.resident = self._fits()
        log.info("base and deltas: %s", "beside the live model" if self.resident else "streamed from disk for every candidate")
        self._kept: dict[str, tuple[torch.Tensor, list[torch.Tensor]]] = {}
        self._applied: dict[str, object] = {}  # what each parameter holds now: weights, normalize, lambda

    @torch.no_grad()
    def apply(self, recipe: Recipe) -> None:
        """Give every parameter the recipe's weights, in place; parameters whose weights did not change are skipped."""
        folders = dict(zip((recipe.base_model, *recipe.siblings), (self.base, *self._in_order(recipe)), strict=True))
        layout = Layout(recipe, num_layers(self.base.config))
        for name in self.names:
            out = self.live[name]
            pairs = layout.weights(name)
            settings = (
                bool(layout.parameter("normalize", name, default=False)),
                float(layout.parameter("lambda", name, default=1.0)),
            )
            state = (tuple((str(folders[ref].path), w) for ref, w in pairs), settings, recipe.dtype, recipe.out_dtype)
            if self._applied.get(name) == state:
                continue
            self._applied.pop(name, None)  # an interrupted write must not count as done
            own_dtype = recipe.dtype is None or getattr(torch, recipe.dtype) == out.dtype
            if self.resident and own_dtype:
                base, deltas = self._base_and_deltas(name, out)
                order = [self.siblings.index(folders[ref]) for ref, _ in pairs]
                weights = [w for _, w in pairs]
                if len(order) == 1 and settings == (False, 1.0):
                    combine_into(out, base, deltas[order[0]], weights[0])
                else:
                    out.copy_(combine(base, [deltas[i] for i in order], weights, *settings))
            else:
                out.copy_(merge_tensor(layout, folders, name, out.device))
            self._applied[name] = state

    def _in_order(self, recipe: Recipe) -> list[ModelFolder]:
        """The folders of a recipe's siblings."""
        by_path = {os.path.realpath(folder.path): folder for folder in self.siblings}
        found = []
        for i, ref in enumerate(recipe.siblings):
            folder = by_path.get(os.path.realpath(ref)) or (self.siblings[i] if len(recipe.siblings) == len(self.siblings) else None)
            if folder is None:
                raise ModelError("the recipe names a model that is not loaded", where=ref, remedy="Load it as a sibling.")
            found.append(folder)
        return found

    def _base_and_deltas(self, name: str, out: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The base and each sibling's delta r(x - b), in the parameter's dtype and on its device; computed once."""
        if name not in self._kept:
            base = load_finite(self.base, name, out.dtype, out.device)
            deltas = [load_finite(folder, name, out.dtype, out.device).sub(base) for folder in self.siblings]
            self._kept[name] = (base, deltas)
        return self._kept[name]

    def _fits(self) -> bool:
        needed: dict[torch.device, int] = {}
        for name in self.names:
            p = self.live[name]
            needed[p.device] = needed.get(p.device, 0) + p.numel() * p.element_size() * (1 + len(self.siblings))
        return all(size <= SHARE * _free_bytes(device) for device, size in needed.items())


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    if device.type == "cpu":
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return float("inf")
