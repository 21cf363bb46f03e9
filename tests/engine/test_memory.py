from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from elrcli.engine.memory import is_out_of_memory, largest_fitting, memory_explained
from elrcli.errors import OutOfMemory

CPU, CUDA, MPS = map(torch.device, ("cpu", "cuda", "mps"))


def room_for(images: int, asked: list[int]):
    def attempt(size: int) -> None:
        asked.append(size)
        if size > images:
            raise torch.OutOfMemoryError("CUDA out of memory")

    return attempt


@pytest.mark.parametrize(
    ("first", "room", "fitting", "asked"),
    [
        (64, 64, 64, [64]),
        (64, 17, 16, [64, 32, 16]),
        (100, 20, 13, [100, 50, 25, 13]),  # odd numbers are rounded up
        (3, 1, 1, [3, 2, 1]),
        (3, 0, None, [3, 2, 1]),
        (1, 0, None, [1]),
    ],
)
def test_sizes_are_halved_until_one_fits(first, room, fitting, asked):
    tried: list[int] = []
    assert largest_fitting(first, room_for(room, tried), CPU) == fitting
    assert tried == asked


def test_other_errors_end_the_search():
    def attempt(images: int) -> None:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        largest_fitting(8, attempt, CPU)


def test_the_error_of_the_cpu_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value, CPU)
    assert not is_out_of_memory(caught.value, CUDA)  # the machine's memory, not the device's


@pytest.mark.parametrize(
    ("error", "device", "is_it"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), CUDA, True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"), MPS, True),
        (RuntimeError("MPS backend out of memory"), CUDA, False),
        (RuntimeError("Invalid buffer size: 40.00 GB"), MPS, True),
        (torch.AcceleratorError("CUDA error: out of memory"), CUDA, True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), CUDA, True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), CUDA, True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), CPU, False),
        (RuntimeError("a defect"), CPU, False),
        (ValueError("DefaultCPUAllocator"), CPU, False),
    ],
)
def test_which_errors_say_so(error, device, is_it):
    assert is_out_of_memory(error, device) is is_it


def test_only_such_errors_are_explained():
    message = r"^cuda: out of memory\. Go away\.$"
    with pytest.raises(OutOfMemory, match=message), memory_explained(CUDA, "Go away."):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="a defect"), memory_explained(CUDA, "Go away."):
        raise RuntimeError("a defect")


FREE_AND_TAKE_AGAIN = """
import gc, os, resource
import torch
from elrcli.engine.device import choose_runtime
from elrcli.engine.memory import release_memory

MIB, PAGE = 1 << 20, os.sysconf("SC_PAGE_SIZE")

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE // MIB

def take_and_free():
    tensors = [torch.ones(48 * MIB // 4) for _ in range(4)]
    below = torch.ones(1)  # not the last piece of memory: nothing is freed by luck
    del tensors
    return below

if {keeps}:
    choose_runtime("cpu")
before, kept = resident(), [take_and_free()]
pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
kept += [take_and_free() for _ in range(4)]
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - pages
held = resident() - before
release_memory(torch.device("cpu"))
print(faults * PAGE // MIB, held, resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
@pytest.mark.parametrize("keeps", [True, False])
def test_memory_on_the_cpu_is_taken_again_without_the_kernel(keeps):
    script = FREE_AND_TAKE_AGAIN.format(keeps=keeps)
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    mapped_anew, held, held_after_release = map(int, told.stdout.split())
    assert (mapped_anew < 400) is keeps, told.stdout  # of 4 times 192 MiB
    assert (held > 150) is keeps
    assert held_after_release < 60
