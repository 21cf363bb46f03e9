"""Memory of the device: whether it ran out, and how many images fit."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from elrcli.errors import OutOfMemory


def is_out_of_memory(error: BaseException, device: torch.device) -> bool:
    """Tell whether an error says that the device has too little memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    # On CPUs and Apple's GPUs torch has no error of its own for it.
    words = {"cpu": "DefaultCPUAllocator", "mps": "MPS backend out of memory"}.get(device.type)
    return isinstance(error, RuntimeError) and words is not None and words in str(error)


@contextmanager
def memory_explained(device: torch.device, remedy: str) -> Iterator[None]:
    """Turn an error that says so into `OutOfMemory` with the remedy."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error, device):
            raise
        raise OutOfMemory(f"{device}: out of memory. {remedy}") from error


def release_memory(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


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
