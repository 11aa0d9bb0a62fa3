"""Merged tensors as safetensors files: merged and written a piece at a time, by several threads,
each piece in its place.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from evomerge.merging.stream import CHUNK, MergePlan, Pieces

THREADS = 8  # at most: more only share the memory's bandwidth, and each has a buffer
FORMAT_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written: known before it is merged, so that a file's header can come
    first.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


Shards = Sequence[Sequence[Planned]]


def plan_shards(plan: MergePlan, limit: int) -> list[list[Planned]]:
    """The files' tensors, sorted by name; a new file begins when the next tensor would make the
    last one larger than `limit` bytes.

    A file holds at least one tensor, however large.
    """
    shards: list[list[Planned]] = [[]]
    size = 0
    for name in plan.names:
        item = Planned(name, plan.dtype(name), plan.shape(name))
        if shards[-1] and size + item.size > limit:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.size
    return shards


def total_size(shards: Shards) -> int:
    """Bytes of all tensors."""
    return sum(item.size for shard in shards for item in shard)


def write_shards(
    folder: Path, plan: MergePlan, shards: Shards, progress: Progress | None = None
) -> None:
    """Write the files, and an index where there are several. Raises OSError, and ModelError as the
    merge does.

    `progress` gets (bytes written, bytes in all), from one thread at a time.
    """
    weight_map: dict[str, str] = {}
    count = Counter(total_size(shards), progress)
    # the next file is merged while the last one goes to the disk
    with ThreadPoolExecutor(1) as syncing:
        last = None
        for i, shard in enumerate(shards):
            name = (
                "model.safetensors"
                if len(shards) == 1
                else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            )
            with (folder / name).open("wb", buffering=0) as file:
                _write_shard(file.fileno(), plan, shard, count)
            weight_map |= dict.fromkeys((item.name for item in shard), name)
            if last is not None:
                last.result()
            last = syncing.submit(_sync, folder / name)
        if last is not None:
            last.result()
    if len(shards) > 1:
        index = {"metadata": {"total_size": count.total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2), encoding="utf-8"
        )


class Counter:
    """Bytes written, told to whoever wants to know."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self._progress = total, progress
        self._done, self._lock = 0, threading.Lock()

    def add(self, size: int) -> None:
        with self._lock:
            self._done += size
            if self._progress is not None:
                self._progress(self._done, self.total)


@dataclass(frozen=True)
class Job:
    """Numbers start to start + n of a tensor, to be written at byte `at` of the file."""

    pieces: Pieces
    start: int
    n: int
    dtype: torch.dtype
    at: int


def _write_shard(file: int, plan: MergePlan, shard: Sequence[Planned], count: Counter) -> None:
    """Fill an open file. Methods that need whole tensors go one by one, with all of torch's threads
    for each.
    """
    header = _header(shard)
    _write(file, memoryview(header), 0)
    places, at = {}, len(header)
    for item in shard:
        places[item] = at
        at += item.size
    for item in shard:
        if not plan.elementwise(item.name):
            merged = plan.merge(item.name)
            assert (merged.dtype, tuple(merged.shape)) == (item.dtype, item.shape)
            _write(file, _bytes(merged), places[item])
            count.add(item.size)
    _run_jobs(
        file,
        _jobs(plan, {item: at for item, at in places.items() if plan.elementwise(item.name)}),
        count,
    )


def _jobs(plan: MergePlan, places: dict[Planned, int]) -> Iterator[Job]:
    for item, at in places.items():
        pieces, numbers = plan.pieces(item.name), math.prod(item.shape)
        assert pieces is not None
        for start in range(0, numbers, CHUNK):
            yield Job(
                pieces,
                start,
                min(CHUNK, numbers - start),
                item.dtype,
                at + start * item.dtype.itemsize,
            )


def _run_jobs(file: int, jobs: Iterator[Job], count: Counter) -> None:
    """Merge and write by one thread per core, each on a piece of its own: splitting one piece costs
    more than merging it.
    """
    lock, stop = threading.Lock(), threading.Event()
    threads = torch.get_num_threads()

    def work() -> None:
        """One thread: piece after piece, until there is none or another thread has failed."""
        torch.set_num_threads(1)  # of this thread
        buffer = torch.empty(CHUNK * 4, dtype=torch.uint8)
        try:
            while not stop.is_set():
                with lock:
                    job = next(jobs, None)
                if job is None:
                    return
                piece = buffer[: job.n * job.dtype.itemsize]
                job.pieces.merge_into(piece.view(job.dtype), job.start)
                _write(file, _bytes(piece), job.at)
                count.add(len(piece))
        finally:
            stop.set()  # nothing is left to do, or it failed

    with ThreadPoolExecutor(THREADS) as pool:
        helpers = [pool.submit(work) for _ in range(min(threads, THREADS) - 1)]
        try:
            work()
            for helper in helpers:
                helper.result()
        finally:
            torch.set_num_threads(threads)


def _bytes(tensor: torch.Tensor) -> memoryview:
    data: memoryview = tensor.contiguous().flatten().view(torch.uint8).numpy().data
    return data


def _write(file: int, data: memoryview, at: int) -> None:
    while data:
        written = os.pwrite(file, data, at)
        data, at = data[written:], at + written


def _sync(path: Path) -> None:
    """Some file systems find out only now that the disk is full."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _header(shard: Iterable[Planned]) -> bytes:
    """safetensors' header: its length (8 bytes, little-endian), then JSON that is padded with
    spaces to 8 bytes.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for item in shard:
        header[item.name] = {
            "dtype": FORMAT_NAMES[item.dtype],
            "shape": list(item.shape),
            "data_offsets": [end, end + item.size],
        }
        end += item.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
