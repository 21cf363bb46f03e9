"""The images that a person names: files, folders, patterns, a CSV file, or paths on stdin."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from elrcli.data.csv_files import csv_column, csv_rows
from elrcli.data.folders import image_paths, is_image_name
from elrcli.errors import DataError, listed


class ImageInput(NamedTuple):
    """One image to classify."""

    path: str  # as the person gave it, with forward slashes: what tables show
    file: Path


def expand_inputs(
    names: Sequence[str | os.PathLike[str]],
    *,
    root: Path | None = None,
    path_column: str = "path",
    follow_links: bool = False,
    stdin: Iterable[str] = (),
) -> list[ImageInput]:
    """Return the images behind `names`, in the order given; a folder's are sorted by path.

    A folder is searched with its sub-folders, a `.csv` file lists paths that start from `root`
    (default: its own folder), `-` stands for the lines of `stdin`, and what is not on disk is
    tried as a pattern such as `photos/**/*.jpg`. A file named outright is taken whatever its
    suffix; whether it is an image, and there, shows when it is read. Where nothing is found at
    all, that is an error. Links that lead out of a folder are an
    error unless `follow_links`, and so are `root` and `path_column` without a `.csv` file.
    """
    images: list[ImageInput] = []
    gone: list[str] = []  # of single images
    problems: list[str] = []
    for given in names:
        name = os.fspath(given)
        try:
            found = list(_expand(name, root, path_column, follow_links, stdin))
        except DataError as error:
            problems.append(str(error))
            continue
        if not found and is_image_name(name) and not glob.has_magic(name):
            gone.append(f"{name}: {_nothing_found(name)}")
            found = [_named(name)]
        if not found:
            problems.append(f"{name}: {_nothing_found(name)}")
        images += found
    if gone and (problems or len(gone) == len(images)):
        problems = gone + problems
    if problems:
        raise DataError(listed(problems))
    csv_only = {"--root": root is not None, "--path-column": path_column != "path"}
    unused = [option for option, is_set in csv_only.items() if is_set]
    if unused and names and not any(_is_csv(os.fspath(name)) for name in names):
        raise DataError(
            f"{os.fspath(names[0])}: no CSV file, which {unused[0]} needs. Leave it out."
        )
    return images


def _expand(
    name: str, root: Path | None, path_column: str, follow_links: bool, stdin: Iterable[str]
) -> Iterator[ImageInput]:
    if name == "-":
        lines = (line.rstrip("\r\n") for line in stdin)
        yield from (_named(line) for line in lines if line.strip())
    elif os.path.isdir(name):
        within = None if follow_links else name
        for path in sorted(image_paths(name, within=within)):
            yield _named(os.path.join(name, path))
    elif os.path.exists(name):
        if _is_csv(name):
            yield from _listed_in(Path(name), root, path_column)
        else:
            yield _named(name)
    else:
        matches = sorted(glob.glob(name, recursive=True))
        yield from (_named(path) for path in matches if is_image_name(path))


def _is_csv(name: str) -> bool:
    return name.lower().endswith(".csv") and os.path.exists(name) and not os.path.isdir(name)


def _named(path: str) -> ImageInput:
    return ImageInput(path, Path(path))


def _listed_in(csv_path: Path, root: Path | None, path_column: str) -> Iterator[ImageInput]:
    base = csv_path.parent if root is None else root
    lines = csv_rows(csv_path, path_column)
    header = [name.strip() for name in next(lines)[1]]
    column = csv_column(csv_path, header, path_column, "--path-column")
    for _, cells in lines:
        path = cells[column]
        if path.strip():
            yield ImageInput(path, base / path)


def _nothing_found(name: str) -> str:
    if name == "-":
        return "no paths on standard input. Write one path per line."
    if os.path.isdir(name):
        return "no images in this folder. Check the path."
    if os.path.exists(name):
        return "no rows below the header. Add one row per image."
    return "no such file, folder or pattern. Check the path."
