from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from elrcli.data import cache as module
from elrcli.data.cache import ImageCache
from elrcli.data.images import ImageProblem, read_image
from elrcli.data.manifest import Manifest, load_data


@pytest.fixture
def manifest(tmp_path) -> Manifest:
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate([(20, 10), (10, 20), (12, 12), (90, 9)]):
        folder = tmp_path / "data" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return load_data(tmp_path / "data")


@pytest.fixture
def reads(monkeypatch) -> list[Path]:
    """Collects the files that are decoded."""
    paths: list[Path] = []
    monkeypatch.setattr(
        module, "read_image", lambda path, side: paths.append(path) or read_image(path, side)
    )
    return paths


def make(manifest: Manifest, mode: str, folder: Path) -> ImageCache:
    return ImageCache(manifest, 8, mode, folder if mode == "disk" else None)


@pytest.mark.parametrize("mode", ["ram", "disk"])
def test_each_file_is_decoded_once(manifest, reads, tmp_path, mode):
    cache = make(manifest, mode, tmp_path / "cache")
    for _ in range(3):
        for row in range(4):
            image = cache.read(row)
            np.testing.assert_array_equal(image, read_image(manifest.file(row), 8))
    assert reads == [manifest.file(row) for row in range(4)]


def test_the_disk_cache_serves_the_next_run(manifest, reads, tmp_path):
    for _ in range(2):
        cache = make(manifest, "disk", tmp_path / "cache")
        cache.read(0)
    assert len(reads) == 1


def test_changed_and_deleted_files_are_forgotten(manifest, reads, tmp_path):
    cache = make(manifest, "disk", tmp_path / "cache")
    for row in range(4):
        cache.read(row)
    Image.new("RGB", (9, 9), "red").save(manifest.file(1))
    os.utime(manifest.file(2), ns=(0, 1))
    manifest.file(3).unlink()
    reads.clear()

    cache = make(manifest, "disk", tmp_path / "cache")
    cache.read(0)
    assert cache.read(1)[0, 0].tolist() == [255, 0, 0]
    cache.read(2)
    with pytest.raises(ImageProblem, match="does not exist"):
        cache.read(3)
    assert reads == [manifest.file(row) for row in (1, 2, 3)]


def test_another_size_or_manifest_has_its_own_files(manifest, tmp_path):
    folder = tmp_path / "cache"
    (manifest.root / "a/new.png").symlink_to(manifest.file(0))
    ImageCache(manifest, 8, "disk", folder)
    ImageCache(manifest, 9, "disk", folder)
    ImageCache(load_data(manifest.root), 8, "disk", folder)
    assert len(list(folder.glob("*.index"))) == 3


def test_damaged_pixels_are_read_again(manifest, reads, tmp_path):
    make(manifest, "disk", tmp_path / "cache").read(0)
    (pixels,) = (tmp_path / "cache").glob("*.pixels")
    pixels.write_bytes(b"\0" * pixels.stat().st_size)
    cache = make(manifest, "disk", tmp_path / "cache")
    np.testing.assert_array_equal(cache.read(0), read_image(manifest.file(0), 8))
    pixels.write_bytes(b"")
    np.testing.assert_array_equal(cache.read(0), read_image(manifest.file(0), 8))
    assert len(reads) == 3


@pytest.mark.parametrize("suffix", [".index", ".pixels"])
@pytest.mark.parametrize("is_link", [True, False])
def test_nothing_is_written_through_a_link_or_a_pipe(manifest, tmp_path, suffix, is_link):
    make(manifest, "disk", tmp_path / "cache").read(0)
    (file,) = (tmp_path / "cache").glob(f"*{suffix}")
    file.unlink()
    (tmp_path / "precious").write_text("precious")
    file.symlink_to(tmp_path / "precious") if is_link else os.mkfifo(file)
    image = make(manifest, "disk", tmp_path / "cache").read(0)
    np.testing.assert_array_equal(image, read_image(manifest.file(0), 8))
    assert (tmp_path / "precious").read_text() == "precious"
    assert file.is_file()
    assert not file.is_symlink()


