"""From a decoded image to the square of the network: augmentation that a seed decides."""

from __future__ import annotations

import math
import os
import random
from typing import Any

import numpy as np

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # no network access on import

import albumentations as A
import cv2

cv2.setNumThreads(0)  # the loader's processes are the parallelism

AUGMENTATIONS = ("none", "light", "crop", "standard", "strong")


class Transform:
    """A fixed chain of albumentations steps that ends in a square of `image_size` pixels."""

    def __init__(self, steps: list[Any], image_size: int, load_size: int, is_random: bool) -> None:
        self.image_size = image_size
        self.load_size = load_size  # short side that `read_image` should deliver
        self._is_random = is_random
        self._compose = A.Compose(steps)
        self._compose.disable_check_args_private()  # its checks cost more than a crop

    def __call__(self, image: np.ndarray, seed: tuple[int, ...]) -> np.ndarray:
        """Return uint8 [S, S, 3] of image uint8 [H, W, 3]; the same seed gives the same pixels."""
        if self._is_random:
            # One pair of generators, shared by all steps: they draw from it in turn. Seeding
            # each step by itself would tie, say, the flip to the position of the crop.
            generator = np.random.default_rng(seed)
            self._compose.set_random_state(generator, random.Random(generator.bytes(16)))
        pixels: np.ndarray = self._compose(image=image)["image"]
        return pixels


def train_transform(augment: str, image_size: int, flip: bool) -> Transform:
    """Return the augmentation of that name (one of AUGMENTATIONS) for squares of `image_size`.

    none: the centre. light: a crop after padding by an eighth (four pixels at 32). crop: a crop
    of 7/8 of the short side (224 of 256 pixels). standard: a crop of 35% to 100% of the area.
    strong: the same, then colour, one small distortion and an erased rectangle. All but none
    mirror half of the images if `flip`.
    """
    if augment == "none":
        return eval_transform(image_size)
    mirror = [A.HorizontalFlip(p=0.5)] if flip else []
    if augment == "light":
        steps = [
            A.Pad(image_size // 8, border_mode=cv2.BORDER_REFLECT_101),
            A.RandomCrop(image_size, image_size),
            *mirror,
        ]
        return Transform(steps, image_size, image_size, is_random=True)
    if augment == "crop":
        steps = [A.RandomCrop(image_size, image_size), *mirror]
        return Transform(steps, image_size, round(image_size * 8 / 7), is_random=True)
    steps = [
        A.RandomResizedCrop((image_size, image_size), scale=(0.35, 1.0), ratio=(3 / 4, 4 / 3)),
        *mirror,
    ]
    if augment == "strong":
        steps += _strong_steps()
    elif augment != "standard":
        raise ValueError(f"augment must be one of {AUGMENTATIONS}, not {augment!r}")
    return Transform(steps, image_size, math.ceil(1.15 * image_size), is_random=True)


def eval_transform(image_size: int, crop: float = 1.0) -> Transform:
    """Return the centre crop that covers the share `crop` of the image's short side."""
    load_size = max(image_size, math.floor(image_size / crop))
    steps = [A.CenterCrop(image_size, image_size)]
    return Transform(steps, image_size, load_size, is_random=False)


def _strong_steps() -> list[Any]:
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
    return [
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
