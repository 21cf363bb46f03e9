"""Memory of batches that loading processes write into and the main process reads, used in turn.

Fresh shared memory costs more than a cached image: the kernel has to hand over and clear every page
of it. So the images of a batch go into a slot that both sides have already, and only its number is
sent.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ALL: weakref.WeakValueDictionary[int, Slots] = weakref.WeakValueDictionary()


class Slots:
    """`count` slots for batches of up to `images` squares of `size` pixels.

    To be made before the loading processes are forked, which then share the memory. A slot that
    was taken is free again when no tensor refers to it any more.
    """

    def __init__(self, count: int, images: int, size: int) -> None:
        memory = mmap.mmap(-1, count * images * size * size * 3)  # shared, without a name
        pixels = np.frombuffer(memory, dtype=np.uint8)
        self._squares = pixels.reshape(count, images, size, size, 3)
        self._free = deque(range(count))
        _ALL[id(self)] = self

    def take(self, images: int) -> int | None:
        """Return a free slot for so many images, which counts as taken now; None if there is none.

        None, too, for more images than a slot holds.
        """
        fits = images <= self._squares.shape[1]
        return self._free.popleft() if fits and self._free else None

    def squares(self, slot: int) -> np.ndarray:
        """Return the slot's memory [images, S, S, 3], to write to in a loading process."""
        squares: np.ndarray = self._squares[slot]
        return squares

    def filled(self, slot: int, images: int) -> FilledSlot:
        """Return the first `images` of a slot to be sent from the process that loads."""
        return FilledSlot(id(self), slot, images)

    def tensor(self, slot: int, images: int) -> Tensor:
        """Return the images of a slot as [B, 3, S, S]; with the last tensor on them it is free."""
        squares = self._squares[slot, :images]
        tensor = torch.from_numpy(squares)  # keeps the array for as long as any view of it lives
        weakref.finalize(squares, self._free.append, slot).atexit = False
        return tensor.permute(0, 3, 1, 2)


class FilledSlot:
    """Images on their way to the main process, where they arrive as a tensor."""

    def __init__(self, slots: int, slot: int, images: int) -> None:
        self._place = slots, slot, images

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, self._place


class Inline:
    """A small array that travels within the message and arrives as a tensor.

    As a tensor it would be shared memory of its own, which is handed over through a socket.
    """

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    def __reduce__(self) -> tuple[Any, ...]:
        return torch.from_numpy, (self._values,)


def _arrived(slots: int, slot: int, images: int) -> Tensor:
    return _ALL[slots].tensor(slot, images)
