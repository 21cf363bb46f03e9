"""Which images there are, their labels and splits: folder or CSV -> `Manifest`.

Row *i* of the manifest is sample *i* everywhere; rows are sorted by path once and never
renumbered. Nothing here opens an image.
"""

from __future__ import annotations

import csv
import difflib
import io
import os
import re
import stat
import sys
import unicodedata
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TextIO, overload

import numpy as np

from elrcli.data.images import IMAGE_SUFFIXES
from elrcli.errors import ConfigError, DataError, is_text, legible

SPLITS = ("train", "val", "test")
SPLIT_CODES = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "test": 2}
DELIMITERS = ",;\t"
SHOWN = 5  # bad rows, missing files, loose names that one message lists
MOST_PROBLEMS = 1000  # bad rows after which a file is not read on
LONGEST_HEADER = 1 << 20  # characters


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
    truth: np.ndarray | None = None  # [N] int32 ids of the true labels, only for reports

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def has_val(self) -> bool:
        return bool((self.splits == SPLIT_CODES["val"]).any())

    def rows(self, split: str) -> np.ndarray:
        """Return the rows of one split, ascending, int64."""
        return np.flatnonzero(self.splits == SPLITS.index(split)).astype(np.int64)

    def file(self, row: int) -> Path:
        return self.root / self.paths[row]


def check_exists(data: Path) -> None:
    """Raise DataError where there is nothing at `data`."""
    if not data.exists():
        raise DataError(f"{data}: no such file or folder. Check the path.")


def load_data(
    data: Path,
    *,
    root: Path | None = None,
    path_column: str = "path",
    label_column: str = "label",
    split_column: str | None = "split",
    truth_column: str | None = None,
    classes: Sequence[str] | None = None,
    follow_links: bool = False,
    check_files: bool = True,
) -> Manifest:
    """Read a folder of class folders, a folder with `train/` and `val/`, or a CSV file.

    `classes` fixes the class list and its order; a label outside it is an error. So is a link that
    leads out of the data root, unless `follow_links`, and a file in a CSV that does not exist, if
    `check_files`. Without `split_column` no splits are read from a CSV.
    """
    data = Path(data)
    check_exists(data)
    if is_image_name(data.name) and not data.is_dir():
        raise DataError(
            f"{data}: an image. Name the folder that holds the class folders, or a CSV file."
        )
    if data.is_dir():
        csv_only = {
            "--root": root is not None,
            "--path-column": path_column != "path",
            "--label-column": label_column != "label",
            "--split-column": split_column != "split",
            "--truth-column": truth_column is not None,
        }
        given = [option for option, is_set in csv_only.items() if is_set]
        if given:
            raise DataError(f"{data} is a folder, but {given[0]} needs a CSV file. Leave it out.")
        manifest = _scan_folder(data, classes, follow_links)
    else:
        manifest = _read_csv(
            data,
            root,
            path_column,
            label_column,
            split_column,
            truth_column,
            classes,
            follow_links,
            check_files,
        )
    if manifest.num_classes < 2 and classes is None:
        raise DataError(
            f"{data}: only one class, '{manifest.classes[0]}'. A classifier needs at least two."
        )
    return manifest


def draw_validation(manifest: Manifest, fraction: float, seed: int) -> Manifest:
    """Move a stratified `fraction` of the train rows to `val`; every class keeps one in train.

    Returns the manifest itself if it has val rows already or `fraction` is 0. Which rows of a
    class are drawn depends on the seed and that class alone.
    """
    if not 0.0 <= fraction < 1.0:
        raise ConfigError(f"--val-fraction {fraction}: must be at least 0 and below 1.")
    if manifest.has_val or fraction == 0.0:
        return manifest
    train = manifest.rows("train")
    counts = np.bincount(manifest.labels[train], minlength=manifest.num_classes)
    taken = _apportion(counts, fraction, seed)
    splits = manifest.splits.copy()
    for label, count in enumerate(taken):
        rows = train[manifest.labels[train] == label]
        drawn = np.random.default_rng([seed, label]).permutation(rows)[:count]
        splits[drawn] = SPLIT_CODES["val"]
    return replace(manifest, splits=splits)


