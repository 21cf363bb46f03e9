"""Decoded images kept between epochs, shared by all worker processes."""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

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
    Mode "disk" keeps them in `folder`, where the next run finds them again. Mode "ram" keeps them
    in shared memory until the program ends, up to `most` bytes of pixels. On Linux these files have
    no name there, so the kernel frees them even if the program is killed.
    """

    def __init__(
        self,
        manifest: Manifest,
        load_size: int,
        mode: str,
        folder: Path | None = None,
        *,
        most: int | None = None,
    ) -> None:
        self.load_size = load_size
        self._manifest = manifest
        self._files: tuple[int, io.FileIO, np.ndarray] | None = None  # process id, pixels, entries
        self._map: mmap.mmap | None = None
        self._in_memory = mode == "ram"
        self._most = most
        self._owned: weakref.finalize[Any, Any] | None = None
        if mode == "ram":
            place = RAM_FOLDER if os.access(RAM_FOLDER, os.W_OK) else None
            folder = Path(tempfile.mkdtemp(prefix="elr-cache-", dir=place))
        elif mode == "disk" and folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        else:
            raise ValueError(f"cache mode {mode!r} with folder {folder}")
        stem = folder / _fingerprint(manifest, load_size)
        self._pixels_path = stem.with_suffix(".pixels")
        self._index_path = stem.with_suffix(".index")
        for path in (self._pixels_path, self._index_path):
            if path.is_symlink() or (path.exists() and not path.is_file()):
                path.unlink()  # what a link or a pipe leads to is not ours to write
        with open(self._index_path, "ab") as file:
            file.truncate(len(manifest) * ENTRY.itemsize)
        if self._in_memory:
            self._own(folder)
        else:
            self._forget_changed_files()

    def _own(self, folder: Path) -> None:
        """Let the files go with this process: at once by name where /proc still reaches them."""
        files = [open(path, "ab") for path in (self._pixels_path, self._index_path)]  # noqa: SIM115
        paths = [Path(f"/proc/{os.getpid()}/fd/{file.fileno()}") for file in files]
        if all(path.exists() for path in paths):
            self._pixels_path, self._index_path = paths
            shutil.rmtree(folder)  # now the kernel frees them, whatever ends this process
        self._owned = weakref.finalize(self, _let_go, files, folder, os.getpid())

    def read(self, row: int) -> np.ndarray:
        """Return what `read_image` gives for this row, uint8 [H, W, 3]; not to be written to."""
        pixels, entries = self._open()
        entry = entries[row]
        image = self._mapped(pixels, entry) if self._in_memory else _stored(pixels, entry)
        if image is None:
            path = self._manifest.file(row)
            before = _stamp(path)
            image = read_image(path, self.load_size)
            end = _append(pixels, image, self._most)
            if end is not None:
                entries[row] = (end, *image.shape[:2], zlib.crc32(image.data), *before)
        return image

    def _open(self) -> tuple[io.FileIO, np.ndarray]:
        """Open the files once per process: a file offset must not be shared after a fork."""
        if self._files is None or self._files[0] != os.getpid():
            pixels = io.FileIO(self._pixels_path, "a+")
            entries = np.memmap(self._index_path, dtype=ENTRY, mode="r+")
            self._files = (os.getpid(), pixels, entries)
            weakref.finalize(self, pixels.close)
        return self._files[1], self._files[2]

    def _mapped(self, pixels: io.FileIO, entry: np.void) -> np.ndarray | None:
        """Return the image as a part of the shared memory, nothing copied."""
        end, height, width = int(entry["end"]), int(entry["height"]), int(entry["width"])
        count = height * width * 3
        if count <= 0 or end < count:
            return None
        if self._map is None or len(self._map) < end:
            self._map = mmap.mmap(pixels.fileno(), 0, access=mmap.ACCESS_READ)
        image = np.frombuffer(self._map, dtype=np.uint8, count=count, offset=end - count)
        return image.reshape(height, width, 3)

    def _forget_changed_files(self) -> None:
        entries = np.memmap(self._index_path, dtype=ENTRY, mode="r+")
        stored = self._pixels_path.stat().st_size if self._pixels_path.exists() else 0
        counts = 3.0 * entries["height"] * entries["width"]
        entries[(counts > entries["end"]) | (entries["end"] > stored)] = np.zeros((), dtype=ENTRY)
        for row in np.flatnonzero(entries["end"]).tolist():
            if entries[row][["mtime_ns", "size"]].item() != _stamp(self._manifest.file(row)):
                entries[row] = np.zeros((), dtype=ENTRY)

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files and the clean-up behind: a worker process opens its own."""
        return {**self.__dict__, "_files": None, "_map": None, "_owned": None}


def _stored(pixels: io.FileIO, entry: np.void) -> np.ndarray | None:
    """Return the image from the file if it is the one that was written."""
    end, height, width = int(entry["end"]), int(entry["height"]), int(entry["width"])
    count = height * width * 3
    if count <= 0 or end < count:
        return None
    image = np.empty((height, width, 3), dtype=np.uint8)
    pixels.seek(end - count)
    if pixels.readinto(image.data) != count or zlib.crc32(image.data) != int(entry["checksum"]):
        return None
    return image


def _append(pixels: io.FileIO, image: np.ndarray, most: int | None) -> int | None:
    """Append an image and return where it ends; None where there is no room for it."""
    if most is not None and pixels.seek(0, os.SEEK_END) + image.nbytes > most:
        return None
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


def _let_go(files: Sequence[BinaryIO], folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not in a forked worker
        for file in files:
            file.close()
        shutil.rmtree(folder, ignore_errors=True)
