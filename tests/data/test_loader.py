from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from elrcli.data.cache import ImageCache
from elrcli.data.images import read_image
from elrcli.data.loader import Batch, RowLoader, images_per_epoch
from elrcli.data.manifest import Manifest, StringTable, load_data
from elrcli.data.shares import Share, deal_rows
from elrcli.data.transforms import Transform, eval_transform, train_transform
from elrcli.errors import TrainingError


@pytest.fixture
def manifest(tmp_path, shapes_folder) -> Manifest:
    folder, _ = shapes_folder(tmp_path, per_class=7, size=20)
    return load_data(folder)


def make(manifest: Manifest, **options: object) -> RowLoader:
    settings: dict[str, object] = {
        "rows": np.arange(len(manifest)),
        "transform": train_transform("light", 16, flip=True),
        "batch_size": 8,
        "workers": 0,
        "seed": 3,
        "shuffle": True,
        **options,
    }
    return RowLoader(manifest, **settings)  # type: ignore[arg-type]


def rows_of(batches: list[Batch]) -> list[int]:
    return [row for batch in batches for row in batch.index.tolist()]


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.index, other.index)
        assert one.unreadable == other.unreadable


def test_a_batch_has_the_promised_shapes(manifest):
    batch = next(make(manifest).epoch(0))
    assert batch.images.shape == (7, 3, 16, 16)
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels.dtype == batch.index.dtype == torch.int64
    assert batch.unreadable == ()


def test_images_labels_and_rows_belong_together(manifest):
    transform = eval_transform(16)
    batches = list(make(manifest, transform=transform).epoch(0))
    for batch in batches:
        for image, label, row in zip(batch.images, batch.labels, batch.index, strict=True):
            expected = transform(read_image(manifest.file(int(row)), 16), ())
            np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected)
            assert manifest.paths[int(row)].startswith(manifest.classes[int(label)])


def test_an_epoch_visits_each_row_once(manifest):
    loader = make(manifest, rows=np.array([2, 3, 5, 7, 11]), batch_size=2)
    batches = list(loader.epoch(0))
    assert sorted(rows_of(batches)) == [2, 3, 5, 7, 11]
    assert len(batches) == len(loader) == 3


def test_batches_are_nearly_equal_so_that_none_holds_one_image(manifest):
    loader = make(manifest, batch_size=10)  # 21 rows
    assert [len(batch.index) for batch in loader.epoch(0)] == [7, 7, 7]
    assert [len(batch.index) for batch in make(manifest).epoch(0)] == [7, 7, 7]
    assert [len(batch.index) for batch in make(manifest, batch_size=20).epoch(0)] == [11, 10]


def test_order_and_pixels_depend_on_seed_and_epoch_alone(manifest):
    loader = make(manifest)
    first, second = list(loader.epoch(0)), list(loader.epoch(1))
    assert rows_of(first) != rows_of(second)
    assert_same(list(loader.epoch(0)), first)
    assert_same(list(make(manifest).epoch(1)), second)
    assert rows_of(list(make(manifest, seed=4).epoch(0))) != rows_of(first)
    pixels = {int(r): im for b in first for r, im in zip(b.index, b.images, strict=True)}
    again = {int(r): im for b in second for r, im in zip(b.index, b.images, strict=True)}
    assert sum(not torch.equal(pixels[row], again[row]) for row in pixels) > 15


def test_pixels_of_a_row_do_not_depend_on_the_batch_it_is_in(manifest):
    many = {int(r): im for b in make(manifest).epoch(0) for r, im in zip(*b[2::-2], strict=True)}
    (alone,) = make(manifest, rows=np.array([4])).epoch(0)
    assert torch.equal(alone.images[0], many[4])


def test_without_shuffle_the_rows_keep_their_order(manifest):
    assert rows_of(list(make(manifest, shuffle=False).epoch(5))) == list(range(21))


# Rows 0 to 6 are of the first class, 7 to 13 of the second, 14 to 20 of the third.
UNEVEN = np.array([0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 14, 15])  # 6, 4 and 2 images


