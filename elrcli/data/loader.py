"""Batches of images by manifest row, the same whatever the number of worker processes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from elrcli.data.cache import ImageCache
from elrcli.data.images import ImageProblem
from elrcli.data.manifest import Manifest
from elrcli.data.shares import Share
from elrcli.data.slots import Inline, Slots
from elrcli.data.transforms import Transform
from elrcli.errors import TrainingError

PREFETCH = 2  # batches that each worker is ahead
RECEIVED = 3  # batches in the main process: one in use, one before it, one being pinned


class Batch(NamedTuple):
    """B images that could be read; B may be 0."""

    images: Tensor  # [B, 3, S, S] uint8, channels_last
    labels: Tensor  # [B] int64 given labels
    index: Tensor  # type: ignore[assignment]  # [B] int64 manifest rows, no repeats
    unreadable: tuple[tuple[int, str], ...]  # (row, reason) of the images left out


class RowLoader:
    """Load manifest rows in batches of nearly equal size.

    The order is a function of (seed, epoch), the augmentation of (seed, epoch, row). With
    `balanced`, which needs `shuffle`, an epoch draws as many rows of every class as the smallest
    class has, without repeats. Of several processes each loads the rows of its `share` in the
    common order, and all have equally many batches. One iteration at a time: starting the next
    epoch ends the last one.
    """

    def __init__(
        self,
        manifest: Manifest,
        rows: np.ndarray,
        transform: Transform,
        *,
        batch_size: int,
        workers: int,
        seed: int,
        shuffle: bool,
        balanced: bool = False,
        share: Share | None = None,
        cache: ImageCache | None = None,
        pin_memory: bool = False,
    ) -> None:
        if cache is not None and cache.load_size != transform.load_size:
            raise ValueError(f"cache holds {cache.load_size} px, not {transform.load_size} px")
        assert shuffle or not balanced, "only a shuffled order is drawn"
        rows = np.asarray(rows, dtype=np.int64)
        labels = manifest.labels[rows]
        self.images = images_per_epoch(labels, balanced)
        self._order = _BatchOrder(rows, labels, batch_size, seed, shuffle, balanced, share)
        workers = min(workers, len(self._order))
        if workers > 0 and _FORK == "fork":
            # One for each batch that is asked for, and some for those that were received.
            waiting = PREFETCH * workers + RECEIVED
            largest = min(batch_size, max(self.batch_sizes))
            with suppress(OSError):  # refused: the batches get fresh memory instead
                self._order.slots = Slots(waiting, largest, transform.image_size)
        self._loader: DataLoader[Batch] = DataLoader(
            _RowDataset(manifest, transform, seed, cache, self._order.slots),
            batch_size=None,  # the sampler hands out whole batches of rows
            sampler=self._order,
            collate_fn=_as_is,  # the default would take the named tuple apart
            num_workers=workers,
            prefetch_factor=PREFETCH if workers > 0 else None,
            persistent_workers=workers > 0,
            worker_init_fn=_start_worker if workers > 0 else None,
            multiprocessing_context=_FORK if workers > 0 else None,
            pin_memory=pin_memory,
        )

    def __len__(self) -> int:
        return len(self._order)

    @property
    def batch_sizes(self) -> list[int]:
        """How many images the batches of a single process have: one number or two."""
        quotient, rest = divmod(self.images, max(len(self), 1))
        return [quotient, quotient + 1] if rest else [quotient]

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch, from `start_batch` on."""
        self._order.epoch = epoch
        self._order.start_batch = start_batch
        try:
            for batch in self._batches():
                # Pinning memory turns inner tuples into lists.
                left_out = tuple((row, reason) for row, reason in batch.unreadable)
                yield batch._replace(unreadable=left_out)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise TrainingError(
                "A process that loads images died, mostly for lack of memory. Lower --workers or"
                " --batch-size; in a container, allow more shared memory (--shm-size)."
            ) from error

    def _batches(self) -> Iterator[Batch]:
        """Iterate without torch's handler for the death of a worker.

        It raises in whatever the program happens to do then. Without it, waiting for the worker's
        batch raises.
        """
        before = signal.getsignal(signal.SIGCHLD)
        batches = iter(self._loader)
        if signal.getsignal(signal.SIGCHLD) is not before:
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
        return batches


def images_per_epoch(labels: np.ndarray, balanced: bool) -> int:
    """Return how many rows with the labels [M] an epoch holds, see `RowLoader`."""
    if not balanced or len(labels) == 0:
        return len(labels)
    counts = np.unique(labels, return_counts=True)[1]
    return len(counts) * int(counts.min())


