"""Free memory by fake control groups, and what GPU libraries say when there is none."""

import pytest
import torch

from evomerge.errors import EngineError
from evomerge.merging import device_memory
from evomerge.merging.device_memory import free_bytes, is_out_of_memory

GB = 10**9
CPU = torch.device("cpu")
# as CUDA, its driver, cuBLAS, cuDNN and Triton word it
WORDINGS = [
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    "CUDA driver error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes.",
]
OTHERS = [
    "CUDA error: device-side assert triggered",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`",
    "out of resource: shared memory, Required: 262144, Hardware limit: 232448",
]


@pytest.mark.parametrize("words", WORDINGS, ids=lambda words: words[:40])
def test_memory_that_ran_out_is_recognised(words):
    assert is_out_of_memory(RuntimeError(words))


@pytest.mark.parametrize("words", OTHERS, ids=lambda words: words[:40])
def test_other_faults_are_no_lack_of_memory(words):
    assert not is_out_of_memory(RuntimeError(words))


def test_our_own_line_about_it_is_not_tried_again():
    assert not is_out_of_memory(EngineError("out of memory with a single prompt"))
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert is_out_of_memory(MemoryError())


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Writes files of control groups; the machine has 900 GB."""
    monkeypatch.setattr(device_memory, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(device_memory, "OWN_CGROUPS", tmp_path / "own")

    class Memory:
        available = 900 * GB

    monkeypatch.setattr(device_memory.psutil, "virtual_memory", lambda: Memory)

    def write(own, files):
        (tmp_path / "own").write_text(own, encoding="utf-8")
        for name, content in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n", encoding="utf-8")

    return write


def stat(inactive, active, prefix=""):
    """memory.stat with page caches of so many GB."""
    return (
        f"anon {30 * GB}\n{prefix}inactive_file {inactive * GB}\n"
        f"{prefix}active_file {active * GB}\nslab 4096"
    )


def test_cached_files_of_a_container_are_free(groups):
    """100 GB, 80 used, of them 50 of the checkpoint's pages."""
    groups(
        "0::/\n",
        {
            "memory.max": 100 * GB,
            "memory.current": 80 * GB,
            "memory.stat": stat(40, 10),
        },
    )
    assert free_bytes(CPU) == 70 * GB


def test_version_1_counts_the_pages_of_the_groups_below_too(groups):
    lines = stat(1, 1) + "\n" + stat(40, 10, "total_")
    groups(
        "4:memory:/docker/0a1b\n1:cpu:/docker/0a1b\n0::/\n",
        {
            "memory/memory.limit_in_bytes": 100 * GB,
            "memory/memory.usage_in_bytes": 80 * GB,
            "memory/memory.stat": lines,
        },
    )
    assert free_bytes(CPU) == 70 * GB, "the container's own group is the root there"


def test_a_job_within_a_group_has_the_tightest_limit_above_it(groups):
    """As batch systems set it: the job's limit, its steps have none of their own."""
    groups(
        "0::/system.slice/job_7/step_0\n",
        {
            "system.slice/job_7/step_0/memory.max": "max",
            "system.slice/job_7/step_0/memory.current": 5 * GB,
            "system.slice/job_7/memory.max": 64 * GB,
            "system.slice/job_7/memory.current": 10 * GB,
            "system.slice/memory.max": 500 * GB,
            "system.slice/memory.current": 450 * GB,
            "system.slice/memory.stat": stat(20, 0),
        },
    )
    assert free_bytes(CPU) == 54 * GB


@pytest.mark.parametrize("limit", ["max", 9223372036854771712])
def test_without_a_limit_the_machine_decides(groups, limit):
    groups(
        "0::/\n4:memory:/\n",
        {"memory.max": limit, "memory.current": GB, "memory/memory.limit_in_bytes": limit},
    )
    assert free_bytes(CPU) == 900 * GB