def test_a_balanced_epoch_draws_as_many_of_each_class_as_the_smallest_has(manifest):
    loader = make(manifest, rows=UNEVEN, balanced=True, batch_size=4)
    drawn = []
    for epoch in range(20):
        batches = list(loader.epoch(epoch))
        assert [len(batch.index) for batch in batches] == [3, 3]
        assert sorted(torch.cat([batch.labels for batch in batches]).tolist()) == [0, 0, 1, 1, 2, 2]
        rows = rows_of(batches)
        assert len(set(rows)) == loader.images == 6
        drawn.append(rows)
    assert {row for rows in drawn for row in rows} == set(UNEVEN.tolist())  # all have their turn
    assert len({frozenset(rows) for rows in drawn}) > 10
    again = make(manifest, rows=UNEVEN, balanced=True, batch_size=4)
    assert rows_of(list(again.epoch(7))) == drawn[7]
    other = make(manifest, rows=UNEVEN, balanced=True, batch_size=4, seed=4)
    assert [rows_of(list(other.epoch(epoch))) for epoch in range(20)] != drawn


def test_balanced_rows_of_equal_classes_are_all_of_them_in_the_usual_order(manifest):
    plain, balanced = make(manifest), make(manifest, balanced=True)
    assert rows_of(list(balanced.epoch(1))) == rows_of(list(plain.epoch(1)))


@pytest.mark.parametrize(
    ("labels", "plain", "balanced"),
    [([], 0, 0), ([1], 1, 1), ([0, 0, 0], 3, 3), ([0, 3, 3, 0, 0], 5, 4), ([0, 1, 1, 2], 4, 3)],
)
def test_images_per_epoch(labels, plain, balanced):
    assert images_per_epoch(np.array(labels, dtype=np.int32), False) == plain
    assert images_per_epoch(np.array(labels, dtype=np.int32), True) == balanced


def test_an_epoch_can_start_in_the_middle(manifest):
    loader = make(manifest)
    whole = list(loader.epoch(2))
    assert_same(list(loader.epoch(2, start_batch=1)), whole[1:])
    assert list(loader.epoch(2, start_batch=3)) == []


