from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from elrcli.audit import duplicates
from elrcli.audit.duplicates import alike_groups, equal_rows, find_duplicates
from elrcli.audit.result import DuplicateGroup
from elrcli.data.images import read_image
from elrcli.data.manifest import Manifest, StringTable

# Two patterns without anything in common: left is brighter than right, top than bottom.
LEFT = np.repeat([[1.0] * 8 + [-1.0] * 8], 16, axis=0).flatten()
TOP = np.repeat([[1.0], [-1.0]], 8, axis=0).repeat(16, axis=1).flatten()


def picture(x: int, y: int = 64) -> Image.Image:
    """A bright disc on a dark ground."""
    image = Image.new("RGB", (128, 128), (40, 60, 80))
    ImageDraw.Draw(image).ellipse((x - 30, y - 30, x + 30, y + 30), fill=(250, 200, 150))
    return image


def thumbnail(file: Path) -> np.ndarray:
    """Grey means of 16 x 16 blocks, as a run keeps them."""
    grey = read_image(file, 64).mean(axis=2)
    return grey.reshape(16, 4, 16, 4).mean(axis=(1, 3)).round().astype(np.uint8).flatten()


def manifest_of(folder: Path) -> Manifest:
    names = sorted(path.name for path in folder.iterdir())
    nothing = np.zeros(len(names), dtype=np.int32)
    return Manifest(folder, StringTable(names), nothing, nothing.astype(np.int8), ("a",))


def found(folder: Path, rows: list[int] | None = None) -> tuple[DuplicateGroup, ...]:
    """Search all files of a folder in order of their names, or some rows."""
    manifest = manifest_of(folder)
    order = np.arange(len(manifest)) if rows is None else np.array(rows)
    thumbnails = np.stack([thumbnail(manifest.file(int(row))) for row in order])
    return find_duplicates(manifest, order, thumbnails)


def exact(*rows: int) -> DuplicateGroup:
    return DuplicateGroup(rows, exact=True)


def near(*rows: int, partly_exact: bool = False) -> DuplicateGroup:
    return DuplicateGroup(rows, exact=False, partly_exact=partly_exact)


PARTLY = near(0, 1, 2, partly_exact=True)


def grey(pattern: np.ndarray, contrast: float = 60.0, brightness: float = 128.0) -> np.ndarray:
    return (brightness + contrast * pattern).round().astype(np.uint8)


def test_a_pipe_in_place_of_an_image_is_not_waited_for(tmp_path):
    for name in "abc":
        picture(64).save(tmp_path / f"{name}.png")
    thumbnails = np.stack([thumbnail(tmp_path / "a.png")] * 3)
    (tmp_path / "b.png").unlink()
    os.mkfifo(tmp_path / "b.png")
    assert find_duplicates(manifest_of(tmp_path), np.arange(3), thumbnails) == (PARTLY,)


def groups(*thumbnails: np.ndarray) -> list[list[int]]:
    return [sorted(group.tolist()) for group in alike_groups(np.stack(thumbnails))]


# --- files ---


