"""CSV files of paths and labels; and how every CSV file is read and written here."""

from __future__ import annotations

import csv
import os
import stat
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from elrcli.config import Reading
from elrcli.data.folders import leads_out, links_refused
from elrcli.data.rows import SPLIT_CODES, SPLITS, Rows, is_inside
from elrcli.errors import (
    MOST_PROBLEMS,
    SHOWN,
    DataError,
    did_you_mean,
    folded,
    is_text,
    legible,
    listed,
    unknown_name,
)

DELIMITERS = ",;\t"
LONGEST_HEADER = 1 << 20  # characters


def read_csv(
    csv_path: Path,
    root: Path,
    reading: Reading,
    truth_column: str | None,
    known: Collection[str] | None,
    check_files: bool,
) -> tuple[Rows, np.ndarray]:
    """Return the rows of a file, and which of them to take in which order; paths are below `root`.

    `known` are the classes that there may be, None for any. See `elrcli.data.manifest.load_data`.
    """
    base = os.path.abspath(root)
    if not os.path.isdir(base):
        raise DataError(f"{base}: no such folder. Check --root.")
    lines = csv_rows(csv_path, reading.path_column)
    header = [name.strip() for name in next(lines)[1]]

    def column(name: str | None, option: str) -> int | None:
        return None if name is None else csv_column(csv_path, header, name, option)

    split_column = reading.split_column
    if split_column == "split" and split_column not in header:
        split_column = None
    reader = _RowReader(
        header=header,
        path_at=csv_column(csv_path, header, reading.path_column, "--path-column"),
        label_at=csv_column(csv_path, header, reading.label_column, "--label-column"),
        split_at=column(split_column, "--split-column"),
        truth_at=column(truth_column, "--truth-column"),
        bases=(base, os.path.realpath(base)),
        known=known,
    )
    rows = Rows()
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
    if not reading.follow_links:
        leading_out = _links_out(base, (rows.paths[row] for row in kept))
        if leading_out:
            raise DataError(links_refused(leading_out, base))
    return rows, kept


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
        path = path_below(cells[self.path_at], self.bases)
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
        for name in filter(None, (label, truth)):
            if not is_text(name):
                raise ValueError(
                    f"'{legible(name)}' is not UTF-8 text. Save the file as CSV (UTF-8)."
                )
            if self.known is not None and name not in self.known:
                raise ValueError(unknown_name("class", name, self.known))
        split_name = "" if self.split_at is None else cells[self.split_at].strip()
        split = SPLIT_CODES.get(split_name.lower() or "train")
        if split is None:
            raise ValueError(unknown_name("split", split_name, SPLITS))
        return path, label, split, truth


def _refuse_problems(
    csv_path: Path,
    base: str,
    rows: Rows,
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
                while width and len(cells) > width and not cells[-1].strip():
                    del cells[-1]  # a comma too many
                if any(cell[:2] == ' "' and cell.rstrip()[-1:] == '"' for cell in cells):
                    raise DataError(f"{csv_path}:{line}: a blank before a quote. Remove it.")
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
    """Return the place of the column `name`; raises DataError if it is not there just once."""
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


def path_below(path: str, bases: Iterable[str]) -> str | None:
    """Return a path relative to the data root; None if it leaves it."""
    path = os.path.normpath(path)
    if not os.path.isabs(path):
        return path if is_inside(path) else None
    starts = (os.path.join(base, "") for base in bases)
    return next((path[len(start) :] for start in starts if path.startswith(start)), None)


def _near_file(base: str, path: str) -> str:
    """Return a hint at a file whose name only looks different to the computer, or nothing."""
    if os.path.islink(f"{base}/{path}"):
        return ", but a link that leads nowhere."
    if os.path.exists(f"{base}/{path.replace(chr(92), '/')}"):
        return ". Write paths with forward slashes."
    if os.path.exists(f"{base}/{path.strip()}"):
        return ". Remove the blanks around the path."
    found = ""
    try:
        for part in path.split("/"):
            names = os.listdir(f"{base}/{found}")
            alike = [name for name in names if folded(name) == folded(part)]
            found += f"/{part if part in alike else min(alike)}"
    except (OSError, ValueError):  # from min(), too, where nothing is alike
        return ""
    if unicodedata.normalize("NFC", found[1:]) == unicodedata.normalize("NFC", path):
        return ". Its name is there in another Unicode form: list the folder to get it."
    return f". Did you mean '{legible(found[1:])}'?"