def _apportion(counts: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Return how many of each class to draw, [K]: largest remainders, at least one in all."""
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
                cells.append(manifest.classes[manifest.truth[row]])
            yield cells

    buffer = io.StringIO(newline="")
    write_csv_rows(buffer, rows())
    return buffer.getvalue()


def write_csv_rows(file: TextIO, rows: Iterable[Sequence[object]]) -> None:
    """Write rows as lines of CSV; None becomes an empty cell."""
    plain = csv.writer(file, lineterminator="\n")
    quoted = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
    for cells in rows:
        # The csv module leaves a lone carriage return unquoted, and then splits the row there.
        (quoted if any("\r" in str(cell) for cell in cells) else plain).writerow(cells)


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
            truth.extend(class_ids[name] for name in true_label)
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


def is_inside(path: str) -> bool:
    """Tell whether a path with forward slashes stays below the folder that it starts from."""
    if os.sep != "/":
        path = path.replace(os.sep, "/")
    has_drive = bool(os.path.splitdrive(path)[0])
    return not has_drive and {"", ".", ".."}.isdisjoint(path.split("/"))


def natural_key(name: str) -> tuple[list[str | tuple[int, str]], str]:
    """Sort key that puts '2' before '10'; odd parts are digits, so keys always compare."""
    parts: list[str | tuple[int, str]] = list(re.split(r"([0-9]+)", name))
    for i in range(1, len(parts), 2):
        digits = str(parts[i]).lstrip("0")
        parts[i] = (len(digits), digits)
    return parts, name


# --- folders ---


def _scan_folder(folder: Path, classes: Sequence[str] | None, follow_links: bool) -> Manifest:
    root = os.path.abspath(folder)
    within = None if follow_links else root
    split_folders = _split_folders(root, folder)
    paths: list[str] = []
    names: list[str] = []
    splits: list[int] = []
    for prefix, code in split_folders or [("", 0)]:
        top = os.path.join(root, prefix) if prefix else root
        before = len(paths)
        for class_folder in _subfolders(top):
            start = f"{prefix}/{class_folder}/" if prefix else f"{class_folder}/"
            place = os.path.join(top, class_folder)
            found = list(image_paths(place, start, outside=top, within=within))
            if found and not class_folder.strip():
                raise DataError(
                    f"{top}: a class folder without a name, '{class_folder}'. Rename it."
                )
            paths += found
            names += [class_folder.strip()] * len(found)
        if len(paths) == before:
            raise DataError(_nothing_found(top))
        splits += [code] * (len(paths) - before)
    rows = _Rows(paths, names, array("b", splits))
    return _build(root, rows, _order(paths), classes, str(folder))


def _split_folders(root: str, folder: Path) -> list[tuple[str, int]]:
    """Return (sub-folder, split code) if the folder holds splits, else nothing."""
    subfolders = _subfolders(root)
    split_names = [name for name in subfolders if name.lower() in SPLIT_CODES]
    found = [(name, SPLIT_CODES[name.lower()]) for name in split_names]
    codes = [code for _, code in found]
    if 0 not in codes:
        return []
    if len(found) < 2 and len(subfolders) > 1:
        _refuse_doubtful_split(folder, split_names[0], subfolders)
        return []
    if len(set(codes)) < len(codes):
        raise DataError(
            f"{folder}: more than one folder for the same split"
            f" ({', '.join(split_names)}). Keep one of them."
        )
    return found


def _refuse_doubtful_split(folder: Path, name: str, subfolders: list[str]) -> None:
    """Raise DataError if a folder named as a split, beside others, holds only class folders."""
    inside = folder / name
    if len(_subfolders(str(inside))) < 2 or any(is_image_name(n) for n in os.listdir(inside)):
        return  # images of a class that is called so
    others = legible(", ".join(other for other in subfolders if other != name))
    raise DataError(
        f"{inside}: holds class folders, but beside it are others than val and test ({others})."
        f" Train on {inside}, or, if '{name}' is a class, rename it."
    )


def _subfolders(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if _is_folder(e) and not e.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}).") from error


def image_paths(
    folder: str, prefix: str = "", outside: str | None = None, within: str | None = None
) -> Iterator[str]:
    """Yield `prefix` + path of every image below `folder`.

    Links are followed, but no folder is searched twice, and `outside` not at all. So loops end,
    and so do folders that link to each other in ever more ways. A link that leads out of the
    folder `within` raises DataError when all is searched.
    """
    leading_out = [folder] if within is not None and leads_out(folder, within) else []
    seen = set() if outside is None else {_identity(outside)}
    folders, links = [] if leading_out else [(folder, prefix)], list[tuple[str, str]]()
    while folders or links:
        if not folders:  # real folders first, so that no link takes the place of what it leads to
            links.sort(reverse=True)
            folders.append(links.pop())
        folder, prefix = folders.pop()
        here = _identity(folder)
        if here in seen:
            continue
        seen.add(here)
        try:
            entries = os.scandir(folder)
        except OSError as error:
            raise DataError(f"{folder}: cannot be listed ({error.strerror}).") from error
        with entries:
            for entry in entries:
                name = entry.name
                if name.startswith("."):
                    continue
                is_folder = _is_folder(entry)
                if not is_folder and not is_image_name(name):
                    continue
                if within is not None and entry.is_symlink() and leads_out(entry.path, within):
                    leading_out.append(entry.path)
                elif is_folder:
                    found = links if entry.is_symlink() else folders
                    found.append((entry.path, f"{prefix}{name}/"))
                else:
                    yield prefix + name
    if within is not None and leading_out:
        raise DataError(_links_refused(leading_out, within))


def leads_out(path: str, folder: str) -> bool:
    """Tell whether a path leads, through links, to something that is not below `folder`."""
    if not os.path.exists(path):
        return False
    real, top = os.path.realpath(path), os.path.realpath(folder)
    return real != top and not real.startswith(os.path.join(top, ""))


def _links_refused(links: Sequence[str], root: str) -> str:
    places = [f"{legible(link)}: a link to {legible(os.path.realpath(link))}" for link in links]
    return (
        f"{root}: {len(links)} links lead out of it. If you trust them, add --follow-links.\n"
        + listed(places)
    )


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in a circle
        return False


def is_image_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _identity(folder: str) -> tuple[int, int]:
    try:
        info = os.stat(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}).") from error
    return info.st_dev, info.st_ino


def _nothing_found(folder: str) -> str:
    """Say what a folder without labelled images has instead."""
    layout = "Put images into one sub-folder per class, or list them in a CSV file (path,label)."
    if not _has_image(folder):
        return f"{folder}: no images found. {layout}"
    parent = os.path.dirname(os.path.abspath(folder))
    try:
        beside = [name for name in _subfolders(parent) if _has_image(os.path.join(parent, name))]
    except DataError:  # of a folder that nobody asked about
        beside = []
    if len(beside) > 1:  # it is one of the classes
        layout = f"Did you mean {parent}, which holds class folders?"
    return f"{folder}: images but no class sub-folders with images. {layout}"


def _has_image(folder: str) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(is_image_name(entry.name) and not _is_folder(entry) for entry in entries)
    except OSError:
        return False


# --- CSV files ---


@dataclass
class _Rows:
    """What the data lists, as lists and arrays: ten million rows fit into memory."""

    paths: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)  # one string for each class
    splits: array[int] = field(default_factory=lambda: array("b"))  # codes
    truths: list[str] = field(default_factory=list)  # empty without true labels
    lines: array[int] = field(default_factory=lambda: array("I"))  # of a CSV file

    def add(self, path: str, label: str, split: int, truth: str | None, line: int) -> None:
        self.paths.append(path)
        self.labels.append(sys.intern(label))
        self.splits.append(split)
        if truth is not None:
            self.truths.append(sys.intern(truth))
        self.lines.append(line)

    def distinct(self) -> tuple[np.ndarray, dict[int, str]]:
        """Return the rows with a path that no row before has, sorted by path, and conflicts.

        A conflict is what a later row of the same path says otherwise, by line.
        """
        order = _order(self.paths)
        conflicts = {}
        is_first = np.ones(len(order), dtype=bool)
        first = 0
        for place, row in enumerate(map(int, order)):
            if place > 0 and self.paths[row] == self.paths[first]:
                is_first[place] = False
                if problem := self._conflict(first, row):
                    conflicts[self.lines[row]] = problem
            else:
                first = row
        return order[is_first], conflicts

    def _conflict(self, first: int, row: int) -> str | None:
        splits = [SPLITS[code] for code in (self.splits[first], self.splits[row])]
        for what, one, other in (
            ("label", self.labels[first], self.labels[row]),
            ("split", *splits),
            ("true label", *((self.truths[first], self.truths[row]) if self.truths else ("", ""))),
        ):
            if one != other:
                return (
                    f"'{legible(self.paths[row])}' has {what} '{legible(one)}' on line"
                    f" {self.lines[first]} and '{legible(other)}' here. Keep one of the two lines."
                )
        return None


def _read_csv(
    csv_path: Path,
    root: Path | None,
    path_column: str,
    label_column: str,
    split_column: str | None,
    truth_column: str | None,
    classes: Sequence[str] | None,
    follow_links: bool,
    check_files: bool,
) -> Manifest:
    base = os.path.abspath(csv_path.parent if root is None else root)
    if not os.path.isdir(base):
        raise DataError(f"{base}: no such folder. Check --root.")
    lines = csv_rows(csv_path, path_column)
    header = [name.strip() for name in next(lines)[1]]

    def column(name: str | None, option: str) -> int | None:
        return None if name is None else csv_column(csv_path, header, name, option)

    if split_column == "split" and split_column not in header:
        split_column = None
    reader = _RowReader(
        header=header,
        path_at=csv_column(csv_path, header, path_column, "--path-column"),
        label_at=csv_column(csv_path, header, label_column, "--label-column"),
        split_at=column(split_column, "--split-column"),
        truth_at=column(truth_column, "--truth-column"),
        bases=(base, os.path.realpath(base)),
        known=None if classes is None else frozenset(classes),
    )
    rows = _Rows()
    bad: dict[int, str] = {}  # by line
    for line, cells in lines:
        if len(bad) == MOST_PROBLEMS:
            break
        try:
            rows.add(*reader.read(cells), line)
        except ValueError as problem:
            bad[line] = str(problem)

    kept, conflicts = rows.distinct()
    bad |= conflicts
    missing: list[int] = []
    if check_files:
        missing = [int(i) for i in kept if not os.path.exists(f"{base}/{rows.paths[i]}")]
    _refuse_problems(csv_path, base, rows, kept, bad, missing)
    leading_out = [] if follow_links else _links_out(base, (rows.paths[row] for row in kept))
    if leading_out:
        raise DataError(_links_refused(leading_out, base))
    return _build(base, rows, kept, classes, str(csv_path))


@dataclass(frozen=True)
class _RowReader:
    """What the cells of a CSV file mean: the places of its columns, the root, the classes."""

    header: Sequence[str]
    path_at: int
    label_at: int
    split_at: int | None
    truth_at: int | None
    bases: tuple[str, str]  # the data root, as given and without links
    known: Collection[str] | None  # classes, None for any

    def read(self, cells: Sequence[str]) -> tuple[str, str, int, str | None]:
        """Return path, label, split code and true label; ValueError says what is wrong."""
        if len(cells) > len(self.header):
            raise ValueError(f"{len(cells)} cells, but the header has {len(self.header)}")
        if not cells[self.path_at].strip():
            raise ValueError("no path. Fill it in, or delete the row.")
        path = _relative(cells[self.path_at], self.bases)
        if path is None:
            given = legible(cells[self.path_at])
            raise ValueError(f"'{given}' lies outside {self.bases[0]}. Set --root.")
        label = cells[self.label_at].strip()
        if not label:
            raise ValueError("no label. Fill it in, or delete the row.")
        truth = None
        if self.truth_at is not None:
            truth = cells[self.truth_at].strip()
            if not truth:
                raise ValueError(f"no true label in column '{self.header[self.truth_at]}'")
        for name in (label, label if truth is None else truth):
            if not is_text(name):
                raise ValueError(
                    f"'{legible(name)}' is not UTF-8 text. Save the file as CSV (UTF-8)."
                )
            if self.known is not None and name not in self.known:
                raise ValueError(_unknown("class", name, self.known))
        split_name = "" if self.split_at is None else cells[self.split_at].strip()
        split = SPLIT_CODES.get(split_name.lower() or "train")
        if split is None:
            raise ValueError(_unknown("split", split_name, SPLITS))
        return path, label, split, truth


def _refuse_problems(
    csv_path: Path,
    base: str,
    rows: _Rows,
    kept: np.ndarray,
    bad: dict[int, str],
    missing: Sequence[int],
) -> None:
    """Raise DataError about `bad` lines, or where there are no rows or no files of some rows."""
    if bad:
        gone = {rows.lines[row]: f"no such file: {legible(rows.paths[row])}" for row in missing}
        problems = gone | bad
        raise DataError(
            listed([f"{csv_path}:{line}: {problems[line]}" for line in sorted(problems)])
        )
    if len(kept) == 0:
        raise DataError(f"{csv_path}: no rows below the header. Add one row per image.")
    if missing:
        places = [
            f"{csv_path}:{rows.lines[row]}: no such file: {legible(rows.paths[row])}"
            + _near_file(base, rows.paths[row])
            for row in sorted(missing)[:SHOWN]
        ]
        raise DataError(
            f"{csv_path}: {len(missing)} of {len(kept)} files do not exist under {base}."
            " Set --root to the folder that the paths start from.\n" + listed(places, len(missing))
        )


def _links_out(base: str, paths: Iterable[str]) -> list[str]:
    """Return those of many paths below `base` that are links, or lie in links, out of it."""
    folder_leads_out: dict[str, bool] = {}
    found = []
    for path in paths:
        file = f"{base}/{path}"
        folder = os.path.dirname(file)
        if folder not in folder_leads_out:
            folder_leads_out[folder] = leads_out(folder, base)
        if folder_leads_out[folder] or (os.path.islink(file) and leads_out(file, base)):
            found.append(file)
    return found


def csv_rows(csv_path: Path, path_column: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (first line number, cells) of every row, the header first.

    Rows of blank cells are left out; short ones are filled up to the header.
    """
    try:
        is_file = stat.S_ISREG(os.stat(csv_path).st_mode)  # opening a pipe might wait for ever
        if not is_file:
            raise DataError(f"{csv_path}: not a regular file. Save the rows as a CSV file.")
        file = open(csv_path, encoding="utf-8-sig", errors="surrogateescape", newline="")  # noqa: SIM115
    except OSError as error:
        raise DataError(
            f"{csv_path}: cannot be read ({error.strerror}). Check the path."
        ) from error
    with file:
        first = file.readline(LONGEST_HEADER)
        if not first.strip():
            raise DataError(f"{csv_path}: no header line. Start with a line such as path,label.")
        if "\0" in first or len(first) == LONGEST_HEADER:
            raise DataError(f"{csv_path}: not a text file in UTF-8. Save it as CSV (UTF-8).")
        file.seek(0)
        line = 1
        try:
            reader = csv.reader(file, delimiter=_delimiter(first, path_column), strict=True)
            width = 0
            for cells in reader:
                if width == 0 or any(cell.strip() for cell in cells):
                    yield line, cells + [""] * (width - len(cells))
                width = width or len(cells)
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{csv_path}:{line}: not valid CSV: {error}.") from error


def _delimiter(header: str, path_column: str) -> str:
    """Return the delimiter under which the header has the path column, else most columns."""

    def quality(delimiter: str) -> tuple[bool, int]:
        names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter))]
        return path_column in names, len(names)

    return max(DELIMITERS, key=quality)


