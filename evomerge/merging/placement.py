"""Where base and siblings are kept between candidates: device, host memory or disk."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from evomerge.errors import EngineError
from evomerge.merging.architecture.roles import NUMBER
from evomerge.merging.device_memory import free_bytes
from evomerge.merging.memory_plan import SHARE, room_for_models
from evomerge.merging.tensor_merge import TensorSource, load_finite

log = logging.getLogger(__name__)
Residency = Literal["device", "host", "disk"]
# a tensor that does not fit goes to the next one
ORDER: tuple[Residency, ...] = ("device", "host", "disk")


@dataclass(frozen=True)
class Inputs:
    """One tensor of every model, on the device that merges it, all in one dtype."""

    base: Tensor
    others: Sequence[Tensor]  # deltas, or the siblings' weights
    # the base with 0 for -0, which `add_weighted_into` needs; mostly the same tensor
    base_no_neg_zero: Tensor


@dataclass(frozen=True)
class LiveParameter:
    """What is known of a live parameter before anything is read."""

    device: torch.device
    dtype: torch.dtype
    elements: int


class Resident:
    """Base and siblings of a live model; `stream` brings their tensors to the parameters."""

    def __init__(
        self,
        base: TensorSource,
        siblings: Sequence[TensorSource],
        parameters: Mapping[str, LiveParameter],
        residency: Literal["auto"] | Residency = "auto",
        cache: float = 0.0,
    ) -> None:
        """`residency` auto fills the device, then the host; the rest is read from disk.

        Each is filled up to SHARE of its free memory, and a GPU only as far as bytes of keys and
        values, `cache`, and activations have room beside that.
        """
        self.base, self.siblings, self.parameters = base, list(siblings), parameters
        self.places: dict[str, Residency]
        if residency == "auto":
            self.places = self._choose(cache)
        else:
            self.places = dict.fromkeys(parameters, residency)
        self.deltas: bool | None = None  # whether the kept `others` are deltas
        self._kept: dict[str, Inputs] = {}
        self._host: dict[str, list[Tensor]] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        log.info("base and siblings: %s", self.describe())

    def describe(self) -> str:
        """How many bytes are kept where, in words for the log."""
        sizes = Counter[str]()
        for name, place in self.places.items():
            sizes[place] += self._size(name)
        said = []
        for place in ORDER:
            if place in sizes:
                said.append(f"{place} {sizes[place] / 1e9:.2f} GB")
        return ", ".join(said)

    def stream(self, names: Sequence[str], deltas: bool) -> Iterator[tuple[str, Inputs]]:
        """(name, inputs) for each name.

        While a layer is merged, another thread reads and copies the next one.
        """
        if deltas != self.deltas:  # another kind of method
            self._kept.clear()
            self.deltas = deltas
        groups = _by_layer(names)
        if all(name in self._kept for name in names):
            for name in names:
                yield name, self._kept[name]
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
                    for tensor in (item.base, item.base_no_neg_zero, *item.others):
                        if tensor.is_cuda:  # its memory may be taken again only after this merge
                            tensor.record_stream(torch.cuda.current_stream(tensor.device))
                    yield name, item

    def retreat(self) -> None:
        """Free memory after it ran out: move what is on a device to the host, else to the disk.

        Raises EngineError when all of it is on disk already.
        """
        kept = set(self.places.values()) - {"disk"}
        if not kept:
            raise EngineError(
                "out of memory while merging, although only the live model is kept in memory",
                remedy="Use a larger device, or engine.quantization.",
            )
        full = "device" if "device" in kept else "host"
        for name, place in self.places.items():
            if place != full:
                continue
            # a CPU's device memory is the host's
            has_host = full == "device" and self.parameters[name].device.type != "cpu"
            self.places[name] = "host" if has_host else "disk"
            self._kept.pop(name, None)
            self._host.pop(name, None)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.warning("out of memory: base and siblings are now kept here: %s", self.describe())

    def _fetch_layer(
        self, names: Sequence[str]
    ) -> tuple[dict[str, Inputs], dict[torch.device, torch.cuda.Event]]:
        """The inputs of one layer, and what to wait for before they are used on each device."""
        fetched: dict[str, Inputs] = {}
        events: dict[torch.device, torch.cuda.Event] = {}
        for name in names:
            device = self.parameters[name].device
            if device.type != "cuda":
                fetched[name] = self._fetch(name)
                continue
            if device not in self._streams:
                self._streams[device] = _new_stream(device)
            stream = self._streams[device]
            with torch.cuda.stream(stream):
                fetched[name] = self._fetch(name)
                events[device] = stream.record_event()
        return fetched, events

    def _fetch(self, name: str) -> Inputs:
        kept = self._kept.get(name)
        if kept is not None:
            return kept
        place, device = self.places[name], self.parameters[name].device
        if place == "host":
            tensors = [tensor.to(device, non_blocking=True) for tensor in self._on_host(name)]
        else:
            tensors = self._read(name, device)
        base, *others = tensors
        if self.deltas:
            others = [other.sub(base) for other in others]
        if place != "device":
            # without checking for a -0, which would wait for the copy
            return Inputs(base, others, base + 0.0)
        if device.type == "cpu":  # what is mapped may change on disk
            base = base.clone()
            if not self.deltas:
                others = [other.clone() for other in others]
        has_negative_zero = bool(((base == 0) & base.signbit()).any())
        self._kept[name] = Inputs(base, others, base + 0.0 if has_negative_zero else base)
        return self._kept[name]

    def _read(self, name: str, device: torch.device) -> list[Tensor]:
        """One tensor of the base and every sibling."""
        dtype = self.parameters[name].dtype
        models = (self.base, *self.siblings)
        return [load_finite(model, name, dtype, device) for model in models]

    def _on_host(self, name: str) -> list[Tensor]:
        """The tensors in host memory, pinned where there is a GPU to copy to; read once."""
        if name not in self._host:
            tensors = [tensor.clone() for tensor in self._read(name, torch.device("cpu"))]
            self._host[name] = tensors
            if self.parameters[name].device.type == "cuda":
                # if the host cannot pin more memory, copies from it are slower, but correct
                with suppress(RuntimeError):
                    self._host[name] = [tensor.pin_memory() for tensor in tensors]
        return self._host[name]

    def _size(self, name: str) -> int:
        parameter = self.parameters[name]
        return parameter.elements * parameter.dtype.itemsize * (1 + len(self.siblings))

    def _choose(self, cache: float) -> dict[str, Residency]:
        """Device, then host, then disk, in the order of the layers."""
        host = torch.device("cpu")
        devices = {host, *(parameter.device for parameter in self.parameters.values())}
        used = len(devices) - 1  # of a model on several GPUs, each has a part of the cache
        room = {}
        for device in devices:
            free = free_bytes(device)
            room[device] = SHARE * free
            if device.type != "cpu":
                room[device] = room_for_models(free, cache / used)
        places: dict[str, Residency] = {}
        for name, parameter in self.parameters.items():
            size = self._size(name)
            if room[parameter.device] >= size:
                places[name] = "device"
                room[parameter.device] -= size
            elif room[host] >= size:
                places[name] = "host"
                room[host] -= size
            else:
                places[name] = "disk"
        return places


def _new_stream(device: torch.device) -> torch.cuda.Stream:
    make: Any = torch.cuda.Stream  # torch leaves its constructor untyped
    stream: torch.cuda.Stream = make(device)
    return stream


def _by_layer(names: Sequence[str]) -> list[list[str]]:
    """Names in groups that are read and merged together: a layer, or a tensor outside of them."""
    groups: dict[object, list[str]] = {}
    for name in names:
        match = NUMBER.search(name)
        groups.setdefault(name[: match.end()] if match else name, []).append(name)
    return list(groups.values())
