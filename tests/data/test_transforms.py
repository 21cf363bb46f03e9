from __future__ import annotations

import os
import pickle
import subprocess
import sys

import cv2
import numpy as np
import pytest
from PIL import Image

from elrcli.data.transforms import (
    AUGMENTATIONS,
    draw_window,
    eval_transform,
    train_transform,
)


def ramp(height: int, width: int) -> np.ndarray:
    """Return an image whose red is the column and whose green is the row."""
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[..., 0] = np.arange(width)
    image[..., 1] = np.arange(height)[:, None]
    return image


def noise(size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)


def test_albumentations_is_loaded_for_strong_only():
    lines = (
        "import sys; from elrcli.data.transforms import train_transform",
        "train_transform('standard', 32, True); assert 'albumentations' not in sys.modules",
        "train_transform('strong', 32, True); assert 'albumentations' in sys.modules",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


def test_the_import_asks_no_server_and_leaves_one_thread():
    train_transform("strong", 32, flip=True)
    assert os.environ["NO_ALBUMENTATIONS_UPDATE"] == "1"
    assert cv2.getNumThreads() == 1


@pytest.mark.parametrize("augment", AUGMENTATIONS)
@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("size", [1, 7, 32])
def test_every_augmentation_gives_the_square(augment, flip, size):
    transform = train_transform(augment, size, flip)
    assert transform.image_size == size
    load = transform.load_size
    for shape in [(load, load), (load, 4 * load), (3 * load, load)]:
        pixels = transform(ramp(*shape), (0, 0, 1))
        assert pixels.shape == (size, size, 3)
        assert pixels.dtype == np.uint8


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_the_seed_decides_the_pixels(augment):
    transform = train_transform(augment, 24, flip=True)
    copy = pickle.loads(pickle.dumps(transform))
    image = noise(transform.load_size + 24)
    first = [transform(image, (1, 2, row)).tobytes() for row in range(40)]
    backwards = [copy(image, (1, 2, row)).tobytes() for row in reversed(range(40))]
    assert first == backwards[::-1]
    if augment == "none":
        assert len(set(first)) == 1
    else:
        assert len(set(first)) > 35  # few of 40 draws coincide
        assert transform(image, (1, 3, 0)).tobytes() != first[0]
        assert transform(image, (2, 2, 0)).tobytes() != first[0]


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_the_image_is_not_changed_in_place(augment):
    transform = train_transform(augment, 24, flip=True)
    image = noise(transform.load_size)
    image.flags.writeable = False
    before = image.copy()
    for row in range(10):
        transform(image, (0, 0, row))
    np.testing.assert_array_equal(image, before)


def test_numpy_and_python_global_generators_are_left_alone():
    import random

    transform = train_transform("strong", 24, flip=True)
    np.random.seed(0)
    random.seed(0)
    expected = np.random.random(), random.random()
    np.random.seed(0)
    random.seed(0)
    transform(noise(transform.load_size), (0, 0, 0))
    assert (np.random.random(), random.random()) == expected


def light_draws(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return column, row and flip of `count` light crops of 32 from a ramp of 32."""
    transform = train_transform("light", 32, flip=True)
    image = ramp(32, 32)
    columns, rows, flips = [], [], []
    for row in range(count):
        pixels = transform(image, (0, 0, row)).astype(int)
        flipped = pixels[0, 16, 0] < pixels[0, 15, 0]
        upright = pixels[:, ::-1] if flipped else pixels
        columns.append(upright[0, 16, 0] - 16)  # shift of the crop, -4..4
        rows.append(upright[16, 0, 1] - 16)
        flips.append(flipped)
    return np.array(columns), np.array(rows), np.array(flips)


def test_light_is_the_pad_4_crop_at_32_pixels():
    columns, rows, flips = light_draws(600)
    assert set(columns) == set(rows) == set(range(-4, 5))
    assert 0.4 < flips.mean() < 0.6
    assert abs(columns.mean()) < 0.5


def test_flip_and_crop_are_independent():
    columns, rows, flips = light_draws(600)
    correlations = np.corrcoef([columns, rows, flips])
    assert np.abs(correlations[np.triu_indices(3, 1)]).max() < 0.15  # 3.7 standard errors


def test_neighbouring_seeds_are_independent():
    columns, _, flips = light_draws(600)
    assert abs(np.corrcoef(columns[:-1], columns[1:])[0, 1]) < 0.15
    assert abs(np.corrcoef(flips[:-1], flips[1:])[0, 1]) < 0.15


@pytest.mark.parametrize("augment", ["light", "standard"])
def test_without_flip_nothing_is_mirrored(augment):
    transform = train_transform(augment, 32, flip=False)
    image = ramp(transform.load_size, transform.load_size)
    for row in range(50):
        pixels = transform(image, (0, 0, row)).astype(int)
        assert pixels[16, 17, 0] > pixels[16, 14, 0]


def test_light_moves_along_the_long_side():
    transform = train_transform("light", 16, flip=False)
    starts = [int(transform(ramp(16, 64), (0, 0, row))[0, 8, 0]) for row in range(100)]
    assert min(starts) < 12
    assert max(starts) > 52


def test_standard_crops_a_third_to_all_of_the_area():
    transform = train_transform("standard", 32, flip=False)
    assert transform.load_size == 37  # ceil(1.15 * 32)
    areas = []
    for row in range(200):
        pixels = transform(ramp(37, 37), (0, 0, row)).astype(float)
        width = np.ptp(pixels[..., 0]) + 1
        height = np.ptp(pixels[..., 1]) + 1
        areas.append(width * height / 37**2)
    assert 0.3 < min(areas) < 0.45
    assert 0.9 < max(areas) <= 1.0


def test_none_and_evaluation_take_the_centre():
    expected = ramp(8, 12)[:, 2:10]
    np.testing.assert_array_equal(train_transform("none", 8, True)(ramp(8, 12), (3,)), expected)
    np.testing.assert_array_equal(eval_transform(8)(ramp(8, 12), ()), expected)


def test_crop_is_224_of_256_pixels():
    transform = train_transform("crop", 224, flip=False)
    assert transform.load_size == 256
    assert train_transform("crop", 227, flip=False).load_size == 259
    image = ramp(256, 300)
    places = set()
    for row in range(30):
        crop = transform(image, (0, 0, row))
        x, y = int(crop[0, 0, 0]), int(crop[0, 0, 1])
        np.testing.assert_array_equal(crop, image[y : y + 224, x : x + 224])
        places.add((y, x))
    assert len(places) > 20


def test_unknown_augmentation():
    with pytest.raises(ValueError, match="none"):
        train_transform("heavy", 32, flip=True)


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_reading_a_file_gives_what_its_pixels_give(tmp_path, augment):
    """A file at the size of the cache: crops from the file and from the pixels are the same."""
    transform = train_transform(augment, 32, flip=True)
    path = tmp_path / "a.png"
    Image.fromarray(noise(transform.load_size)).save(path)
    for row in range(10):
        from_file, from_pixels = (
            transform.read(path, (0, 0, row)),
            transform(noise(transform.load_size), (0, 0, row)),
        )
        np.testing.assert_array_equal(from_file, from_pixels)


def test_windows_lie_inside_and_have_the_promised_shape():
    random_numbers = np.random.default_rng(0)
    for height, width in [(300, 400), (100, 100), (400, 300)]:
        for _ in range(300):
            window = draw_window(height, width, random_numbers)
            assert 0 <= window.top <= window.top + window.height <= 1 + 1e-9
            assert 0 <= window.left <= window.left + window.width <= 1 + 1e-9
            assert 0.35 - 1e-9 <= window.height * window.width <= 1 + 1e-9
            ratio = window.width * width / (window.height * height)
            assert 3 / 4 - 1e-9 <= ratio <= 4 / 3 + 1e-9


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((100, 400), (0.0, 1 / 3, 1.0, 1 / 3)), ((400, 100), (1 / 3, 0.0, 1 / 3, 1.0))],
)
def test_where_no_window_fits_it_is_the_middle(shape, expected):
    """Of 100 x 400, a third of the area cannot be had at 4 to 3; the widest window is 133 wide."""
    assert draw_window(*shape, np.random.default_rng(0)) == pytest.approx(expected)
