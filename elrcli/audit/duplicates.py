"""Pictures that are in the data more than once: the cheapest errors to prove."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from elrcli.audit.neighbours import PAIRS, FeatureSpace
from elrcli.audit.result import DuplicateGroup
from elrcli.data.manifest import Manifest

ALIKE = 0.985  # correlation of 16 x 16 pixels: the same picture in another size or compression
FLAT = 4.0  # grey levels of deviation below which a picture shows nothing to compare
COMPARED = 3  # nearest pictures that are looked at


def find_duplicates(
    manifest: Manifest, rows: np.ndarray, thumbnails: np.ndarray
) -> tuple[DuplicateGroup, ...]:
    """Return the groups of samples that show the same picture, the exact ones first.

    No sample is in two groups: files with the same bytes that also look like others are among them,
    in a group that is partly exact.
    rows [M] manifest rows, most suspicious first, thumbnails [M, 256] uint8. Files are read only
    where thumbnails are equal. Beyond 70,000 samples, pictures that merely look the same are
    only searched around the most suspicious ones.
    """
    exact = [
        DuplicateGroup(tuple(sorted(rows[group].tolist())), exact=True)
        for equal in equal_rows(thumbnails)
        for group in _same_files(equal, [manifest.file(int(row)) for row in rows[equal]])
    ]
    known = {group.rows for group in exact}
    same_bytes = {row for group in exact for row in group.rows}
    alike = [tuple(sorted(rows[group].tolist())) for group in alike_groups(thumbnails)]
    near = [
        DuplicateGroup(group, exact=False, partly_exact=not same_bytes.isdisjoint(group))
        for group in alike
        if group not in known
    ]
    wider = {row for group in near for row in group.rows}
    return (*sorted(group for group in exact if wider.isdisjoint(group.rows)), *sorted(near))


def equal_rows(table: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the positions of every set of equal rows of `table` [M, D] uint8, ascending."""
    whole = np.ascontiguousarray(table).view(np.dtype((np.void, table.shape[1])))[:, 0]
    order = np.argsort(whole, kind="stable")
    starts = np.flatnonzero(np.r_[True, whole[order][1:] != whole[order][:-1], True])
    for start, end in pairwise(starts.tolist()):
        if end - start > 1:
            yield order[start:end]


def alike_groups(thumbnails: np.ndarray) -> list[np.ndarray]:
    """Return sets of positions [M] that are connected by pairs of nearly equal pictures.

    Brightness and contrast do not matter. Pictures of one colour are like no other.
    """
    pixels = thumbnails.astype(np.float32)
    pixels -= pixels.mean(axis=1, keepdims=True)
    variance = np.einsum("md,md->m", pixels, pixels) / pixels.shape[1]
    shown = np.flatnonzero(variance >= FLAT**2)
    if len(shown) < 2:
        return []
    space = FeatureSpace.of_directions(pixels[shown])
    candidates = np.arange(min(len(shown), PAIRS // len(shown)))
    found, correlation = space.nearest(np.arange(len(shown)), candidates, COMPARED)
    first, place = np.nonzero(correlation >= ALIKE)
    groups = _connected(zip(first.tolist(), found[first, place].tolist(), strict=True))
    return [shown[group] for group in groups]


def _connected(pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Return the sets of numbers that pairs connect."""
    group_of: dict[int, list[int]] = {}
    for pair in pairs:
        one, other = (group_of.setdefault(number, [number]) for number in pair)
        if one is not other:
            small, large = sorted((one, other), key=len)
            large += small
            group_of.update(dict.fromkeys(small, large))
    return list({id(group): group for group in group_of.values()}.values())


def _same_files(positions: np.ndarray, files: Iterable[Path]) -> Iterator[np.ndarray]:
    """Yield the positions whose files have the same bytes; missing files equal no other."""
    by_content: dict[bytes, list[int]] = {}
    for position, file in zip(positions.tolist(), files, strict=True):
        if not os.path.isfile(file):  # opening a pipe might wait for ever
            continue
        try:
            with file.open("rb") as content:
                digest = hashlib.file_digest(content, "blake2b").digest()
        except OSError:
            continue
        by_content.setdefault(digest, []).append(position)
    for group in by_content.values():
        if len(group) > 1:
            yield np.array(group)
