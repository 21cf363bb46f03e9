from __future__ import annotations

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