def csv_column(csv_path: Path, header: list[str], name: str, option: str) -> int:
    if header.count(name) > 1:
        raise DataError(f"{csv_path}:1: column '{name}' is there twice. Rename one of them.")
    if name in header:
        return header.index(name)
    raise DataError(
        f"{csv_path}:1: no column '{name}'; there are: {column_names(header)}."
        f"{did_you_mean(name, header)} Name it with {option}."
    )


def column_names(header: Sequence[str]) -> str:
    """Return the columns of a file for a message."""
    return legible(", ".join(header))


def _relative(path: str, bases: Iterable[str]) -> str | None:
    """Return a path relative to the data root, with forward slashes; None if it leaves it."""
    path = os.path.normpath(path)
    if os.path.isabs(path):
        for base in bases:
            if path.startswith(os.path.join(base, "")):
                return path[len(os.path.join(base, "")) :].replace(os.sep, "/")
        return None
    path = path.replace(os.sep, "/")
    return path if is_inside(path) else None


def _near_file(base: str, path: str) -> str:
    """Return a hint at a file whose name only looks different to the computer, or nothing."""
    if os.path.exists(f"{base}/{path.replace(chr(92), '/')}"):
        return " Write paths with forward slashes."
    folder, _, name = path.rpartition("/")
    try:
        for other in os.listdir(os.path.join(base, folder)):
            if unicodedata.normalize("NFC", other) == unicodedata.normalize("NFC", name):
                return " Its name is there in another Unicode form: list the folder to get it."
            if other.casefold() == name.casefold():
                return f" Did you mean '{legible(other)}'?"
    except (OSError, ValueError):
        pass
    return ""


