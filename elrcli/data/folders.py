"""Folders of images: one sub-folder per class, perhaps inside `train/` and `val/`."""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from elrcli.data.images import IMAGE_SUFFIXES
from elrcli.data.rows import SPLIT_CODES, Rows
from elrcli.errors import DataError, legible, listed

# Kinds of pictures that nothing here can read, as cameras and phones write them.
# fmt: off
OTHER_PICTURES = (
    ".heic", ".heif", ".hif", ".jxl", ".svg",
    ".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2",
)
# fmt: on


def scan_folder(folder: Path, follow_links: bool) -> Rows:
    """Return the images in class folders, perhaps inside folders of splits."""
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
    return Rows(paths, names, array("b", splits))


def left_out(data: Path) -> list[str]:
    """Return a line about each place with images that `scan_folder` does not take, or doubts.

    None about a CSV file, which names its images.
    """
    if not data.is_dir():
        return []
    root = os.path.abspath(data)
    splits = [name for name, _ in _split_folders(root, data)]
    lines = other_pictures(root)
    for top in (root, *(os.path.join(root, name) for name in splits)):
        loose = _count_images(top)
        if loose:
            lines.append(f"{legible(top)}: images in no class folder, left out: {loose}")
    for top in [os.path.join(root, name) for name in splits] or [root]:
        classes = (os.path.join(top, name) for name in _subfolders(top))
        empty = (place for place in classes if not _holds_images(place))
        lines += [f"{legible(place)}: holds no image, left out" for place in empty]
    for name in _subfolders(root):
        place = os.path.join(root, name)
        if splits and name not in splits and _holds_images(place):
            lines.append(f"{legible(place)}: left out, because the folders beside it are splits")
        if not splits and name.lower() in SPLIT_CODES and len(_subfolders(place)) > 1:
            lines.append(f"{legible(place)}: taken for a class: images lie beside its folders")
    return lines


def other_pictures(folder: str) -> list[str]:
    """Return a line about pictures below a folder whose kind is not read, if there are any."""
    names = (name for _, _, files in os.walk(folder) for name in files if name[0] != ".")
    kinds = Counter(os.path.splitext(name)[1].lower() for name in names)
    found = {kind: kinds[kind] for kind in OTHER_PICTURES if kinds[kind]}
    if not found:
        return []
    count = f"{sum(found.values()):,} pictures of a kind that is not read ({', '.join(found)})"
    return [f"{legible(folder)}: {count}, left out. Convert them to JPEG or PNG"]


def _holds_images(folder: str) -> bool:
    """Tell whether images are found below a folder; not where it cannot be searched."""
    try:
        return any(image_paths(folder))
    except DataError:  # as `lost+found` on a disk
        return False


def _split_folders(root: str, folder: Path) -> list[tuple[str, int]]:
    """Return (sub-folder, split code) if the folder holds splits, else nothing."""
    subfolders = _subfolders(root)
    split_names = [name for name in subfolders if name.lower() in SPLIT_CODES]
    found = [(name, SPLIT_CODES[name.lower()]) for name in split_names]
    codes = [code for _, code in found]
    if 0 not in codes:
        is_all = 0 < len(found) == len(subfolders)
        if is_all and all(_holds_classes(folder / name) for name in split_names):
            raise DataError(
                f"{folder}: holds {legible(' and '.join(split_names))}, but no train. Name one of"
                " them, or add train."
            )
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
    if not _holds_classes(inside):
        return  # images of a class that is called so
    others = legible(", ".join(other for other in subfolders if other != name))
    raise DataError(
        f"{inside}: holds class folders, but beside it are others than val and test ({others})."
        f" Train on {inside}, or, if '{name}' is a class, rename it."
    )


def _holds_classes(folder: Path) -> bool:
    """Tell a split from a class by what is inside: two folders or more, no image beside them."""
    has_folders = len(_subfolders(str(folder))) > 1
    return has_folders and not any(is_image_name(name) for name in os.listdir(folder))


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
        raise DataError(links_refused(leading_out, within))


def leads_out(path: str, folder: str) -> bool:
    """Tell whether a path leads, through links, to something that is not below `folder`."""
    if not os.path.exists(path):
        return False
    real, top = os.path.realpath(path), os.path.realpath(folder)
    return real != top and not real.startswith(os.path.join(top, ""))


def links_refused(links: Sequence[str], root: str) -> str:
    """Return problem and remedy of links that lead out of `root`."""
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
    """Tell whether a file is an image by the end of its name."""
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
        others = "".join(f"\n{line}" for line in other_pictures(folder))
        return f"{folder}: no images found. {layout}{others}"
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
        return _count_images(folder) > 0
    except OSError:
        return False


def _count_images(folder: str) -> int:
    """Return how many images lie in a folder itself."""
    with os.scandir(folder) as entries:
        return sum(
            is_image_name(entry.name) and not entry.name.startswith(".") and not _is_folder(entry)
            for entry in entries
        )