# Workers end when their parent does. That of Python's fork server, the default from 3.14 on, is not
# the program: they would outlive it.
_FORK = "fork" if sys.platform == "linux" else None


Request = tuple[int, np.ndarray, int | None]  # epoch, rows of a batch, slot to put it in


class _BatchOrder(Sampler[Request]):
    """Yields what the workers are asked for; set `epoch` and `start_batch` before iterating."""

    def __init__(
        self,
        rows: np.ndarray,
        labels: np.ndarray,
        batch_size: int,
        seed: int,
        shuffle: bool,
        balanced: bool,
        share: Share | None,
    ) -> None:
        self.epoch = 0
        self.start_batch = 0
        self.slots: Slots | None = None
        self._rows = rows
        self._labels = labels
        processes = 1 if share is None else share.processes
        self._num_batches = -(-images_per_epoch(labels, balanced) // (batch_size * processes))
        self._share = share
        self._seed = seed
        self._shuffle = shuffle
        self._balanced = balanced

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Request]:
        if self._num_batches == 0:
            return
        rows = self._rows
        if self._shuffle:
            order = np.random.default_rng([self._seed, self.epoch]).permutation(len(rows))
            if self._balanced:
                order = order[_equally_many(self._labels[order])]
            rows = rows[order]
        if self._share is not None and self._share.processes > 1:
            rows = rows[np.isin(rows, self._share.rows)]
        # Near-equal batches: no stray last batch of one, which BatchNorm cannot train on.
        for batch in np.array_split(rows, self._num_batches)[self.start_batch :]:
            slot = None if self.slots is None else self.slots.take(len(batch))
            yield self.epoch, batch, slot


def _equally_many(labels: np.ndarray) -> np.ndarray:
    """Return where the first m labels of every class stand, m the size of the smallest class."""
    starts, counts = np.unique(np.sort(labels), return_index=True, return_counts=True)[1:]
    by_class = np.argsort(labels, kind="stable")
    first = np.concatenate([by_class[start : start + counts.min()] for start in starts])
    return np.sort(first)


class _RowDataset(Dataset[Batch]):
    def __init__(
        self,
        manifest: Manifest,
        transform: Transform,
        seed: int,
        cache: ImageCache | None,
        slots: Slots | None,
    ) -> None:
        self._manifest = manifest
        self._transform = transform
        self._seed = seed
        self._cache = cache
        self._slots = slots

    def __getitem__(self, request: Request) -> Batch:
        epoch, rows, slot = request
        squares = self._memory(len(rows), slot)
        kept: list[int] = []
        unreadable: list[tuple[int, str]] = []
        for row in rows.tolist():
            try:
                squares[len(kept)] = self._square(row, (self._seed, epoch, row))
            except ImageProblem as problem:
                unreadable.append((row, str(problem)))
                continue
            kept.append(row)
        index = np.array(kept, dtype=np.int64)
        labels = self._manifest.labels[index].astype(np.int64)
        return Batch(
            images=self._images(squares[: len(kept)], slot),
            labels=self._array(labels),
            index=self._array(index),
            unreadable=tuple(unreadable),
        )

    def _memory(self, images: int, slot: int | None) -> np.ndarray:
        """Return memory [at least B, S, S, 3] for a batch: the slot that was asked for, or new."""
        if self._slots is not None and slot is not None:
            return self._slots.squares(slot)
        size = self._transform.image_size
        return np.empty((images, size, size, 3), dtype=np.uint8)

    def _images(self, squares: np.ndarray, slot: int | None) -> Any:
        """Return squares [B, S, S, 3] as what is a tensor in the main process."""
        if self._slots is not None and slot is not None:
            return self._slots.filled(slot, len(squares))
        return torch.from_numpy(squares).permute(0, 3, 1, 2)

    def _array(self, values: np.ndarray) -> Any:
        """Return values [B] as what is a tensor in the main process."""
        return torch.from_numpy(values) if self._slots is None else Inline(values)

    def _square(self, row: int, seed: tuple[int, ...]) -> np.ndarray:
        if self._cache is not None:
            return self._transform(self._cache.read(row), seed)
        return self._transform.read(self._manifest.file(row), seed)


def _as_is(batch: Any) -> Any:
    return batch


def _start_worker(worker: int) -> None:
    """Leave Ctrl-C to the main process, which saves its state and then ends this one.

    The JPEG library prints remarks on damaged files, without their names: keep them off the
    terminal. Errors reach the main process in another way.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
