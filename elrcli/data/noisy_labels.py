"""Label noise as a user asks for it: its kind, and what it does to the labels of a manifest."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from elrcli.data import noise
from elrcli.data.images import ImageProblem, read_image
from elrcli.data.manifest import Manifest
from elrcli.errors import ConfigError, DataError, UsageError, legible, unknown_name

NOISE_KINDS = ("symmetric", "asymmetric", "pair", "matrix", "instance")
FEATURE_SIDE = 16  # instance-dependent noise looks at grey pictures of this size


@dataclass(frozen=True)
class Noise:
    """A kind of noise with what belongs to it.

    `rate` (0..1) belongs to all kinds but "matrix", whose file holds K lines of K numbers,
    P(given | true), classes in natural order. `mapping` belongs to "asymmetric". Raises ConfigError
    for a bad value, UsageError for what is missing and what would be ignored.
    """

    kind: str = "symmetric"
    rate: float | None = None
    mapping: Mapping[str, str] = field(default_factory=dict)
    matrix: Path | None = None

    def __post_init__(self) -> None:
        if self.kind not in NOISE_KINDS:
            raise ConfigError(f"--kind {self.kind}: choose one of {', '.join(NOISE_KINDS)}.")
        for option, is_given, kinds in (
            ("--rate", self.rate is not None, set(NOISE_KINDS) - {"matrix"}),
            ("--map", bool(self.mapping), {"asymmetric"}),
            ("--matrix", self.matrix is not None, {"matrix"}),
        ):
            if self.kind in kinds and not is_given:
                raise UsageError(f"--kind {self.kind} needs {option}.")
            if self.kind not in kinds and is_given:
                raise UsageError(f"--kind {self.kind} does not use {option}. Leave it out.")
        if self.rate is not None and not 0.0 <= self.rate <= 1.0:
            raise ConfigError(f"--rate {self.rate}: must lie between 0 and 1.")

    def labels_of(
        self,
        clean: Manifest,
        rows: np.ndarray,
        seed: int,
        *,
        note: Callable[[str], None],
        progress: Callable[[int, int], None],
    ) -> np.ndarray:
        """Return noisy labels of the manifest rows `rows` [M], int32 [M].

        `note` is told of images that cannot be read, `progress` how many of M pictures are seen.
        Raises ConfigError, DataError where the noise does not fit the classes.
        """
        labels, num_classes = clean.labels[rows], clean.num_classes
        rate, rng = self.rate or 0.0, np.random.default_rng(seed)
        if self.kind == "symmetric":
            return noise.symmetric(labels, num_classes, rate, rng)
        if self.kind == "asymmetric":
            return noise.asymmetric(labels, _class_ids(self.mapping, clean.classes), rate, rng)
        if self.kind == "pair":
            return noise.pair(labels, num_classes, rate, rng)
        if self.matrix is not None:
            return noise.from_matrix(labels, _read_matrix(self.matrix, clean.classes), rng)
        features = _small_pictures(clean, rows, note, progress)
        return noise.instance_dependent(labels, features, num_classes, rate, rng)


def _class_ids(mapping: Mapping[str, str], classes: Sequence[str]) -> dict[int, int]:
    unknown = sorted({*mapping, *mapping.values()} - set(classes))
    if unknown:
        raise ConfigError(f"--map: {unknown_name('class', unknown[0], classes)}")
    return {classes.index(source): classes.index(target) for source, target in mapping.items()}


def _read_matrix(path: Path, classes: Sequence[str]) -> np.ndarray:
    """Read K lines of K numbers, P(given | true), each line summing to 1."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [(number, cells) for number, cells in enumerate(csv.reader(file), 1) if cells]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error}).") from None
    matrix = []
    for number, cells in lines:
        try:
            row = [float(cell) for cell in cells]
        except ValueError:
            raise DataError(f"{path}:{number}: not numbers. Write {len(classes)} a line.") from None
        is_distribution = min(row) >= 0 and abs(sum(row) - 1) <= 1e-6  # neither holds for NaN
        if len(row) != len(classes) or not is_distribution:
            raise DataError(
                f"{path}:{number}: expected {len(classes)} probabilities that sum to 1,"
                f" found {len(row)} numbers that sum to {sum(row):g}."
            )
        matrix.append(row)
    if len(matrix) != len(classes):
        raise DataError(f"{path}: {len(matrix)} lines for {len(classes)} classes.")
    return np.array(matrix)


def _small_pictures(
    manifest: Manifest,
    rows: np.ndarray,
    note: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> np.ndarray:
    """Return grey pictures as standardised features, float32 [M, FEATURE_SIDE ** 2].

    An image that cannot be read counts as an average one; training leaves it out anyway.
    """
    side = FEATURE_SIDE
    pictures = np.full((len(rows), side * side), np.nan, dtype=np.float32)
    for place, row in enumerate(rows.tolist()):
        try:
            pixels = read_image(manifest.file(row), side)
        except ImageProblem as problem:
            note(f"{legible(manifest.paths[row])}: {problem}")
        else:
            picture = Image.fromarray(pixels).convert("L").resize((side, side))
            pictures[place] = np.asarray(picture, dtype=np.float32).ravel()
        progress(place + 1, len(rows))
    read = pictures[~np.isnan(pictures[:, 0])]
    if len(read) == 0:
        raise DataError(f"{manifest.root}: no image can be read.")
    centred = (pictures - read.mean(axis=0)) / (read.std(axis=0) + 1e-6)
    return np.asarray(np.nan_to_num(centred, nan=0.0))
