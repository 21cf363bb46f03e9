from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from elrcli.data import images
from elrcli.data.images import IMAGE_SUFFIXES, ImageProblem, read_image, read_window
from elrcli.errors import DataError

RED_BLUE = ((255, 0, 0), (0, 0, 255))


def two_halves(width: int = 32, height: int = 16) -> Image.Image:
    """Return an image whose left half is red and whose right half is blue."""
    image = Image.new("RGB", (width, height), RED_BLUE[0])
    image.paste(RED_BLUE[1], (width // 2, 0, width, height))
    return image


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def problem_of(path: Path) -> str:
    with pytest.raises(ImageProblem) as caught:
        read_image(path, 8)
    assert isinstance(caught.value, DataError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- modes and formats ---


@pytest.mark.parametrize(
    ("mode", "suffix", "expected"),
    [
        ("1", "png", (255, 255, 255)),
        ("L", "png", (150, 150, 150)),
        ("LA", "png", (150, 150, 150)),
        ("P", "png", (204, 153, 102)),  # nearest of Pillow's web palette
        ("PA", "tif", (204, 153, 102)),
        ("RGB", "png", (200, 140, 100)),
        ("RGB", "bmp", (200, 140, 100)),
        ("RGB", "ppm", (200, 140, 100)),
        ("RGBA", "png", (200, 140, 100)),
        ("RGBA", "webp", (200, 140, 100)),
        ("CMYK", "tif", (200, 140, 100)),
        ("CMYK", "jpg", (200, 140, 100)),
        ("YCbCr", "tif", (200, 140, 100)),
        ("YCbCr", "jpg", (200, 140, 100)),
        ("LAB", "tif", (200, 140, 100)),
        ("I", "tif", (150, 150, 150)),
        ("F", "tif", (150, 150, 150)),
        ("RGB", "gif", (200, 140, 100)),
        ("RGB", "jp2", (200, 140, 100)),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, suffix, expected):
    image = Image.new("RGB", (12, 10), (200, 140, 100)).convert(mode)
    pixels = read_image(saved(tmp_path / f"image.{suffix}", image))
    assert pixels.shape == (10, 12, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    np.testing.assert_allclose(pixels[5, 6], expected, atol=3)
    assert read_image(tmp_path / f"image.{suffix}", 5).shape == (5, 6, 3)


def test_hsv_becomes_rgb():
    """No common format stores HSV, so the conversion is asked directly."""
    red = Image.new("HSV", (2, 2), (0, 255, 255))
    assert images._to_rgb(red).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_by_257(tmp_path, suffix):
    values = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    path = saved(tmp_path / f"deep.{suffix}", Image.fromarray(values))
    assert read_image(path)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_big_endian_16_bit_grey(tmp_path):
    values = np.array([[0, 257, 65535]], dtype=">u2")
    path = saved(tmp_path / "deep.tif", Image.frombytes("I;16B", (3, 1), values.tobytes()))
    assert read_image(path)[0, :, 0].tolist() == [0, 1, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0]], dtype=np.float32), [0, 128, 255]),
        (np.array([[0.0, 100.0, 255.0]], dtype=np.float32), [0, 100, 255]),
        (np.array([[-3.0, np.nan, 0.2]], dtype=np.float32), [0, 0, 51]),
        (np.array([[0, 257, 65535]], dtype=np.int32), [0, 1, 255]),
        (np.array([[0, 7, 200]], dtype=np.int32), [0, 7, 200]),
        (np.array([[-100_000, 0, 100_000]], dtype=np.int32), [0, 128, 255]),
        (np.array([[70_000, 70_000]], dtype=np.int32), [0, 0]),
        (np.array([[1e6, 1e6]], dtype=np.float32), [0, 0]),
    ],
)
def test_wide_grey_values_are_scaled_by_their_range(tmp_path, values, expected):
    path = saved(tmp_path / "wide.tif", Image.fromarray(values))
    assert read_image(path)[0, :, 0].tolist() == expected


def test_transparent_pixels_become_white(tmp_path):
    rgba = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 0))
    assert read_image(saved(tmp_path / "a.png", rgba)).tolist() == [[[255, 0, 0], [255] * 3]]

    grey = Image.new("LA", (1, 1), (0, 51))  # one fifth black
    assert read_image(saved(tmp_path / "b.png", grey)).tolist() == [[[204] * 3]]

    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    path = saved(tmp_path / "c.png", palette, transparency=1)
    assert read_image(path).tolist() == [[[255, 0, 0], [255] * 3]]

    path = saved(tmp_path / "d.png", palette, transparency=b"\xff\x00")
    assert read_image(path).tolist() == [[[255, 0, 0], [255] * 3]]

    keyed = saved(tmp_path / "e.png", two_halves(2, 1), transparency=RED_BLUE[1])
    assert read_image(keyed).tolist() == [[[255, 0, 0], [255] * 3]]


