"""From an image file to the square of the network: augmentation that a seed decides."""

from __future__ import annotations

import math
import os
import random
from functools import partial
from typing import Any

import cv2
import numpy as np

from elrcli.data.images import Window, cut, read_image, read_window

AUGMENTATIONS = ("none", "light", "crop", "standard", "strong")
AREAS = (0.35, 1.0)  # share of the image that a random crop covers
RATIOS = (3 / 4, 4 / 3)  # its width to its height


class Transform:
    """A crop of `image_size` pixels a side, perhaps mirrored, perhaps with further `steps`
    of albumentations.

    `crop` is "centre", "place" (anywhere, also `margin` pixels beyond the edge) or "window" (a
    random share of the area).
    """

    def __init__(
        self,
        image_size: int,
        load_size: int,
        crop: str = "centre",
        *,
        margin: int = 0,
        flip: bool = False,
        steps: Any = None,
    ) -> None:
        self.image_size = image_size
        self.load_size = load_size  # short side of the images that a cache should hold
        self._crop = crop
        self._margin = margin
        self._flip = flip
        self._steps = steps

    def read(self, path: str | os.PathLike[str], seed: tuple[int, ...]) -> np.ndarray:
        """Return uint8 [S, S, 3] of an image file; raises ImageProblem.

        A random window is cut from the file's own pixels, not from those at `load_size`: it is
        as sharp as the file allows, and nothing outside of it is scaled.
        """
        if self._crop != "window":
            return self(read_image(path, self.load_size), seed)
        random_numbers = np.random.default_rng(seed)
        choose = partial(draw_window, random_numbers=random_numbers)
        square = read_window(path, self.image_size, choose)
        return self._finish(square, random_numbers)

    def __call__(self, image: np.ndarray, seed: tuple[int, ...]) -> np.ndarray:
        """Return uint8 [S, S, 3] of image uint8 [H, W, 3]; the same seed gives the same pixels."""
        size = self.image_size
        height, width = image.shape[:2]
        if self._crop == "centre":
            top, left = (height - size) // 2, (width - size) // 2
            return image[top : top + size, left : left + size]
        random_numbers = np.random.default_rng(seed)
        if self._crop == "window":
            square = cut(image, draw_window(height, width, random_numbers), size)
            return self._finish(square, random_numbers)
        pad = self._margin
        top = int(random_numbers.integers(height + 2 * pad - size + 1))
        left = int(random_numbers.integers(width + 2 * pad - size + 1))
        if pad > 0:
            image = cv2.copyMakeBorder(image, pad, pad, pad, pad, cv2.BORDER_REFLECT_101)
        return self._finish(image[top : top + size, left : left + size], random_numbers)

    def _finish(self, square: np.ndarray, random_numbers: np.random.Generator) -> np.ndarray:
        if self._flip and random_numbers.random() < 0.5:
            square = cv2.flip(square, 1)
        if self._steps is not None:
            # One pair of generators, shared by all steps: they draw from it in turn. Seeding
            # each step by itself would tie, say, the hue to the blur.
            twin = random.Random(random_numbers.bytes(16))
            self._steps.set_random_state(random_numbers, twin)
            square = self._steps(image=square)["image"]
        return square


def train_transform(augment: str, image_size: int, flip: bool) -> Transform:
    """Return the augmentation of that name (one of AUGMENTATIONS) for squares of `image_size`.

    none: the centre. light: a crop after padding by an eighth (four pixels at 32). crop: a crop
    of 7/8 of the short side (224 of 256 pixels). standard: a crop of 35% to 100% of the area.
    strong: the same, then colour, one small distortion and an erased rectangle. All but none
    mirror half of the images if `flip`.
    """
    if augment == "none":
        return eval_transform(image_size)
    if augment == "light":
        return Transform(image_size, image_size, "place", margin=image_size // 8, flip=flip)
    if augment == "crop":
        return Transform(image_size, round(image_size * 8 / 7), "place", flip=flip)
    if augment not in AUGMENTATIONS:
        raise ValueError(f"augment must be one of {AUGMENTATIONS}, not {augment!r}")
    steps = _strong_steps() if augment == "strong" else None
    return Transform(image_size, math.ceil(1.15 * image_size), "window", flip=flip, steps=steps)


def eval_transform(image_size: int) -> Transform:
    """Return the centre crop that is as large as the image's short side."""
    return Transform(image_size, image_size)


def draw_window(height: int, width: int, random_numbers: np.random.Generator) -> Window:
    """Return a random window of AREAS and RATIOS; the largest in the middle where none fits."""
    low, high = math.log(RATIOS[0]), math.log(RATIOS[1])
    for area, log_ratio in random_numbers.random((10, 2)).tolist():
        pixels = height * width * (AREAS[0] + area * (AREAS[1] - AREAS[0]))
        ratio = math.exp(low + log_ratio * (high - low))
        part = math.sqrt(pixels / ratio) / height, math.sqrt(pixels * ratio) / width
        if max(part) <= 1:
            top, left = random_numbers.random(2).tolist()
            return Window(top * (1 - part[0]), left * (1 - part[1]), *part)
    part = min(1.0, width / RATIOS[0] / height), min(1.0, height * RATIOS[1] / width)
    return Window((1 - part[0]) / 2, (1 - part[1]) / 2, *part)


def _strong_steps() -> Any:
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # no network access on import
    import albumentations as A  # only here: it takes a good part of the time to start

    edge = cv2.BORDER_REFLECT_101
    one_of = [
        A.Affine(rotate=(-15, 15), border_mode=edge, p=1.0),
        A.Affine(shear=(-10, 10), border_mode=edge, p=1.0),
        A.Affine(translate_percent=(-0.1, 0.1), border_mode=edge, p=1.0),
        A.Equalize(p=1.0),
        A.AutoContrast(p=1.0),
        A.Posterize(num_bits=5, p=1.0),
        A.Sharpen(alpha=(0.1, 0.4), p=1.0),
        A.GaussianBlur(sigma_limit=(0.3, 1.0), p=1.0),
    ]
    steps = [
        A.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.05, p=0.8),
        A.OneOf(one_of, p=0.7),
        A.CoarseDropout(
            num_holes_range=(1, 1),
            hole_height_range=(0.1, 0.35),
            hole_width_range=(0.1, 0.35),
            fill="random_uniform",
            p=0.25,
        ),
    ]
    composed = A.Compose(steps)
    composed.disable_check_args_private()  # its checks cost more than a crop
    return composed
