"""A live model whose weights are replaced in place, each candidate computed from the untouched base.

Adding a difference of weights to what is live would drift; see docs/LOG.md.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from evomerge.errors import ModelError, RecipeError
from evomerge.merging.folder import ModelFolder
from evomerge.merging.methods import combine, combine_into
from evomerge.merging.stream import MergePlan, load_finite
from evomerge.recipe import Recipe

log = logging.getLogger(__name__)
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
SHARE = 0.6  # of the free memory that base and deltas may take; the rest is for keys and values


@dataclass(frozen=True)
class _Kept:
    """What stays beside one live parameter, in its dtype and on its device."""

    base: torch.Tensor
    positive: torch.Tensor  # the base with 0 for -0, which `combine_into` needs; mostly the same tensor
    deltas: list[torch.Tensor]  # r(x - b), one per sibling


class LiveModel:
    """`apply` writes a recipe's weights into the parameters of `model`, each on its own device.

    Base and deltas stay beside the live parameters when they fit (`resident`); otherwise every candidate streams
    them from the mapped files.
    """

    def __init__(self, model: torch.nn.Module, base: ModelFolder, siblings: Sequence[ModelFolder], random_seed: int = 0) -> None:
        """Raises ModelError when the live model lacks a tensor of the files, or a tensor is not finite."""
        self.base = base
        self.siblings = list(siblings)
        self.live = dict(model.named_parameters())
        self.random_seed = random_seed
        self._draws: dict[int, torch.Tensor] = {}
        tied = bool(base.config.get("tie_word_embeddings"))
        self.names = sorted(name for name in base.keys if not (tied and name == "lm_head.weight"))
        for name in self.names:
            if name not in self.live:
                raise ModelError(
                    f"the live model has no parameter {name}", where=base.path, remedy="This architecture cannot be merged in place."
                )
        for name in self.live.keys() - set(self.names):  # it would keep what the model was loaded with
            raise ModelError(f"the file has no tensor for {name}", where=base.path, remedy="Save the model again with transformers.")
        self.resident = self._fits()
        log.info("base and deltas: %s", "beside the live model" if self.resident else "streamed from disk for every candidate")
        self._kept: dict[str, _Kept] = {}
        self._applied: dict[str, object] = {}  # what each parameter holds now: weights, normalize, lambda

    @torch.no_grad()
    def apply(self, recipe: Recipe) -> None:
        """Give every parameter the recipe's weights, in place; parameters whose weights did not change are skipped."""
        folders = {ref: _find(ref, [self.base, *self.siblings]) for ref in recipe.models}
        plan = MergePlan(recipe, folders, self.random_seed, self._draws)
        if plan.layout.restacked:
            raise RecipeError("the slices move layers, which a live model cannot follow", remedy="Build the model with `evomerge merge`.")
        for name in self.names:
            out, how = self.live[name], plan.hows[name]
            state = (how, tuple(str(folders[ref].path) for ref, _ in how.inputs), recipe.dtype, recipe.out_dtype)
            if self._applied.get(name) == state:
                continue
            self._applied.pop(name, None)  # an interrupted write must not count as done
            one_dtype = {plan.working_dtype(name), plan.dtype(name)} == {out.dtype}
            if self.resident and one_dtype and how.method == "task_arithmetic":
                kept = self._base_and_deltas(name, out)
                deltas = [kept.deltas[self.siblings.index(folders[ref])] for ref, _ in how.siblings]
                if len(deltas) == 1 and not how.normalize and how.scale == 1:
                    combine_into(out, kept.positive, deltas[0], how.weights[0])
                else:
                    out.copy_(combine(kept.base, deltas, how.weights, how.normalize, how.scale))
            else:
                out.copy_(plan.merge(name, out.device))
            self._applied[name] = state

    def _base_and_deltas(self, name: str, out: torch.Tensor) -> _Kept:
        """Read once, at the first candidate."""
        if name not in self._kept:
            base = load_finite(self.base, name, out.dtype, out.device)
            deltas = [load_finite(folder, name, out.dtype, out.device).sub(base) for folder in self.siblings]
            negative_zeros = bool(((base == 0) & base.signbit()).any())
            self._kept[name] = _Kept(base, base + 0.0 if negative_zeros else base, deltas)
        return self._kept[name]

    def _fits(self) -> bool:
        needed: dict[torch.device, int] = {}
        for name in self.names:
            p = self.live[name]
            needed[p.device] = needed.get(p.device, 0) + p.numel() * p.element_size() * (1 + len(self.siblings))
        return all(size <= SHARE * _free_bytes(device) for device, size in needed.items())


def _find(ref: str, folders: Sequence[ModelFolder]) -> ModelFolder:
    """The folder that a recipe's reference means. Raises ModelError."""
    found = next((f for f in folders if f.ref == ref or os.path.realpath(f.path) == os.path.realpath(ref)), None)
    if found is None:
        raise ModelError("the recipe names a model that is not loaded", where=ref, remedy="Load it as the base or a sibling.")
    return found


def _free_bytes(device: torch.device) -> float:
    """Memory that can be taken now; on the CPU what the kernel calls available, which counts files it can drop."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return float("inf")
    free = float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if MEMINFO.is_file():
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text(encoding="ascii").splitlines())
        free = float(lines["MemAvailable"].split()[0]) * 1024
    limit, used = (CGROUP / "memory.max", CGROUP / "memory.current")
    if limit.is_file() and (text := limit.read_text(encoding="ascii").strip()) != "max":  # a container's own limit
        free = min(free, float(text) - float(used.read_text(encoding="ascii")))
    return free