@pytest.mark.parametrize(("processes", "batch_size"), [(2, 4), (3, 8), (5, 1)])
def test_processes_share_an_epoch(manifest, processes, batch_size):
    """Together they see each row once, in the order of one process, in equally many batches."""
    owner = deal_rows(manifest.labels, manifest.splits, processes, seed=0)
    whole = rows_of(list(make(manifest).epoch(1)))
    found = []
    for rank in range(processes):
        share = Share(np.flatnonzero(owner == rank), processes)
        loader = make(manifest, share=share, batch_size=batch_size)
        batches = list(loader.epoch(1))
        assert len(batches) == len(loader) == -(-21 // (processes * batch_size))
        assert max(len(batch.index) for batch in batches) <= batch_size
        own = rows_of(batches)
        assert own == [row for row in whole if row in share.rows]
        found += own
    assert sorted(found) == list(range(21))


def test_processes_share_a_balanced_epoch(manifest):
    """They draw the same images as one process."""
    labels = manifest.labels.copy()
    labels[:3] = 2  # 4, 7 and 10 images
    manifest = replace(manifest, labels=labels)
    owner = deal_rows(labels, manifest.splits, 2, seed=0)
    found = []
    for rank in range(2):
        share = Share(np.flatnonzero(owner == rank), 2)
        loader = make(manifest, balanced=True, share=share, batch_size=3)
        assert (loader.images, len(loader)) == (12, 2)
        found += rows_of(list(loader.epoch(5)))
    assert sorted(found) == sorted(rows_of(list(make(manifest, balanced=True).epoch(5))))


def test_worker_processes_change_nothing(manifest, tmp_path):
    (manifest.root / manifest.paths[4]).write_bytes(b"")
    alone, helped = make(manifest), make(manifest, workers=2)
    for epoch in range(2):
        assert_same(list(helped.epoch(epoch)), list(alone.epoch(epoch)))
    next(helped.epoch(0))  # an epoch that is left early
    assert_same(list(helped.epoch(1, start_batch=1)), list(alone.epoch(1, start_batch=1)))


@pytest.mark.parametrize("mode", ["ram", "disk"])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_cache_changes_nothing(manifest, tmp_path, mode, workers):
    transform = train_transform("light", 16, flip=True)
    cache = ImageCache(manifest, transform.load_size, mode, tmp_path / "cache")
    plain = make(manifest, transform=transform)
    cached = make(manifest, transform=transform, cache=cache, workers=workers)
    for epoch in range(2):
        assert_same(list(cached.epoch(epoch)), list(plain.epoch(epoch)))


def test_random_windows_are_the_same_with_a_cache_but_softer(tmp_path):
    """The cache holds 19 pixels a side, the file 200: the same parts, cut from fewer pixels."""
    (tmp_path / "data/a").mkdir(parents=True)
    (tmp_path / "data/b").mkdir()
    ramp = np.linspace(0, 255, 200, dtype=np.uint8)
    pixels = np.stack(np.broadcast_arrays(ramp, ramp[:, None], 0), axis=2).astype(np.uint8)
    for name in ("a/1.png", "b/2.jpg"):
        Image.fromarray(pixels).save(tmp_path / "data" / name)
    manifest = load_data(tmp_path / "data")
    transform = train_transform("standard", 16, flip=True)
    cache = ImageCache(manifest, transform.load_size, "ram")
    for epoch in range(5):
        (plain,) = make(manifest, transform=transform).epoch(epoch)
        (cached,) = make(manifest, transform=transform, cache=cache).epoch(epoch)
        difference = plain.images.float() - cached.images.float()
        assert difference.abs().max() < 20  # one of 19 pixels is 13 grey levels
        assert 0 < difference.abs().mean() < 5


def test_workers_fill_one_cache(manifest, tmp_path):
    cache = ImageCache(manifest, 16, "disk", tmp_path / "cache")
    list(make(manifest, cache=cache, workers=2).epoch(0))
    size = 21 * 16 * 16 * 3
    (pixels,) = (tmp_path / "cache").glob("*.pixels")
    assert pixels.stat().st_size == size
    list(make(manifest, cache=cache, workers=2).epoch(1))
    assert pixels.stat().st_size == size  # nothing was decoded again


def test_unreadable_images_are_left_out_and_reported(manifest):
    (manifest.root / manifest.paths[0]).write_bytes(b"")
    (manifest.root / manifest.paths[2]).unlink()
    batches = list(make(manifest, shuffle=False, batch_size=7).epoch(0))
    assert batches[0].index.tolist() == [1, 3, 4, 5, 6]
    assert batches[0].images.shape[0] == len(batches[0].labels) == 5
    assert batches[0].unreadable == ((0, "the file is empty"), (2, "the file does not exist"))
    assert batches[1].unreadable == ()


def test_a_batch_without_any_readable_image_still_arrives(manifest):
    (manifest.root / manifest.paths[3]).write_bytes(b"")
    (batch,) = make(manifest, rows=np.array([3])).epoch(0)
    assert batch.images.shape == (0, 3, 16, 16)
    assert batch.labels.shape == batch.index.shape == (0,)
    assert batch.unreadable == ((3, "the file is empty"),)


def test_no_rows_give_no_batches(manifest):
    loader = make(manifest, rows=np.array([], dtype=np.int64))
    assert len(loader) == 0
    assert list(loader.epoch(0)) == []


def test_a_single_row(manifest):
    (batch,) = make(manifest, rows=np.array([20]), batch_size=1).epoch(0)
    assert batch.index.tolist() == [20]


def test_given_labels_are_served_never_the_true_ones(manifest):
    other = replace(manifest, truth=(manifest.labels + 1) % 3)
    assert_same(list(make(other).epoch(0)), list(make(manifest).epoch(0)))


def test_a_cache_of_another_size_is_refused(manifest, tmp_path):
    cache = ImageCache(manifest, 17, "disk", tmp_path / "cache")
    with pytest.raises(ValueError, match="17 px, not 16 px"):
        make(manifest, cache=cache)


WITH_WORKERS = """
import multiprocessing, os, signal, sys
from pathlib import Path
from elrcli.data.loader import RowLoader
from elrcli.data.manifest import load_data
from elrcli.data.transforms import train_transform

multiprocessing.set_start_method("forkserver")  # the default from Python 3.14 on
signal.signal(signal.SIGINT, lambda number, frame: None)  # the main process finishes its work
manifest = load_data(Path(sys.argv[1]))
rows = manifest.rows("train")
loader = RowLoader(
    manifest, rows, train_transform("light", 16, True),
    batch_size=2, workers=2, seed=0, shuffle=True,
)
count = 0
for number, batch in enumerate(loader.epoch(0)):
    if number == 2:
        exec(sys.argv[2])
    count += len(batch.index)
assert count == len(rows), count
"""


@pytest.mark.parametrize(
    ("happens", "code"),
    [
        ("os.killpg(0, signal.SIGINT)", 0),  # what a terminal sends
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    ],
)
def test_workers_live_as_long_as_their_program(manifest, happens, code):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITH_WORKERS, str(manifest.root), happens],
        capture_output=True,  # and waited for until the last process has ended
        text=True,
        start_new_session=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (code, "")