def test_transparency_survives_the_crop_of_a_long_image(tmp_path):
    palette = Image.new("P", (40, 2), 0)
    path = saved(tmp_path / "long.png", palette, transparency=0)
    assert (read_image(path, 2) == 255).all()


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_animations_give_their_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    path = tmp_path / f"frames.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    assert read_image(path)[4, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("short_side", [None, 8])
def test_exif_orientation_turns_the_image_upright(tmp_path, suffix, short_side):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    path = saved(tmp_path / f"turned.{suffix}", two_halves(32, 16), exif=exif)
    pixels = read_image(path, short_side)
    assert pixels.shape == ((32, 16, 3) if short_side is None else (16, 8, 3))
    np.testing.assert_allclose(pixels[1, 4], RED_BLUE[0], atol=30)
    np.testing.assert_allclose(pixels[-2, 4], RED_BLUE[1], atol=30)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_agree_with_pillow(tmp_path, orientation):
    from PIL import ImageOps

    rng = np.random.default_rng(orientation)
    image = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "image.png", image, exif=exif)
    with Image.open(path) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened))
    np.testing.assert_array_equal(read_image(path), expected)


def test_damaged_exif_is_no_reason_to_lose_an_image(tmp_path):
    path = saved(tmp_path / "a.jpg", two_halves(), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    assert read_image(path).shape == (16, 32, 3)


# --- size ---


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        ((100, 50), (20, 40, 3)),
        ((50, 100), (40, 20, 3)),
        ((33, 33), (20, 20, 3)),
        ((10, 15), (30, 20, 3)),
        ((1, 1), (20, 20, 3)),
        ((101, 50), (20, 40, 3)),
    ],
)
def test_the_short_side_is_as_asked(tmp_path, size, shape):
    assert read_image(saved(tmp_path / "a.png", two_halves(*size)), 20).shape == shape


@pytest.mark.parametrize("size", [(30_000, 2), (2, 30_000)])
def test_very_long_images_lose_their_ends(tmp_path, size):
    pixels = read_image(saved(tmp_path / "long.png", two_halves(*size)), 16)
    assert sorted(pixels.shape) == [3, 16, 64]


def test_the_centre_of_a_long_image_is_kept(tmp_path):
    pixels = read_image(saved(tmp_path / "long.png", two_halves(1000, 10)), 10)
    assert pixels.shape == (10, 40, 3)
    assert pixels[5, 0].tolist() == list(RED_BLUE[0])
    assert pixels[5, 39].tolist() == list(RED_BLUE[1])


def test_downscaling_averages_instead_of_picking_pixels(tmp_path):
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    pixels = read_image(saved(tmp_path / "stripes.png", Image.fromarray(stripes)), 8)
    assert pixels.min() >= 120
    assert pixels.max() <= 136


@pytest.fixture
def decoded(monkeypatch) -> list[tuple[int, ...]]:
    """Collects height and width of what is decoded."""
    shapes: list[tuple[int, ...]] = []
    upright = images._upright
    monkeypatch.setattr(
        images,
        "_upright",
        lambda pixels, orientation: shapes.append(pixels.shape[:2]) or upright(pixels, orientation),
    )
    return shapes


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_large_jpegs_are_decoded_at_reduced_scale(tmp_path, decoded, mode):
    path = saved(tmp_path / "large.jpg", two_halves(800, 400).convert(mode))
    assert read_image(path, 50).shape == (50, 100, 3)
    assert read_image(path, 150).shape == (150, 300, 3)
    assert read_image(path, 201).shape == (201, 402, 3)
    assert decoded == [(50, 100), (200, 400), (400, 800)]
    if mode == "RGB":
        np.testing.assert_allclose(read_image(path, 50)[25, 5], RED_BLUE[0], atol=5)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_jpegs_have_the_pixels_that_pillow_gives(tmp_path, mode, options):
    noise = np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8)
    path = saved(tmp_path / "a.jpg", Image.fromarray(noise).convert(mode), **options)
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(read_image(path) - expected).max() <= 1


