"""Which images there are, their labels and splits: folder or CSV -> `Manifest`.

Row *i* of the manifest is sample *i* everywhere; rows are sorted by path once and never
renumbered. Nothing here opens an image.
"""

from __future__ import annotations

import csv
import io
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import overload

import numpy as np

from elrcli.config import Reading, TrainConfig, option_name
from elrcli.data.csv_files import read_csv
from elrcli.data.folders import is_image_name, scan_folder
from elrcli.data.rows import SPLIT_CODES, SPLITS, Rows, is_inside
from elrcli.errors import SHOWN, ConfigError, DataError, is_text, legible, listed, unknown_name
from elrcli.files import write_csv_rows

NO_CLASS = -1  # a true label that names none of the classes: the given one is wrong
FOREIGN_TRUTH = "name a class that no label has: counted as wrong"  # after their number


class StringTable(Sequence[str]):
    """Many strings as one byte array with offsets.

    Reading it does not touch reference counts, so worker processes share its memory pages.
    Bytes that are not UTF-8 (in file names) survive through `surrogateescape`.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        joined = bytearray()
        offsets = array("q", [0])
        for string in strings:
            joined += string.encode("utf-8", "surrogateescape")
            offsets.append(len(joined))
        self._offsets = np.frombuffer(offsets, dtype=np.int64)
        self._bytes = np.frombuffer(joined, dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = int(index)
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        i %= len(self)
        start, end = self._offsets[i], self._offsets[i + 1]
        return self._bytes[start:end].tobytes().decode("utf-8", "surrogateescape")


@dataclass(frozen=True, eq=False)
class Manifest:
    """N labelled images. `labels`, `splits` and `truth` are parallel to `paths`."""

    root: Path  # absolute; paths are relative to it
    paths: StringTable  # [N] forward slashes, sorted by code point
    labels: np.ndarray  # [N] int32 ids of the given labels
    splits: np.ndarray  # [N] int8 codes, indices into SPLITS
    classes: tuple[str, ...]
    truth: np.ndarray | None = None  # [N] int32 true ids or NO_CLASS, only for reports

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def has_val(self) -> bool:
        """Whether there are samples of the split val."""
        return bool((self.splits == SPLIT_CODES["val"]).any())

    def rows(self, split: str) -> np.ndarray:
        """Return the rows of one split, ascending, int64."""
        return np.flatnonzero(self.splits == SPLITS.index(split)).astype(np.int64)

    def file(self, row: int) -> Path:
        """Return where the image of a row is."""
        return self.root / self.paths[row]


def check_exists(data: Path) -> None:
    """Raise DataError where there is nothing at `data`."""
    if not data.exists():
        raise DataError(f"{data}: no such file or folder. Check the path.")


def load_data(
    data: Path,
    reading: Reading = Reading(),
    *,
    truth_column: str | None = None,
    classes: Sequence[str] | None = None,
    check_files: bool = True,
) -> Manifest:
    """Read a folder of class folders, a folder with `train/` and `val/`, or a CSV file.

    `classes` fixes the class list and its order; a label outside it is an error. So is a link that
    leads out of the data root, unless `reading` follows links, and a file in a CSV that does not
    exist, if `check_files`.
    """
    data = Path(data)
    check_exists(data)
    if is_image_name(data.name) and not data.is_dir():
        raise DataError(
            f"{data}: an image. Name the folder that holds the class folders, or a CSV file."
        )
    if data.is_dir():
        csv_only = {**asdict(reading), "truth_column": truth_column}
        del csv_only["follow_links"]
        given = [name for name, value in csv_only.items() if value != getattr(TrainConfig, name)]
        if given:
            option = option_name(given[0])
            raise DataError(f"{data} is a folder, but {option} needs a CSV file. Leave it out.")
        root, rows = data, scan_folder(data, reading.follow_links)
        order = rows.order()
    else:
        root = reading.root or data.parent
        known = None if classes is None else dict.fromkeys(classes)
        rows, order = read_csv(data, root, reading, truth_column, known, check_files)
    manifest = _build(Path(os.path.abspath(root)), rows, order, classes, data)
    if manifest.num_classes < 2 and classes is None:
        raise DataError(
            f"{data}: only one class, '{legible(manifest.classes[0])}'. A classifier needs at least"
            " two."
        )
    return manifest


def _build(
    root: Path, rows: Rows, order: np.ndarray, classes: Sequence[str] | None, data: Path
) -> Manifest:
    """Take the rows in `order`, by path, and turn names into class ids."""
    present = set(rows.labels)
    for name in present.union(rows.truths):
        if not is_text(name):
            raise DataError(f"{data}: class '{legible(name)}' is not UTF-8 text. Rename it.")
    if classes is None:
        classes = sorted(present, key=natural_key)
    unknown = sorted(present - set(classes), key=natural_key)
    if unknown:
        problems = [f"{data}: {unknown_name('class', name, classes)}" for name in unknown[:SHOWN]]
        raise DataError(listed(problems, len(unknown)))
    class_ids = {name: i for i, name in enumerate(classes)}

    def ids(names: list[str]) -> np.ndarray:
        found = (class_ids.get(names[i], NO_CLASS) for i in order)
        return np.fromiter(found, np.int32, count=len(order))

    return Manifest(
        root=root,
        paths=StringTable(rows.paths[i] for i in order),
        labels=ids(rows.labels),
        splits=np.array(rows.splits, dtype=np.int8)[order],
        classes=tuple(classes),
        truth=ids(rows.truths) if rows.truths else None,
    )


def draw_validation(manifest: Manifest, fraction: float, seed: int) -> Manifest:
    """Move a stratified `fraction` of the train rows to `val`; every class keeps one in train.

    Returns the manifest itself if it has val rows already or `fraction` is 0. In which order rows
    of a class are drawn depends on the seed and that class alone, how many on all classes.
    """
    if not 0.0 <= fraction < 1.0:
        raise ConfigError(f"--val-fraction {fraction}: must be at least 0 and below 1.")
    if manifest.has_val or fraction == 0.0:
        return manifest
    train = manifest.rows("train")
    counts = np.bincount(manifest.labels[train], minlength=manifest.num_classes)
    taken = _apportion(counts, fraction, seed)
    splits = manifest.splits.copy()
    by_class = train[np.argsort(manifest.labels[train], kind="stable")]
    ends = np.cumsum(counts)[:-1]
    for label, (rows, count) in enumerate(zip(np.split(by_class, ends), taken, strict=True)):
        drawn = np.random.default_rng([seed, label]).permutation(rows)[:count]
        splits[drawn] = SPLIT_CODES["val"]
    return replace(manifest, splits=splits)


def _apportion(counts: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Return how many of each class to draw, [K]: largest remainders, one in all if one can go."""
    total = max(1, round(fraction * int(counts.sum())))
    exact = counts * fraction
    taken: np.ndarray = np.minimum(np.floor(exact), np.maximum(counts - 1, 0)).astype(np.int64)
    tie_break = np.random.default_rng(seed).random(len(counts))
    for label in np.lexsort((tie_break, -(exact - np.floor(exact)))):
        if taken.sum() >= total:
            break
        if counts[label] - taken[label] > 1:
            taken[label] += 1
    return taken


