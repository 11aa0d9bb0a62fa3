"""Memory that can still be taken on a device, and errors that say that there is none."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")  # the control groups of this process
# torch's allocator for the CPU; CUDA and its driver, Triton; cuBLAS, cuDNN, cuSOLVER, cuSPARSE
NO_MEMORY = re.compile(
    r"can't allocate memory|\bout of memory\b|\bCU[A-Z]+_STATUS_ALLOC_FAILED\b", re.IGNORECASE
)


@dataclass(frozen=True)
class CgroupFiles:
    """Where one version of Linux control groups keeps a group's limit and use, in bytes."""

    folder: str  # below CGROUPS
    limit: str
    used: str
    file_pages: tuple[str, ...]  # of memory.stat: what the kernel drops when memory is short


VERSIONS = {
    1: CgroupFiles(
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
    2: CgroupFiles("", "memory.max", "memory.current", ("inactive_file", "active_file")),
}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left.

    torch, CUDA and its libraries have an error of their own or only words for it.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)) is not None


def free_bytes(device: torch.device) -> float:
    """Memory that can be taken now; on the CPU it includes cached files that can be dropped."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return float("inf")
    return min([float(psutil.virtual_memory().available), *_left_in_groups()])


def _left_in_groups() -> Iterator[float]:
    """What each control group of this process still allows, in bytes.

    The groups are its own, as containers and batch systems have them, and those above.
    """
    for version, path in _own_groups():
        files = VERSIONS[version]
        root = CGROUPS / files.folder
        # a container may see its own group as the root, while the path is the host's
        for folder in (root / path, *(root / path).parents):
            if not folder.is_relative_to(root):
                break
            with suppress(OSError, ValueError):  # such as `max`
                limit = float((folder / files.limit).read_text(encoding="ascii"))
                used = float((folder / files.used).read_text(encoding="ascii"))
                yield limit - used + _file_pages(folder, files)


def _own_groups() -> Iterator[tuple[int, str]]:
    """The version and path of each group that can limit memory, by lines such as `0::/user`.

    Where they cannot be read, the roots of both versions.
    """
    try:
        lines = OWN_CGROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = ["0::/", "1:memory:/"]
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            yield 2, path.strip("/")
        elif "memory" in controllers.split(","):
            yield 1, path.strip("/")


def _file_pages(folder: Path, files: CgroupFiles) -> float:
    """Bytes of cached files, which count as used until the kernel drops them."""
    pages = 0.0
    with suppress(OSError):
        for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines():
            name, _, number = line.partition(" ")
            if name in files.file_pages and number.isdigit():
                pages += float(number)
    return pages