def test_shrinking_gives_the_pixels_of_pillows_resize(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    expected = Image.fromarray(noise).resize((41, 27), Image.Resampling.BILINEAR)
    difference = images.resize(noise, 27, 41) - np.asarray(expected).astype(int)
    assert np.abs(difference).max() <= 1


def test_a_jpeg_must_have_its_end(tmp_path):
    buffer = io.BytesIO()
    two_halves(64, 64).save(buffer, "jpeg")
    path = tmp_path / "cut.jpg"
    path.write_bytes(buffer.getvalue()[:-2])
    assert problem_of(path).startswith("damaged image: image file is truncated")
    path.write_bytes(buffer.getvalue() + b"what a camera adds")
    assert read_image(path).shape == (64, 64, 3)


# --- windows ---


def test_a_window_is_the_named_part(tmp_path):
    """The upper right quarter, from 100 pixels to 10."""
    rows, columns = np.mgrid[:100, :200]
    pixels = np.stack([columns, rows, 0 * rows], axis=2).astype(np.uint8)
    path = saved(tmp_path / "a.png", Image.fromarray(pixels))
    seen: list[tuple[int, int]] = []
    part = read_window(
        path, 10, lambda *shape: seen.append(shape) or images.Window(0.0, 0.5, 0.5, 0.5)
    )
    assert seen == [(100, 200)]
    assert part.shape == (10, 10, 3)
    np.testing.assert_allclose(part[:, :, 0], [[104.5 + 10 * i for i in range(10)]] * 10, atol=1.5)
    np.testing.assert_allclose(part[:, 0, 1], [2 + 5 * i for i in range(10)], atol=1)


def test_the_scale_of_a_jpeg_follows_from_the_window(tmp_path, decoded):
    """For 50 of 400 rows an eighth will do; for 50 of the upper 200 a quarter, of 100 a half."""
    path = saved(tmp_path / "large.jpg", two_halves(800, 400))
    for share in (1.0, 0.5, 0.25, 0.1):
        read_window(path, 50, lambda *_, share=share: images.Window(0.0, 0.0, share, share))
    assert decoded == [(50, 100), (100, 200), (200, 400), (400, 800)]


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_windows_are_cut_from_the_upright_image(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90 degrees clockwise: red above, blue below
    path = saved(tmp_path / f"turned.{suffix}", two_halves(320, 160), exif=exif)
    seen: list[tuple[int, int]] = []
    lower = read_window(
        path, 8, lambda *shape: seen.append(shape) or images.Window(0.6, 0.0, 0.4, 1.0)
    )
    assert seen == [(320, 160)]
    np.testing.assert_allclose(lower[4, 4], RED_BLUE[1], atol=5)


def test_windows_of_long_images_leave_the_ends_out(tmp_path):
    path = saved(tmp_path / "long.png", two_halves(1000, 10))
    seen: list[tuple[int, int]] = []
    read_window(path, 8, lambda *shape: seen.append(shape) or images.Window(0.0, 0.0, 1.0, 1.0))
    assert seen == [(10, 40)]


@pytest.mark.parametrize("size", [(1, 1), (3, 1)])
def test_windows_of_tiny_images_have_a_pixel(tmp_path, size):
    path = saved(tmp_path / "tiny.png", two_halves(*size))
    for corner in (0.0, 0.7):
        part = read_window(path, 4, lambda *_, at=corner: images.Window(at, at, 0.3, 0.3))
        assert part.shape == (4, 4, 3)


# --- what cannot be read ---


def test_missing_empty_and_foreign_files(tmp_path):
    assert problem_of(tmp_path / "nowhere.png") == "the file does not exist"
    (tmp_path / "empty.png").touch()
    assert problem_of(tmp_path / "empty.png") == "the file is empty"
    (tmp_path / "text.jpg").write_text("<html>not found</html>")
    assert problem_of(tmp_path / "text.jpg") == "not an image in a format that Pillow reads"
    (tmp_path / "folder.png").mkdir()
    assert problem_of(tmp_path / "folder.png") == "a folder, not an image"


def test_permission_errors_are_named():
    assert (
        images._reason("a.png", PermissionError(13, "denied")) == "no permission to read the file"
    )


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tif"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_files_are_refused(tmp_path, suffix, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix))
    content = buffer.getvalue()
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(content[: int(share * len(content))])
    assert problem_of(path)


def test_any_cut_of_a_jpeg_gives_a_problem_or_an_image(tmp_path):
    buffer = io.BytesIO()
    two_halves(16, 16).save(buffer, "jpeg")
    content = buffer.getvalue()
    path = tmp_path / "cut.jpg"
    for end in range(0, len(content) - 2, 7):
        path.write_bytes(content[:end])
        problem_of(path)


def test_decompression_bombs_are_refused_before_decoding(tmp_path):
    header = b"P6\n20000 20000\n255\n"
    (tmp_path / "bomb.ppm").write_bytes(header)
    assert problem_of(tmp_path / "bomb.ppm") == "more than 179 million pixels"


def test_the_limit_holds_where_someone_lifted_pillows(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "bomb.ppm").write_bytes(b"P6\n20000 20000\n255\n")
    assert problem_of(tmp_path / "bomb.ppm") == "20000 x 20000 pixels, more than 179 million"


def test_large_images_below_the_limit_give_no_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow warns from there to twice that
    assert read_image(saved(tmp_path / "a.png", two_halves(16, 8)), 8).shape == (8, 16, 3)


def test_suffixes_are_ones_that_pillow_reads():
    code = (
        "from PIL import Image; Image.init();"
        "print(*(s for s, f in Image.registered_extensions().items() if f in Image.OPEN))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert {*output.stdout.split(), ".mpo"} >= IMAGE_SUFFIXES  # MPO opens as JPEG
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".gif", ".bmp"} <= IMAGE_SUFFIXES
