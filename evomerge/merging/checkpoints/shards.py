"""Merged tensors as safetensors files, written in chunks by several threads."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from evomerge.files import sync_file
from evomerge.merging.checkpoints.safetensors_reader import DTYPES, WHOLE
from evomerge.merging.stream import CHUNK, MergePlan
from evomerge.merging.tensor_merge import ChunkedMerge

THREADS = 8  # at most: more only share the memory's bandwidth, and each has a buffer
FORMAT_NAMES = {dtype: name for name, dtype in (*DTYPES.items(), *WHOLE.items())}
Progress = Callable[[int, int], None]
SEEKING = threading.Lock()  # where a file has one position for all threads


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that will be written: a file's header comes before anything is merged."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


Shards = Sequence[Sequence[PlannedTensor]]


def plan_shards(plan: MergePlan, limit: int) -> list[list[PlannedTensor]]:
    """The files' tensors, sorted by name.

    A new file begins when the next tensor would make the last one larger than `limit` bytes. A file
    holds at least one tensor, however large.
    """
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for name in plan.names:
        item = PlannedTensor(name, plan.dtype(name), plan.shape(name))
        if shards[-1] and size + item.size > limit:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.size
    return shards


def total_size(shards: Shards) -> int:
    """Bytes of all tensors."""
    return sum(item.size for item in chain.from_iterable(shards))


def write_shards(
    folder: Path, plan: MergePlan, shards: Shards, progress: Progress | None = None
) -> None:
    """Write the files, and an index where there are several.

    `progress` gets (bytes written, bytes in all), from one thread at a time. Raises OSError, and
    ModelError as the merge does.
    """
    weight_map: dict[str, str] = {}
    count = ByteCount(total_size(shards), progress)
    # the next file is merged while the last one goes to the disk
    with ThreadPoolExecutor(1) as syncing:
        last = None
        for i, shard in enumerate(shards):
            name = "model.safetensors"
            if len(shards) > 1:
                name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            with (folder / name).open("wb", buffering=0) as file:
                _write_shard(file.fileno(), plan, shard, count)
            for item in shard:
                weight_map[item.name] = name
            if last is not None:
                last.result()
            last = syncing.submit(sync_file, folder / name)
        if last is not None:
            last.result()
    if len(shards) > 1:
        index = {"metadata": {"total_size": count.total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2), encoding="utf-8"
        )


class ByteCount:
    """Bytes written so far, counted over all threads and told to `progress`."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self._progress = total, progress
        self._done, self._lock = 0, threading.Lock()

    def add(self, size: int) -> None:
        with self._lock:
            self._done += size
            if self._progress is not None:
                self._progress(self._done, self.total)


@dataclass(frozen=True)
class Chunk:
    """Numbers start to start + n of a tensor, to be written at byte `at` of the file."""

    tensor: ChunkedMerge
    start: int
    n: int
    dtype: torch.dtype
    at: int


def _write_shard(
    file: int, plan: MergePlan, shard: Sequence[PlannedTensor], count: ByteCount
) -> None:
    """Fill an open file: whole tensors one by one, the others in chunks.

    Methods that need whole tensors get all of torch's threads for each.
    """
    header = _header(shard)
    _write(file, memoryview(header), 0)
    in_chunks: dict[PlannedTensor, int] = {}
    at = len(header)
    for item in shard:
        if plan.elementwise(item.name):
            in_chunks[item] = at
        else:
            merged = plan.merge(item.name)
            assert (merged.dtype, tuple(merged.shape)) == (item.dtype, item.shape)
            _write(file, _bytes(merged), at)
            count.add(item.size)
        at += item.size
    _merge_chunks(file, _chunks(plan, in_chunks), count)


def _chunks(plan: MergePlan, offsets: dict[PlannedTensor, int]) -> Iterator[Chunk]:
    for item, offset in offsets.items():
        tensor, elements = plan.chunked(item.name), math.prod(item.shape)
        for start in range(0, elements, CHUNK):
            at = offset + start * item.dtype.itemsize
            yield Chunk(tensor, start, min(CHUNK, elements - start), item.dtype, at)


def _merge_chunks(file: int, chunks: Iterator[Chunk], count: ByteCount) -> None:
    """Merge and write with one thread per core, each on a chunk of its own.

    Splitting one chunk costs more than merging it.
    """
    lock, stop = threading.Lock(), threading.Event()
    threads = torch.get_num_threads()

    def work() -> None:
        """One thread: chunk after chunk, until there is none left or another thread has failed."""
        torch.set_num_threads(1)  # of this thread
        buffer = torch.empty(CHUNK * 4, dtype=torch.uint8)
        try:
            while not stop.is_set():
                with lock:
                    chunk = next(chunks, None)
                if chunk is None:
                    return
                merged = buffer[: chunk.n * chunk.dtype.itemsize]
                chunk.tensor.merge_into(merged.view(chunk.dtype), chunk.start)
                _write(file, _bytes(merged), chunk.at)
                count.add(len(merged))
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
        written = _write_at(file, data, at)
        data = data[written:]
        at += written


def _write_at(file: int, data: memoryview, at: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(file, data, at)
    with SEEKING:  # Windows
        os.lseek(file, at, os.SEEK_SET)
        return os.write(file, data)


def _header(shard: Iterable[PlannedTensor]) -> bytes:
    """safetensors' header: its length (8 bytes, little-endian), then JSON.

    The JSON is padded with spaces to 8 bytes.
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
