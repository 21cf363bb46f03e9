"""Memory that workers fill and the main process reads."""

from __future__ import annotations

import errno
import gc
import mmap
import multiprocessing
import pickle

import numpy as np
import pytest
import torch

from elrcli.data.loader import PREFETCH, RECEIVED, RowLoader
from elrcli.data.manifest import Manifest, load_data
from elrcli.data.slots import Inline, Slots
from elrcli.data.transforms import train_transform

ASKED = PREFETCH + RECEIVED  # slots of one worker


@pytest.fixture
def manifest(tmp_path, shapes_folder) -> Manifest:
    return load_data(shapes_folder(tmp_path, per_class=7, size=20)[0])


def loader(manifest: Manifest, workers: int = 1, batch_size: int = 2) -> RowLoader:
    return RowLoader(
        manifest,
        np.arange(len(manifest)),
        train_transform("light", 16, flip=True),
        batch_size=batch_size,
        workers=workers,
        seed=3,
        shuffle=True,
    )


def free_slots(loader: RowLoader) -> int:
    gc.collect()
    assert loader._order.slots is not None
    return len(loader._order.slots._free)


def test_what_another_process_writes_arrives_as_a_tensor():
    slots = Slots(2, images=3, size=4)
    slot = slots.take(3)

    def write(queue) -> None:
        slots.squares(slot)[:2] = [[[[1, 2, 3]]], [[[4, 5, 6]]]]
        queue.put(slots.filled(slot, 2))

    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    process = fork.Process(target=write, args=(queue,))
    process.start()
    images = queue.get(timeout=60)
    process.join()
    assert images.shape == (2, 3, 4, 4)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert images[:, :, 3, 3].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert images.data_ptr() == slots.squares(slot).ctypes.data  # nothing was copied


def test_a_slot_is_free_when_the_last_view_of_its_images_is_gone():
    slots = Slots(1, images=2, size=4)
    slot = slots.take(2)
    assert slots.take(2) is None
    images = pickle.loads(pickle.dumps(slots.filled(slot, 2)))
    view = images[1:, 0].reshape(-1)[3:]
    del images
    gc.collect()
    assert slots.take(2) is None
    del view
    gc.collect()
    assert slots.take(2) == slot


def test_a_batch_without_a_readable_image_leaves_its_slot_free():
    slots = Slots(1, images=2, size=4)
    images = pickle.loads(pickle.dumps(slots.filled(slots.take(2), 0)))
    assert images.shape == (0, 3, 4, 4)
    del images
    gc.collect()
    assert slots.take(2) == 0


def test_more_images_than_a_slot_holds_get_none():
    slots = Slots(1, images=2, size=4)
    assert slots.take(3) is None
    assert slots.take(1) == 0


def test_images_outlive_their_slots():
    slots = Slots(1, images=1, size=2)
    slots.squares(0)[:] = 7
    images = slots.tensor(0, 1)
    del slots
    gc.collect()
    assert images.tolist() == [[[[7, 7], [7, 7]]] * 3]


def test_batches_take_turns_in_few_slots(manifest):
    one = loader(manifest)
    places = {batch.images.data_ptr() for epoch in range(3) for batch in one.epoch(epoch)}
    assert 1 < len(places) <= ASKED
    assert free_slots(one) == ASKED


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_that_are_kept_stay_as_they_are(manifest, workers):
    """Far more of them than there are slots."""
    kept = [batch.images for batch in loader(manifest, workers, batch_size=1).epoch(0)]
    expected = [batch.images for batch in loader(manifest, 0, batch_size=1).epoch(0)]
    assert len(kept) == len(manifest) > PREFETCH * workers + RECEIVED
    for one, other in zip(kept, expected, strict=True):
        assert torch.equal(one, other)


def test_an_epoch_that_is_left_early_loses_no_slot(manifest):
    one = loader(manifest)
    for epoch in range(3):
        next(one.epoch(epoch))
    assert len(list(one.epoch(3))) == len(one)
    assert free_slots(one) == ASKED


def test_where_the_system_refuses_slots_batches_get_fresh_memory(manifest, monkeypatch):
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    expected = [batch.images.clone() for batch in loader(manifest).epoch(0)]
    monkeypatch.setattr(mmap, "mmap", refuse)
    without = loader(manifest)
    assert without._order.slots is None
    for batch, images in zip(without.epoch(0), expected, strict=True):
        assert torch.equal(batch.images, images)


def test_without_workers_there_are_no_slots(manifest):
    assert loader(manifest, workers=0)._order.slots is None


def test_a_small_array_arrives_as_a_tensor():
    values = np.array([3, 1 << 40])
    arrived = pickle.loads(pickle.dumps(Inline(values)))
    assert arrived.dtype == torch.int64
    assert arrived.tolist() == values.tolist()