def test_entries_of_images_that_cannot_be_are_forgotten(manifest, reads, tmp_path):
    make(manifest, "disk", tmp_path / "cache").read(0)
    (index,) = (tmp_path / "cache").glob("*.index")
    entries = np.memmap(index, dtype=module.ENTRY, mode="r+")
    for end, side in (2**43, 2**20), (16 * 8 * 3, 2**30), (16 * 8 * 3 + 1, 8):
        entries["end"][0], entries["height"][0], entries["width"][0] = end, side, side
        entries.flush()
        reads.clear()
        make(manifest, "disk", tmp_path / "cache").read(0)
        assert len(reads) == 1


def test_a_full_disk_means_no_cache_and_no_failure(manifest, reads, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RESERVE", 2**62)
    monkeypatch.setattr(
        module.shutil, "disk_usage", lambda _: module.shutil._ntuple_diskusage(100, 90, 10)
    )
    cache = make(manifest, "disk", tmp_path / "cache")
    cache.read(0)
    cache.read(0)
    assert len(reads) == 2


def test_the_memory_cache_ends_where_it_was_told(manifest, reads):
    image = read_image(manifest.file(0), 8)
    cache = ImageCache(manifest, 8, "ram", most=2 * image.nbytes)
    for row in (0, 1, 2, 0, 1, 2):
        np.testing.assert_array_equal(cache.read(row), read_image(manifest.file(row), 8))
    assert reads == [manifest.file(row) for row in (0, 1, 2, 2)]


def test_unreadable_images_are_tried_again(manifest, tmp_path):
    cache = make(manifest, "disk", tmp_path / "cache")
    content = manifest.file(0).read_bytes()
    manifest.file(0).write_bytes(content[:60])
    with pytest.raises(ImageProblem):
        cache.read(0)
    manifest.file(0).write_bytes(content)
    assert cache.read(0).shape == (8, 16, 3)


def test_two_processes_share_the_files(manifest, reads, tmp_path):
    cache = make(manifest, "ram", tmp_path)
    other = pickle.loads(pickle.dumps(cache))  # what a spawned worker gets
    cache.read(0)
    other.read(1)
    np.testing.assert_array_equal(other.read(0), read_image(manifest.file(0), 8))
    np.testing.assert_array_equal(cache.read(1), read_image(manifest.file(1), 8))
    assert len(reads) == 2


FILL_AND_WAIT = """
import sys
from pathlib import Path
from elrcli.data.cache import ImageCache
from elrcli.data.manifest import load_data

cache = ImageCache(load_data(Path(sys.argv[1])), 8, "ram")
for _ in range(2):
    for row in range(4):
        cache.read(row)
print("full", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_a_killed_program_leaves_nothing_in_shared_memory(manifest):
    before = set(Path(module.RAM_FOLDER).iterdir())
    command = [sys.executable, "-c", FILL_AND_WAIT, str(manifest.root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        assert program.stdout.readline() == b"full\n"
        program.send_signal(signal.SIGKILL)
    left = set(Path(module.RAM_FOLDER).iterdir()) - before
    assert not [path for path in left if path.name.startswith("elr-cache-")]


def test_without_proc_the_ram_cache_is_removed_by_its_owner(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RAM_FOLDER", str(tmp_path))
    monkeypatch.setattr(module.os, "getpid", lambda: 0)  # /proc/0 is never there
    cache = ImageCache(manifest, 8, "ram")
    (folder,) = tmp_path.glob("elr-cache-*")
    other = pickle.loads(pickle.dumps(cache))
    other.read(0)
    del other
    assert folder.exists()
    del cache
    assert not folder.exists()


def _read_all(manifest: Manifest, folder: Path, seed: int) -> None:
    cache = ImageCache(manifest, 8, "disk", folder)
    for row in np.random.default_rng(seed).integers(0, 4, 200).tolist():
        np.testing.assert_array_equal(cache.read(row), read_image(manifest.file(row), 8))


def test_several_programs_fill_one_folder_at_once(manifest, tmp_path):
    """As the ranks of one training do."""
    fork = multiprocessing.get_context("forkserver")
    ranks = [
        fork.Process(target=_read_all, args=(manifest, tmp_path / "cache", seed))
        for seed in range(3)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]


def test_wrong_modes(manifest):
    for mode in ("none", "disk"):
        with pytest.raises(ValueError, match="cache mode"):
            ImageCache(manifest, 8, mode)
