"""Where base and siblings wait between candidates: on the device, in host memory, or on disk; and
how they come from there.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from evomerge.errors import EngineError
from evomerge.merging.checkpoints.model_folder import ModelFolder
from evomerge.merging.layout import LAYER
from evomerge.merging.stream import load_finite

log = logging.getLogger(__name__)
Residency = Literal["device", "host", "disk"]
# the next one is where a tensor goes that does not fit
ORDER: tuple[Residency, ...] = ("device", "host", "disk")
SHARE = 0.6  # of the free memory that models may take; the rest is for keys and values
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Inputs:
    """One tensor of every model, on the device that merges it, all in one dtype. `others` are
    deltas or the siblings' weights.
    """

    base: Tensor
    others: Sequence[Tensor]
    # the base with 0 for -0, which `methods.combine_into` needs; mostly the same tensor
    positive: Tensor


@dataclass(frozen=True)
class Slot:
    """What is known of a live parameter before anything is read."""

    device: torch.device
    dtype: torch.dtype
    numbers: int


class Resident:
    """Base and siblings of a live model. `fetch` gives their tensors where the parameter is,
    whatever they wait in.
    """

    def __init__(
        self,
        base: ModelFolder,
        siblings: Sequence[ModelFolder],
        slots: Mapping[str, Slot],
        residency: Literal["auto"] | Residency = "auto",
    ) -> None:
        """`residency` auto fills the device, then the host, each up to SHARE of its free memory;
        the rest is read from disk.
        """
        self.base, self.siblings, self.slots = base, list(siblings), slots
        self.places: dict[str, Residency] = (
            self._choose() if residency == "auto" else dict.fromkeys(slots, residency)
        )
        self.deltas: bool | None = None  # whether the kept `others` are deltas
        self._kept: dict[str, Inputs] = {}
        self._host: dict[str, list[Tensor]] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        log.info("base and siblings: %s", self.describe())

    def describe(self) -> str:
        """How many bytes wait where, in words for the log."""
        sizes = Counter[str]()
        for name, place in self.places.items():
            sizes[place] += self._size(name)
        return ", ".join(
            f"{place} {sizes[place] / 1e9:.2f} GB" for place in ORDER if place in sizes
        )

    def stream(self, names: Sequence[str], deltas: bool) -> Iterator[tuple[str, Inputs]]:
        """(name, inputs) for each name; while a layer is merged, the next one is read and copied by
        another thread.
        """
        if deltas != self.deltas:  # another kind of method
            self._kept.clear()
            self.deltas = deltas
        groups = _by_layer(names)
        if all(name in self._kept for name in names):
            yield from [(name, self._kept[name]) for name in names]
            return
        with ThreadPoolExecutor(1, "evomerge-read") as pool:
            coming = pool.submit(self._fetch_layer, groups[0])
            for i in range(len(groups)):
                inputs, ready = coming.result()
                if i + 1 < len(groups):
                    coming = pool.submit(self._fetch_layer, groups[i + 1])
                for device, event in ready.items():
                    torch.cuda.current_stream(device).wait_event(event)
                for name in groups[i]:
                    item = inputs.pop(name)
                    for tensor in (item.base, item.positive, *item.others):
                        if tensor.is_cuda:  # its memory may be taken again only after this merge
                            tensor.record_stream(torch.cuda.current_stream(tensor.device))
                    yield name, item

    def retreat(self) -> None:
        """Out of memory: what waits on a device goes to the host, or else what waits in memory to
        the disk.

        Raises EngineError when all of it is on disk already.
        """
        full = next((place for place in ORDER[:2] if place in self.places.values()), None)
        if full is None:
            raise EngineError(
                "out of memory while merging, though nothing but the live model is kept",
                remedy="Use a larger device, or engine.quantization.",
            )
        for name, place in self.places.items():
            if place == full:  # a CPU's device memory is the host's
                self.places[name] = (
                    "host"
                    if place == "device" and self.slots[name].device.type != "cpu"
                    else "disk"
                )
                self._kept.pop(name, None)
                self._host.pop(name, None)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.warning("out of memory: base and siblings now wait here: %s", self.describe())

    def _fetch_layer(
        self, names: Sequence[str]
    ) -> tuple[dict[str, Inputs], dict[torch.device, torch.cuda.Event]]:
        """The inputs of one layer, and what to wait for before they are used on each device."""
        fetched: dict[str, Inputs] = {}
        events: dict[torch.device, torch.cuda.Event] = {}
        for name in names:
            device = self.slots[name].device
            if device.type != "cuda":
                fetched[name] = self._fetch(name)
                continue
            stream = self._streams.setdefault(device, torch.cuda.Stream(device))
            with torch.cuda.stream(stream):
                fetched[name] = self._fetch(name)
                events[device] = stream.record_event()
        return fetched, events

    def _fetch(self, name: str) -> Inputs:
        kept = self._kept.get(name)
        if kept is not None:
            return kept
        slot, place = self.slots[name], self.places[name]
        if place == "host":
            base, *others = (
                tensor.to(slot.device, non_blocking=True) for tensor in self._on_host(name)
            )
        else:
            base, *others = (
                load_finite(folder, name, slot.dtype, slot.device)
                for folder in (self.base, *self.siblings)
            )
        if self.deltas:
            others = [other.sub(base) for other in others]
        if place != "device":
            # without asking whether there is a -0, which would wait for the copy
            return Inputs(base, others, base + 0.0)
        if slot.device.type == "cpu":  # what is mapped may change on disk
            base, others = (
                base.clone(),
                others if self.deltas else [other.clone() for other in others],
            )
        self._kept[name] = Inputs(
            base, others, base + 0.0 if bool(((base == 0) & base.signbit()).any()) else base
        )
        return self._kept[name]

    def _on_host(self, name: str) -> list[Tensor]:
        """The tensors in host memory, pinned where there is a GPU to copy to; read once."""
        if name not in self._host:
            slot = self.slots[name]
            tensors = [
                load_finite(folder, name, slot.dtype).clone()
                for folder in (self.base, *self.siblings)
            ]
            try:
                self._host[name] = [
                    tensor.pin_memory() if slot.device.type == "cuda" else tensor
                    for tensor in tensors
                ]
            except RuntimeError:
                # the host will not pin more: copies from here are slower, and right
                self._host[name] = tensors
        return self._host[name]

    def _size(self, name: str) -> int:
        slot = self.slots[name]
        return slot.numbers * slot.dtype.itemsize * (1 + len(self.siblings))

    def _choose(self) -> dict[str, Residency]:
        """Device, then host, then disk, in the order of the layers."""
        room = {
            device: SHARE * free_bytes(device)
            for device in {slot.device for slot in self.slots.values()}
        }
        host = torch.device("cpu")
        room.setdefault(host, SHARE * free_bytes(host))
        places: dict[str, Residency] = {}
        for name, slot in self.slots.items():
            where = next((d for d in (slot.device, host) if room[d] >= self._size(name)), None)
            if where is not None:
                room[where] -= self._size(name)
            places[name] = "disk" if where is None else "device" if where == slot.device else "host"
        return places


def is_out_of_memory(error: BaseException) -> bool:
    """A device's error, Python's own, or the one line of torch's allocator for the CPU."""
    return isinstance(
        error, torch.OutOfMemoryError | MemoryError
    ) or "can't allocate memory" in str(error)


def free_bytes(device: torch.device) -> float:
    """Memory that can be taken now; on the CPU what the kernel calls available, which counts files
    it can drop.
    """
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return float("inf")
    free = float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if MEMINFO.is_file():
        lines = dict(
            line.split(":", 1) for line in MEMINFO.read_text(encoding="ascii").splitlines()
        )
        free = float(lines["MemAvailable"].split()[0]) * 1024
    limit, used = (CGROUP / "memory.max", CGROUP / "memory.current")
    # a container's own limit
    if limit.is_file() and (text := limit.read_text(encoding="ascii").strip()) != "max":
        free = min(free, float(text) - float(used.read_text(encoding="ascii")))
    return free


def _by_layer(names: Sequence[str]) -> list[list[str]]:
    """Names in groups that are read and merged together: one layer, or one tensor outside the
    layers.
    """
    groups: dict[object, list[str]] = {}
    for name in names:
        match = LAYER.match(name)
        groups.setdefault(int(match[2]) if match else name, []).append(name)
    return list(groups.values())
