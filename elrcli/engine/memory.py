"""Memory of devices: how much is free, whether it ran out, and how many images fit."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from elrcli.engine.launch import launch
from elrcli.errors import OutOfMemory

MEMINFO = Path("/proc/meminfo")
# Files of a container: limit, use, and what of the use are files that can be forgotten.
CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)

# Settings of glibc's malloc, see its mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
NEVER = -1


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a device; of the host, the share of one of its processes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return free_host_memory() // launch().local_processes


def total_memory(device: torch.device) -> int:
    """Return how many bytes a device has in all, of the host as `total_host_memory`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return total_host_memory()


def free_host_memory() -> int:
    """Return what the system and the container leave, in bytes."""
    return min([_available(), *filter(None, (_left_in_container(*files) for files in CGROUPS))])


def total_host_memory() -> int:
    """Return what the machine has, or what the container may use of it, in bytes."""
    return min([_installed(), *filter(None, (_container_limit(files[0]) for files in CGROUPS))])


def _available() -> int:
    try:
        return 1024 * _entries(MEMINFO)["MemAvailable:"]
    except (OSError, KeyError):  # not Linux: half of all
        return _installed() // 2


def _installed() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _container_limit(limit: str) -> int | None:
    try:
        found = Path(limit).read_text().strip()
    except (OSError, ValueError):
        return None
    return int(found) if found.isdecimal() else None  # "max"


def _left_in_container(limit: str, used: str, statistics: str) -> int | None:
    most = _container_limit(limit)
    if most is None:
        return None
    try:
        forgettable = _entries(Path(statistics)).get("inactive_file", 0)
        return max(1, most - int(Path(used).read_text()) + forgettable)
    except (OSError, ValueError):
        return None


def _entries(path: Path) -> dict[str, int]:
    """Return the numbers of a file whose lines begin with a name and a number."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}


# What errors say that torch has no kind of its own for, by type of device.
OUT_OF_MEMORY = {
    "cpu": ("DefaultCPUAllocator",),
    "mps": ("MPS backend out of memory", "Invalid buffer size"),
    "cuda": (
        "CUDA error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED",
    ),
}


def is_out_of_memory(error: BaseException, device: torch.device) -> bool:
    """Tell whether an error says that the device has too little memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    said = OUT_OF_MEMORY.get(device.type, ())
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


@contextmanager
def memory_explained(device: torch.device, remedy: str) -> Iterator[None]:
    """Turn an error that says so into `OutOfMemory` with the remedy."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error, device):
            raise
        raise OutOfMemory(f"{device}: out of memory. {remedy}") from error


def keep_freed_memory() -> None:
    """Let this process keep the host's memory that it frees, until `release_memory`.

    A step frees what the next one takes again. The C library hands large pieces back to the
    kernel, which then clears and maps every page anew: up to a third of the time of a network on
    the CPU. Only glibc can be told.
    """
    libc = _glibc()
    if libc is not None:
        libc.mallopt(M_MMAP_MAX, 0)  # large pieces, too, come from what is kept
        libc.mallopt(M_TRIM_THRESHOLD, NEVER)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


def release_memory(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    elif (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def largest_fitting(
    images: int, attempt: Callable[[int], object], device: torch.device
) -> int | None:
    """Return the first of `images`, a half, a quarter, ..., 1 whose attempt fits on the device.

    Odd numbers are rounded up. None where not even a single image fits.
    """
    while not _fits(images, attempt, device):
        if images == 1:
            return None
        images = -(-images // 2)
    return images


def _fits(images: int, attempt: Callable[[int], object], device: torch.device) -> bool:
    try:
        attempt(images)
    except RuntimeError as error:
        if not is_out_of_memory(error, device):
            raise
        fits = False
    else:
        fits = True
    release_memory(device)  # not before the error is gone: it holds what was in use
    return fits