class _Fatal(Transform):
    """Ends its process at once, as the kernel does when memory runs out."""

    def __init__(self) -> None:
        super().__init__(16, 16)

    def __call__(self, image: np.ndarray, seed: tuple[int, ...]) -> np.ndarray:
        os._exit(1)


def test_a_dead_worker_is_named_with_a_remedy(manifest):
    loader = make(manifest, transform=_Fatal(), workers=1)
    with pytest.raises(TrainingError, match="Lower --workers"):
        list(loader.epoch(0))


def test_remarks_on_damaged_jpegs_stay_off_the_terminal(manifest, capfd):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = manifest.root / manifest.paths[0]
    Image.fromarray(pixels).save(path, "jpeg")
    content = bytearray(path.read_bytes())
    content[2000:2100] = bytes(100)
    path.write_bytes(content)
    batches = list(make(manifest, workers=2).epoch(0))
    assert len(rows_of(batches)) == len(manifest)
    assert capfd.readouterr().err == ""


def objects_held(thing: object) -> int:
    """Return how many objects can be reached from `thing`, modules and classes left out."""
    seen: dict[int, object] = {}
    waiting = [thing]
    while waiting:
        item = waiting.pop()
        if id(item) not in seen and not isinstance(item, type | type(os)):
            seen[id(item)] = item
            waiting += gc.get_referents(item)
    return len(seen)


def test_what_workers_hold_does_not_grow_with_the_rows(tmp_path):
    """Reading an object writes to its reference count, and so copies its page in every worker."""
    counts = []
    for rows in (100, 10_000):
        manifest = Manifest(
            root=tmp_path,
            paths=StringTable(f"a/{row}.jpg" for row in range(rows)),
            labels=np.zeros(rows, dtype=np.int32),
            splits=np.zeros(rows, dtype=np.int8),
            classes=("a", "b"),
        )
        transform = train_transform("light", 16, flip=True)
        cache = ImageCache(manifest, 16, "ram")
        loader = make(manifest, rows=np.arange(rows), transform=transform, cache=cache)
        dataset = loader._loader.dataset
        counts.append(objects_held([vars(dataset), vars(loader._order)]))
    assert counts[0] == counts[1]


def test_small_data_needs_few_workers(manifest):
    loader = make(manifest, rows=np.arange(4), batch_size=4, workers=16)
    assert loader._loader.num_workers == 1


def test_errors_of_the_code_are_not_hidden(manifest):
    class Broken:
        load_size = image_size = 16

        def read(self, path: Path, seed: tuple[int, ...]) -> np.ndarray:
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        list(make(manifest, transform=Broken()).epoch(0))


def test_shapes_folder_plants_exactly_the_flips(tmp_path, shapes_folder):
    folder, truth = shapes_folder(tmp_path, per_class=10, flip_share=0.2)
    assert len(truth) == 30
    assert sum(Path(path).parts[0] != true for path, true in truth.items()) == 6
    assert sorted(truth) == list(load_data(folder).paths)
