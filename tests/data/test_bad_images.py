"""A folder of good and bad images: each is used rightly, or named with the reason."""

from __future__ import annotations

import os
import struct
import sys
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from elrcli.audit.run import audit_run
from elrcli.config import Reading, TrainConfig
from elrcli.data import images
from elrcli.data.csv_files import csv_rows
from elrcli.data.images import ImageProblem, read_image
from elrcli.data.manifest import StringTable, load_data
from elrcli.engine.fit import fit
from elrcli.engine.observer import Observer
from elrcli.run import RunFolder
from tests.engine.conftest import TINY
from tests.shapes import write_shapes

UNREADABLE = {
    "empty.png": "the file is empty",
    "text.jpg": "not an image in a format that Pillow reads",
    "cut.jpg": "damaged image: ",
    "cut.png": "damaged image: ",
    "bomb.png": "more than 179 million pixels",
    "text bomb.png": "damaged image: Decompressed data too large",
    "program.jpg": "EPS is a program",
    "gone.png": "a link that leads nowhere",
    "circle.png": "cannot be read: Too many levels of symbolic links",
    "pipe.png": "not a regular file",
    "device.png": "not a regular file",
    "a folder's link.png": "a folder, not an image",
}


def noise(size: tuple[int, int] = (24, 24)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_bad(folder: Path) -> None:
    """Write every file of UNREADABLE; those that this system cannot hold are left out."""
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("<html>not found</html>")
    for suffix in ("jpg", "png"):
        noise().save(folder / f"cut.{suffix}")
        content = (folder / f"cut.{suffix}").read_bytes()
        (folder / f"cut.{suffix}").write_bytes(content[: len(content) // 2])
    (folder / "bomb.png").write_bytes(png(30_000, 30_000))
    (folder / "text bomb.png").write_bytes(png(8, 8, text=bytes(80_000_000)))
    (folder / "program.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) run\n"
    )
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "circle.png").symlink_to("circle.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "device.png").symlink_to("/dev/zero")


def png(width: int, height: int, text: bytes = b"") -> bytes:
    """Return a PNG without pixels, with `text` compressed in it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    extra = chunk(b"zTXt", b"key\0\0" + zlib.compress(text)) if text else b""
    body = chunk(b"IDAT", zlib.compress(bytes(height * (1 + 3 * width)) if text else b""))
    return b"\x89PNG\r\n\x1a\n" + header + extra + body + chunk(b"IEND", b"")


def write_good(folder: Path) -> set[str]:
    """Write images that are odd and whole; return their names."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    cmyk = Image.new("CMYK", (24, 24), (0, 255, 255, 0))
    saved: dict[str, tuple[Image.Image, dict[str, object]]] = {
        "plain.png": (noise(), {}),
        "wrong suffix.png": (noise(), {"format": "JPEG"}),
        "no image suffix.jpg": (noise(), {"format": "WEBP"}),
        "deep.png": (Image.fromarray(np.full((24, 24), 40_000, dtype=np.uint16)), {}),
        "cmyk.jpg": (cmyk, {}),
        "cmyk with profile.jpg": (cmyk, {"icc_profile": profile}),
        "broken profile.jpg": (noise(), {"icc_profile": b"\xff" * 300}),
        "palette.gif": (noise().quantize(16), {"transparency": 3}),
        "palette.png": (noise().quantize(16), {"transparency": bytes(range(0, 160, 10))}),
        "animated.gif": (noise(), {"save_all": True, "append_images": [noise().rotate(90)]}),
        "broken exif.jpg": (noise(), {"exif": b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12"}),
        "one pixel.png": (Image.new("RGB", (1, 1)), {}),
        "thread.png": (Image.new("RGB", (30_000, 2)), {}),
        "new\nline.png": (noise(), {}),
        "quote\"comma,semi;'.png": (noise(), {}),
        "=HYPERLINK(1).png": (noise(), {}),
        "\N{CYRILLIC SMALL LETTER A}.png": (noise(), {}),
        "a.png": (noise(), {}),
        "A.PNG": (noise(), {}),
        os.fsdecode(b"bytes \xff\xfe.png"): (noise(), {}),
        "x" * 240 + ".png": (noise(), {}),
    }
    for turn in range(9):  # 0 is no orientation
        exif = Image.Exif()
        exif[0x0112] = turn
        saved[f"turned {turn}.jpg"] = (noise(), {"exif": exif})
    for name, (image, options) in saved.items():
        image.save(folder / name, **options)
    return set(saved)


@pytest.mark.skipif(sys.platform != "linux", reason="links, pipes and any bytes in names")
def test_every_image_of_a_bad_folder_is_used_or_named(tmp_path):
    (tmp_path / "data/bad").mkdir(parents=True)
    (tmp_path / "data/good").mkdir()
    write_bad(tmp_path / "data/bad")
    good = write_good(tmp_path / "data/good")
    (tmp_path / "data/csv only").mkdir()
    (tmp_path / "data/bad/a folder's link.png").symlink_to(tmp_path / "data/csv only")
    config = TrainConfig(
        data=tmp_path / "data",
        **TINY | {"epochs": 1},
        val_fraction=0.0,
        max_unreadable=1.0,
        follow_links=True,
    )
    run = fit(config, tmp_path / "run")
    manifest = run.manifest()
    assert {p.removeprefix("good/") for p in manifest.paths if p.startswith("good/")} == good
    named = unreadable(run)
    links = {"a folder's link.png"}  # a folder without images is not an image
    assert named.keys() == {f"bad/{name}" for name in UNREADABLE.keys() - links}
    for path, reason in named.items():
        assert reason.startswith(UNREADABLE[path.removeprefix("bad/")]), path


def unreadable(run: RunFolder) -> dict[str, str]:
    rows = csv_rows(run.unreadable_file, "path")
    next(rows)
    return {path: reason for _, (path, reason) in rows}


@pytest.mark.skipif(sys.platform != "linux", reason="links, pipes and any bytes in names")
@pytest.mark.parametrize("name", UNREADABLE)
def test_reasons(tmp_path, name):
    write_bad(tmp_path)
    (tmp_path / "a folder's link.png").symlink_to(tmp_path)
    with pytest.raises(ImageProblem) as caught:
        read_image(tmp_path / name, 16)
    assert str(caught.value).startswith(UNREADABLE[name])
    assert "\n" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_odd_images_have_the_right_pixels(tmp_path):
    write_good(tmp_path)
    plain = read_image(tmp_path / "plain.png")
    for name in ("new\nline.png", "A.PNG", "quote\"comma,semi;'.png"):
        np.testing.assert_array_equal(read_image(tmp_path / name), plain)
    assert read_image(tmp_path / "deep.png")[0, 0].tolist() == [156, 156, 156]  # 40,000 / 257
    for name in ("cmyk.jpg", "cmyk with profile.jpg"):
        red, green, blue = read_image(tmp_path / name)[0, 0].tolist()
        assert red > 250
        assert max(green, blue) < 5
    assert read_image(tmp_path / "one pixel.png", 16).shape == (16, 16, 3)
    assert read_image(tmp_path / "thread.png", 16).shape == (16, 64, 3)


def test_large_pictures_are_converted_in_strips_with_the_same_pixels(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    pictures = {
        "rgba.png": Image.fromarray(rng.integers(0, 256, (33, 20, 4), dtype=np.uint8)),
        "la.png": Image.fromarray(rng.integers(0, 256, (33, 20, 2), dtype=np.uint8), "LA"),
        "palette.png": noise((33, 20)).quantize(8),
        "deep.png": Image.fromarray(rng.integers(0, 65536, (33, 20), dtype=np.uint16)),
        "wide.tif": Image.fromarray(rng.normal(0, 1e5, (33, 20)).astype(np.float32)),
    }
    for name, picture in pictures.items():
        picture.save(tmp_path / name, **({"transparency": 3} if picture.mode == "P" else {}))
    whole = {name: read_image(tmp_path / name) for name in pictures}
    monkeypatch.setattr(images, "STRIP", 50)
    for name, pixels in whole.items():
        np.testing.assert_array_equal(read_image(tmp_path / name), pixels)


def test_a_jpeg_file_of_many_gigabytes_is_not_read_at_once(tmp_path):
    picture = Image.linear_gradient("L").convert("RGB")
    for name in ("plain.jpg", "large.jpg"):
        picture.save(tmp_path / name)
    os.truncate(tmp_path / "large.jpg", 1 << 36)  # a hole: it takes no room on the disk
    plain, large = (read_image(tmp_path / f"{name}.jpg", 64) for name in ("plain", "large"))
    assert np.abs(plain.astype(int) - large).max() <= 3  # another decoder


def test_programs_are_never_run(tmp_path, monkeypatch):
    """Pillow hands EPS files to Ghostscript where that is installed, whatever their suffix."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("was run"))
    write_bad(tmp_path)
    with pytest.raises(ImageProblem, match="EPS is a program, which is not run"):
        read_image(tmp_path / "program.jpg", 16)


# --- folders ---


def test_a_folder_deeper_than_pythons_stack_is_searched(tmp_path, monkeypatch):
    write_shapes(tmp_path / "data", per_class=1, classes=("square",))
    (tmp_path / "data/deep").mkdir()
    monkeypatch.chdir(tmp_path / "data/deep")
    for _ in range(1200):
        os.mkdir("x")
        os.chdir("x")
    Image.new("RGB", (8, 8)).save("a.png")
    depths = [path.count("/") for path in load_data(tmp_path / "data").paths]
    assert depths == [1201, 1]
    for _ in range(1200):  # pytest's own cleaning recurses
        for name in os.listdir():
            os.remove(name) if name == "a.png" else os.rmdir(name)
        os.chdir("..")


def test_links_that_double_at_every_level_end(tmp_path):
    """2 ** 40 ways lead to the one image."""
    write_shapes(tmp_path / "data", per_class=1, classes=("square",))
    levels = [tmp_path / f"level{i}" for i in range(40)]
    for level, below in pairwise(levels):
        level.mkdir()
        for name in ("a", "b"):
            (level / name).symlink_to(below)
    levels[-1].mkdir()
    Image.new("RGB", (8, 8)).save(levels[-1] / "1.png")
    (tmp_path / "data/many").symlink_to(levels[0])
    assert list(load_data(tmp_path / "data", Reading(follow_links=True)).paths) == [
        "many/" + 39 * "a/" + "1.png",
        "square/0000.png",
    ]


def test_a_linked_folder_is_searched_once_and_under_its_own_name(tmp_path):
    write_shapes(tmp_path / "data", per_class=1, classes=("circle", "square"))
    (tmp_path / "data/circle/real").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "data/circle/real/1.png")
    (tmp_path / "data/circle/alias").symlink_to("real")
    assert list(load_data(tmp_path / "data").paths) == [
        "circle/0000.png",
        "circle/real/1.png",
        "square/0001.png",
    ]


# --- while training ---


class Meddler(Observer):
    """Does something after the first epoch, and keeps what is said."""

    def __init__(self, deed: Callable[[], object]) -> None:
        self.deed = deed
        self.notes: list[str] = []

    def epoch_finished(self, metrics: object) -> None:
        self.deed()
        self.deed = lambda: None

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.mark.parametrize("cache", ["none", "ram"])
@pytest.mark.parametrize("what", ["vanishes", "shrinks", "changes"])
def test_a_file_that_goes_bad_while_training(tmp_path, what, cache):
    write_shapes(tmp_path / "data")
    victim = tmp_path / "data/circle/0003.png"
    deeds: dict[str, Callable[[], object]] = {
        "vanishes": victim.unlink,
        "shrinks": lambda: victim.write_bytes(b"\x89PNG"),
        "changes": lambda: Image.new("L", (90, 50)).save(victim),
    }
    config = TrainConfig(data=tmp_path / "data", **TINY, val_fraction=0.0, cache=cache)
    run = fit(config, tmp_path / "run", observer=Meddler(deeds[what]))
    is_missed = what != "changes" and cache == "none"
    assert list(unreadable(run)) == (["circle/0003.png"] if is_missed else [])
    result = audit_run(run.path, report=True)
    assert len(result) == 24  # it was seen once
    assert np.isfinite(result.score).all()


def test_string_tables_hold_any_name():
    names = ["\N{CYRILLIC SMALL LETTER A}", "a", "A", "\udcff", "a\nb", "x" * 5000]
    assert list(StringTable(names)) == names