def manifest_text(manifest: Manifest) -> str:
    """Return `manifest.csv` as text; write it as UTF-8 with errors="surrogateescape"."""

    def rows() -> Iterator[list[str]]:
        yield ["path", "label", "split", *([] if manifest.truth is None else ["true_label"])]
        for row, path in enumerate(manifest.paths):
            cells = [path, manifest.classes[manifest.labels[row]], SPLITS[manifest.splits[row]]]
            if manifest.truth is not None:
                true_label = manifest.truth[row]
                cells.append("" if true_label == NO_CLASS else manifest.classes[true_label])
            yield cells

    buffer = io.StringIO(newline="")
    write_csv_rows(buffer, rows())
    return buffer.getvalue()


def read_manifest(csv_path: Path, root: Path, classes: Sequence[str]) -> Manifest:
    """Read back what `manifest_text` gave: same rows, same order, no look at the images."""
    class_ids = {name: i for i, name in enumerate(classes)}
    labels, splits, truth = array("i"), array("b"), array("i")

    def paths(rows: Iterator[list[str]], has_truth: bool) -> Iterator[str]:
        last = ""
        for path, label, split, *true_label in rows:
            if not is_inside(path) or path <= last or len(true_label) != has_truth:
                raise ValueError(f"path {path!r}")
            last = path
            labels.append(class_ids[label])
            splits.append(SPLITS.index(split))
            truth.extend(class_ids[name] if name else NO_CLASS for name in true_label)
            yield path

    try:
        if not csv_path.is_file() and csv_path.exists() and not csv_path.is_dir():
            raise ValueError("not a regular file")  # opening a pipe might wait for ever
        with open(csv_path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader)
            if header not in (["path", "label", "split"], ["path", "label", "split", "true_label"]):
                raise ValueError(f"columns {header}")
            table = StringTable(paths(reader, len(header) == 4))
    except FileNotFoundError as error:
        raise DataError(f"{csv_path}: no such file. The run folder is incomplete.") from error
    except (ValueError, KeyError, StopIteration, csv.Error) as error:
        raise DataError(
            f"{csv_path}: damaged ({error}). Restore the run folder or train again."
        ) from error
    return Manifest(
        root=Path(os.path.abspath(root)),
        paths=table,
        labels=np.array(labels, dtype=np.int32),
        splits=np.array(splits, dtype=np.int8),
        classes=tuple(classes),
        truth=np.array(truth, dtype=np.int32) if len(header) == 4 else None,
    )


def natural_key(name: str) -> tuple[list[str | tuple[int, str]], str]:
    """Sort key that puts '2' before '10'; odd parts are digits, so keys always compare."""
    parts: list[str | tuple[int, str]] = list(re.split(r"([0-9]+)", name))
    for i in range(1, len(parts), 2):
        digits = str(parts[i]).lstrip("0")
        parts[i] = (len(digits), digits)
    return parts, name