def _unknown(kind: str, name: str, known: Iterable[str]) -> str:
    known = list(known)
    hint = did_you_mean(name, known) or f" Known: {legible(', '.join(sorted(known)[:SHOWN]))}."
    return f"unknown {kind} '{legible(name)}'.{hint}"


def did_you_mean(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name[:200], known[:2000], n=1)
    return f" Did you mean '{legible(close[0])}'?" if close else ""


def listed(problems: Sequence[str], count: int | None = None, shown: int = SHOWN) -> str:
    """Return the first problems, one a line, and how many there are beyond, of `count` in all."""
    is_cut = count is None and len(problems) >= MOST_PROBLEMS
    more = (len(problems) if count is None else count) - shown
    if more <= 0:
        return "\n".join(problems)
    at_least = "at least " if is_cut else ""
    return "\n".join([*problems[:shown], f"and {at_least}{more} more"])


# --- both ---


def _order(paths: list[str]) -> np.ndarray:
    """Return the places of the paths in ascending order, equal ones as they come, int64 [N]."""
    return np.argsort(np.array(paths, dtype=object), kind="stable")


def _build(
    root: str, rows: _Rows, order: np.ndarray, classes: Sequence[str] | None, place: str
) -> Manifest:
    """Take the rows in `order`, by path, and turn names into class ids."""
    present = set(rows.labels) | set(rows.truths)
    for name in present:
        if not is_text(name):
            raise DataError(f"{place}: class '{legible(name)}' is not UTF-8 text. Rename it.")
    if classes is None:
        classes = sorted(present, key=natural_key)
    unknown = sorted(present - set(classes), key=natural_key)
    if unknown:
        problems = [f"{place}: {_unknown('class', name, classes)}" for name in unknown]
        raise DataError(listed(problems))
    class_ids = {name: i for i, name in enumerate(classes)}

    def ids(names: list[str]) -> np.ndarray:
        return np.fromiter((class_ids[names[i]] for i in order), np.int32, count=len(order))

    return Manifest(
        root=Path(root),
        paths=StringTable(rows.paths[i] for i in order),
        labels=ids(rows.labels),
        splits=np.array(rows.splits, dtype=np.int8)[order],
        classes=tuple(classes),
        truth=ids(rows.truths) if rows.truths else None,
    )
