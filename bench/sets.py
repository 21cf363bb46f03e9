"""Data sets of the studies, as CSV files: path, label, true_label, split.

CIFAR-10 comes from a folder given by the user (`train/<class>/*.jpg`, `test/<class>/*.jpg`) and
CIFAR-10N labels from a CSV (`path,true_label,aggre,rand1`). Digits and shapes are made here.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits

from elrcli.data.noise import asymmetric, symmetric

CIFAR_CLASSES = [
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
]  # folder names
ASYMMETRIC = {
    "truck": "automobile",
    "bird": "airplane",
    "deer": "horse",
    "cat": "dog",
    "dog": "cat",
}


@dataclass(frozen=True)
class StudySet:
    """A CSV file, the folder its paths start from, and the settings that suit the images."""

    csv: Path
    root: Path
    settings: dict[str, Any]


def cifar_arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of what every study on CIFAR-10 needs; without data it can only print."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--cifar", type=Path, help="folder with train/ and test/")
    parser.add_argument("--labels", type=Path, help="CSV file with the labels of CIFAR-10N")
    parser.add_argument("--weights", type=Path, help="state dict of EfficientNet-Lite0")
    parser.add_argument("--out", type=Path, required=True, help="folder of the result files")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    return parser


def cifar(
    out: Path,
    folder: Path,
    labels_csv: Path,
    noise: str,
    images: int,
    tests: int,
    seed: int = 0,
    classes: tuple[str, ...] = tuple(CIFAR_CLASSES),
) -> StudySet:
    """Write a class-balanced CIFAR-10 subset.

    `noise` is clean, aggre, rand1 (human labels), symN or asymN (N in percent).
    """
    rng = np.random.default_rng(seed)
    with labels_csv.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["true_label"] in classes]
    chosen = balanced([row["true_label"] for row in rows], images, rng)
    rows = [rows[i] for i in chosen]
    truth = np.array([classes.index(row["true_label"]) for row in rows])
    if noise in ("aggre", "rand1"):
        given = [row[noise] for row in rows]
    else:
        given = [classes[i] for i in noisy(truth, len(classes), noise, rng, confusions(classes))]
    lines = [
        (row["path"], label, row["true_label"], "") for row, label in zip(rows, given, strict=True)
    ]
    for name in classes:
        paths = sorted(path.name for path in (folder / "test" / name).iterdir())
        for path in paths[: tests // len(classes)]:
            lines.append((f"test/{name}/{path}", name, name, "test"))
    return StudySet(write(out, lines), folder, {"root": folder})


def digits(out: Path, noise: str, seed: int = 0, *, tests: bool = True) -> StudySet:
    """Write scikit-learn's 1,797 handwritten digits as PNG files; a fifth is for `tests`."""
    rng = np.random.default_rng(seed)
    data = load_digits()
    split = np.array(["test" if tests and i % 5 == 0 else "" for i in range(len(data.target))])
    truth = data.target.astype(np.int64)
    given = noisy(truth, 10, noise, rng)
    given = np.where(split == "test", truth, given)
    lines = []
    for i, pixels in enumerate(data.images):
        path = out.parent / "digits" / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * 255 / 16).astype(np.uint8))
        image.resize((32, 32), Image.Resampling.BICUBIC).save(path)
        lines.append((f"digits/{path.name}", str(given[i]), str(truth[i]), split[i]))
    settings = {"image_size": 32, "small_input": True, "flip": False}
    return StudySet(write(out, lines), out.parent, settings)


def numbers(out: Path, images: int, seed: int = 0) -> StudySet:
    """Write two-digit numbers: pairs of scikit-learn's digits, 100 classes, all true labels."""
    rng = np.random.default_rng(seed)
    pictures, digit = load_digits(return_X_y=True)
    pictures = (pictures.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)
    lines = []
    for i, label in enumerate(rng.permutation(np.arange(images) % 100)):
        pair = [rng.choice(pictures[digit == each]) for each in divmod(int(label), 10)]
        path = out.parent / f"numbers-{seed}" / f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.hstack(pair)).resize((32, 32)).save(path)
        lines.append((f"numbers-{seed}/{path.name}", f"c{label}", f"c{label}", ""))
    return StudySet(write(out, lines), out.parent, {"image_size": 32})


def shapes(
    out: Path,
    noise: str,
    per_class: int,
    classes: int,
    size: int = 48,
    seed: int = 0,
    *,
    tests: int = 20,
) -> StudySet:
    """Write coloured shapes: form and colour make the class, place, size and shade vary.

    `tests` more of each class have true labels and the split test.
    """
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(classes), per_class + tests)
    split = np.tile(np.array([""] * per_class + ["test"] * tests), classes)
    given = np.where(split == "test", truth, noisy(truth, classes, noise, rng))
    lines = []
    for i, label in enumerate(truth):
        path = out.parent / f"shapes{classes}" / f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        _shape(int(label), size, rng).save(path)
        lines.append((f"shapes{classes}/{path.name}", f"c{given[i]}", f"c{label}", split[i]))
    return StudySet(write(out, lines), out.parent, {"image_size": size})


def noisy(
    truth: np.ndarray,
    num_classes: int,
    noise: str,
    rng: np.random.Generator,
    mapping: Mapping[int, int] | None = None,
) -> np.ndarray:
    """Return labels [N] with the noise that the name says: clean, symN or asymN.

    Asymmetric noise follows `mapping`; without one each class turns into the next.
    """
    if noise == "clean":
        return truth
    rate = int(noise.lstrip("asym")) / 100
    if noise.startswith("sym"):
        return symmetric(truth, num_classes, rate, rng)
    if mapping is None:
        mapping = {i: (i + 1) % num_classes for i in range(num_classes)}
    return asymmetric(truth, mapping, rate, rng)


def confusions(classes: Sequence[str]) -> dict[int, int]:
    """Return the asymmetric noise of CIFAR-10 in ids of `classes`, as far as they are there."""
    pairs = [(a, b) for a, b in ASYMMETRIC.items() if a in classes and b in classes]
    return {classes.index(a): classes.index(b) for a, b in pairs}


def balanced(labels: Sequence[str], images: int, rng: np.random.Generator) -> list[int]:
    """Return places of `images` labels, equally many of each, ascending."""
    names = sorted(set(labels))
    chosen: list[int] = []
    for name in names:
        rows = [i for i, label in enumerate(labels) if label == name]
        chosen += rng.permutation(rows)[: images // len(names)].tolist()
    return sorted(chosen)


def _shape(label: int, size: int, rng: np.random.Generator) -> Image.Image:
    back = tuple(int(v) for v in rng.integers(150, 256, 3))
    image = Image.new("RGB", (size, size), back)
    draw = ImageDraw.Draw(image)
    radius = rng.uniform(0.2, 0.38) * size
    x, y = rng.uniform(radius, size - radius, 2)
    hue = (label // 4 * 67 + int(rng.integers(-12, 13))) % 360
    colour = f"hsl({hue}, {int(rng.integers(60, 100))}%, {int(rng.integers(25, 45))}%)"
    box = (x - radius, y - radius, x + radius, y + radius)
    if label % 4 == 0:
        draw.ellipse(box, fill=colour)
    else:
        sides = {1: 3, 2: 4, 3: 6}[label % 4]
        draw.regular_polygon((x, y, radius), sides, int(rng.integers(0, 360)), fill=colour)
    noise = rng.normal(0, 12, (size, size, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def write(out: Path, lines: list[tuple[str, str, str, str]]) -> Path:
    """Write lines of path, label, true label and split."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "label", "true_label", "split"))
        writer.writerows(lines)
    return out