def test_the_same_bytes_are_an_exact_duplicate(tmp_path):
    picture(32).save(tmp_path / "0.png")
    picture(96).save(tmp_path / "1.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "0.png").read_bytes())
    assert found(tmp_path) == (exact(0, 2),)


def test_the_same_picture_in_another_size_or_quality_is_a_near_duplicate(tmp_path):
    picture(32).save(tmp_path / "0.png")
    picture(32).resize((90, 90)).save(tmp_path / "1.png")
    picture(96).save(tmp_path / "2.png")
    picture(96).save(tmp_path / "3.jpg", quality=30)
    assert found(tmp_path) == (near(0, 1), near(2, 3))


def test_different_pictures_are_no_duplicates(tmp_path):
    for number, place in enumerate([(32, 64), (96, 64), (64, 32), (64, 96)]):
        picture(*place).save(tmp_path / f"{number}.png")
    assert found(tmp_path) == ()


def test_equal_pixels_in_other_bytes_are_near_not_exact(tmp_path):
    picture(32).save(tmp_path / "0.png")
    picture(32).save(tmp_path / "1.bmp")
    assert found(tmp_path) == (near(0, 1),)


def test_pictures_of_one_colour_are_duplicates_only_with_the_same_bytes(tmp_path):
    for name in ("0.png", "1.png", "2.bmp"):
        Image.new("RGB", (64, 64), "white").save(tmp_path / name)
    assert found(tmp_path) == (exact(0, 1),)


def test_copies_that_look_like_a_third_picture_are_one_group_with_it(tmp_path):
    for name in ("0.png", "1.png", "2.jpg"):
        picture(32).save(tmp_path / name)
    assert found(tmp_path) == (PARTLY,)


def test_a_missing_file_has_no_same_bytes(tmp_path):
    for number in range(3):
        picture(32).save(tmp_path / f"{number}.png")
    manifest = manifest_of(tmp_path)
    thumbnails = np.stack([thumbnail(manifest.file(row)) for row in range(3)])
    (tmp_path / "1.png").unlink()
    assert find_duplicates(manifest, np.arange(3), thumbnails) == (PARTLY,)


def test_exact_groups_come_first_and_rows_ascend_whatever_the_order(tmp_path):
    for number, x in enumerate([20, 96, 64, 20, 96, 64]):
        picture(x).save(tmp_path / f"{number}.{'bmp' if number == 2 else 'png'}")
    expected = (exact(0, 3), exact(1, 4), near(2, 5))
    assert found(tmp_path) == expected
    assert found(tmp_path, rows=[5, 4, 3, 2, 1, 0]) == expected
    assert found(tmp_path, rows=[4, 5, 1]) == (exact(1, 4),)


@pytest.mark.parametrize("rows", [[], [0]])
def test_one_picture_or_none(tmp_path, rows):
    picture(32).save(tmp_path / "0.png")
    thumbnails = np.zeros((len(rows), 256), dtype=np.uint8)
    assert find_duplicates(manifest_of(tmp_path), np.array(rows, dtype=int), thumbnails) == ()


def test_files_are_read_only_where_thumbnails_are_equal(tmp_path, monkeypatch):
    read = []
    original = duplicates._same_files

    def watch(positions, files):
        read.append([file.name for file in files])
        return original(positions, files)

    monkeypatch.setattr(duplicates, "_same_files", watch)
    for number, x in enumerate([32, 96, 32, 64]):
        picture(x).save(tmp_path / f"{number}.png")
    found(tmp_path)
    assert read == [["0.png", "2.png"]]


# --- equal rows ---


def test_equal_rows_by_hand():
    table = np.array([[1, 2], [3, 4], [1, 2], [2, 1], [3, 4], [1, 2]], dtype=np.uint8)
    assert [rows.tolist() for rows in equal_rows(table)] == [[0, 2, 5], [1, 4]]
    assert list(equal_rows(table[:2])) == []
    assert list(equal_rows(table[:0])) == []


# --- pictures that look alike ---


def test_brightness_and_contrast_do_not_matter():
    assert groups(grey(LEFT), grey(TOP), grey(LEFT, contrast=20, brightness=60)) == [[0, 2]]


def test_a_negative_is_another_picture():
    assert groups(grey(LEFT), grey(-LEFT)) == []


def test_a_picture_that_shows_nothing_is_like_no_other():
    """Deviations of 3 and 5 grey levels: 4 are needed."""
    assert groups(grey(LEFT, contrast=3), grey(LEFT, contrast=3)) == []
    assert groups(grey(LEFT, contrast=5), grey(LEFT, contrast=5)) == [[0, 1]]
    assert groups(grey(LEFT), grey(LEFT, contrast=3), grey(LEFT)) == [[0, 2]]


def between(degrees: float) -> np.ndarray:
    """A picture from LEFT (0 degrees) to TOP (90); the cosine of the angle is the correlation."""
    angle = np.deg2rad(degrees)
    return grey(np.cos(angle) * LEFT + np.sin(angle) * TOP)


def test_chains_connect():
    """cos 8 = 0.990 is alike, cos 16 = 0.961 is not."""
    assert groups(between(0), between(16)) == []
    assert groups(between(0), between(16), between(8)) == [[0, 1, 2]]
    found = groups(between(0), between(50), between(8), between(58))
    assert sorted(found) == [[0, 2], [1, 3]]


def test_many_copies_are_one_group():
    assert groups(*[grey(LEFT)] * 12, grey(TOP)) == [list(range(12))]


def test_of_too_many_pictures_the_first_are_searched_for(monkeypatch):
    pictures = [between(30 * number) for number in (0, 1, 2, 0, 2, 1)]
    assert sorted(groups(*pictures)) == [[0, 3], [1, 5], [2, 4]]
    monkeypatch.setattr(duplicates, "PAIRS", 12)  # 6 pictures x 2
    assert sorted(groups(*pictures)) == [[0, 3], [1, 5]]
