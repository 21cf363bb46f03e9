"""Decoded images kept between epochs, shared by all worker processes."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tempfile
import weakref
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from elrcli.data.images import read_image
from elrcli.data.manifest import Manifest

FORMAT = "elr image cache 1"
RAM_FOLDER = "/dev/shm"
RESERVE = 2 * 1024**3  # bytes left free: batches pass through the same shared memory
ENTRY = np.dtype(
    [
        ("end", "<i8"),  # where the pixels end in the file; 0: not cached
        ("height", "<i4"),
        ("width", "<i4"),
        ("checksum", "<u4"),
        ("mtime_ns", "<i8"),
        ("size", "<i8"),
    ]
)


class ImageCache:
    """Images of a manifest at one load size: read through, filled on first use.

    Two files: `.pixels` grows by whole images, appended by any process; `.index` has one ENTRY
    per row. An entry that does not match its pixels (torn write, full disk) counts as missing.
    Mode "ram" keeps them in shared memory until the program ends, mode "disk" in `folder`,
    where the next run finds them again.
    """

    def __init__(
        self, manifest: Manifest, load_size: int, mode: str, folder: Path | None = None
    ) -> None:
        self.load_size = load_size
        self._manifest = manifest
        self._files: tuple[int, io.FileIO, np.ndarray] | None = None  # process id, pixels, entries
        self._remove: weakref.finalize[Any, Any] | None = None
        if mode == "ram":
            place = RAM_FOLDER if os.access(RAM_FOLDER, os.W_OK) else None
            folder = Path(tempfile.mkdtemp(prefix="elr-cache-", dir=place))
            self._remove = weakref.finalize(self, _remove_folder, folder, os.getpid())
        elif mode == "disk" and folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        else:
            raise ValueError(f"cache mode {mode!r} with folder {folder}")
        self._stem = folder / _fingerprint(manifest, load_size)
        self._prepare_index()

    def read(self, row: int) -> np.ndarray:
        """Return what `read_image` gives for this row, uint8 [H, W, 3]."""
        pixels, entries = self._open()
        image = _cached(pixels, entries[row])
        if image is None:
            path = self._manifest.file(row)
            before = _stamp(path)
            image = read_image(path, self.load_size)
            end = _append(pixels, image)
            if end is not None:
                entries[row] = (end, *image.shape[:2], zlib.crc32(image.data), *before)
        return image

    def _open(self) -> tuple[io.FileIO, np.ndarray]:
        """Open the files once per process: a file offset must not be shared after a fork."""
        if self._files is None or self._files[0] != os.getpid():
            pixels = io.FileIO(self._stem.with_suffix(".pixels"), "a+")
            entries = np.memmap(self._stem.with_suffix(".index"), dtype=ENTRY, mode="r+")
            self._files = (os.getpid(), pixels, entries)
            weakref.finalize(self, pixels.close)
        return self._files[1], self._files[2]

    def _prepare_index(self) -> None:
        """Make the index if it is missing; forget entries of files that changed since."""
        with open(self._stem.with_suffix(".index"), "ab") as file:
            file.truncate(len(self._manifest) * ENTRY.itemsize)
        entries = np.memmap(self._stem.with_suffix(".index"), dtype=ENTRY, mode="r+")
        for row in np.flatnonzero(entries["end"]).tolist():
            if entries[row][["mtime_ns", "size"]].item() != _stamp(self._manifest.file(row)):
                entries[row] = np.zeros((), dtype=ENTRY)

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files and the clean-up behind: a worker process opens its own."""
        return {**self.__dict__, "_files": None, "_remove": None}


def _cached(pixels: io.FileIO, entry: np.void) -> np.ndarray | None:
    end, height, width = int(entry["end"]), int(entry["height"]), int(entry["width"])
    count = height * width * 3
    if count <= 0 or end < count:
        return None
    buffer = bytearray(count)
    pixels.seek(end - count)
    if pixels.readinto(buffer) != count or zlib.crc32(buffer) != int(entry["checksum"]):
        return None
    return np.frombuffer(buffer, dtype=np.uint8).reshape(height, width, 3)


def _append(pixels: io.FileIO, image: np.ndarray) -> int | None:
    """Append an image and return where it ends; None where the disk has no room for it."""
    disk = shutil.disk_usage(pixels.name)
    if disk.free - image.nbytes < min(RESERVE, disk.total // 4):
        return None
    try:
        written = pixels.write(image.data)  # in append mode two writers never overlap
    except OSError:
        return None
    return pixels.tell() if written == image.nbytes else None


def _stamp(path: Path) -> tuple[int, int]:
    """Return what changes with a file's content: time in ns and size; -1 if there is no file."""
    try:
        info = os.stat(path)
    except OSError:
        return -1, -1
    return info.st_mtime_ns, info.st_size


def _fingerprint(manifest: Manifest, load_size: int) -> str:
    digest = hashlib.sha256(FORMAT.encode())
    for text in (str(load_size), str(manifest.root), *manifest.paths):
        digest.update(text.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()[:16]


def _remove_folder(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not in a forked worker
        shutil.rmtree(folder, ignore_errors=True)
