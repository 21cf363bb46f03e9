"""Small images that a small network can tell apart: one coloured shape per class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "orange", "purple", "cyan", "magenta", "yellow")
KINDS = ("circle", "square", "triangle", "bar")


def draw_shape(label: int, size: int, rng: np.random.Generator) -> Image.Image:
    """Return one RGB image: shape and colour by label, place, extent and noise by chance."""
    background = rng.integers(0, 90, (size, size, 3), dtype=np.uint8)
    image = Image.fromarray(background)
    pen = ImageDraw.Draw(image)
    half = size * rng.uniform(0.2, 0.35)
    x, y = rng.uniform(half, size - half, 2)
    box = (x - half, y - half, x + half, y + half)
    colour = COLOURS[label % len(COLOURS)]
    kind = KINDS[label % len(KINDS)]
    if kind == "circle":
        pen.ellipse(box, fill=colour)
    elif kind == "square":
        pen.rectangle(box, fill=colour)
    elif kind == "triangle":
        pen.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], fill=colour)
    else:
        pen.rectangle((x - half, y - half / 3, x + half, y + half / 3), fill=colour)
    return image


def write_shapes(
    folder: Path,
    per_class: int = 8,
    classes: tuple[str, ...] = ("circle", "square", "triangle"),
    size: int = 32,
    flip_share: float = 0.0,
    seed: int = 0,
) -> dict[str, str]:
    """Write `folder/<given class>/<number>.png`; return the true class of every relative path.

    Exactly round(flip_share * images) images lie in the folder of the next class.
    """
    rng = np.random.default_rng(seed)
    total = per_class * len(classes)
    flipped = set(rng.permutation(total)[: round(flip_share * total)].tolist())
    truth: dict[str, str] = {}
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(total):
        label = number % len(classes)
        given = (label + 1) % len(classes) if number in flipped else label
        path = f"{classes[given]}/{number:04d}.png"
        draw_shape(label, size, rng).save(folder / path)
        truth[path] = classes[label]
    return truth
