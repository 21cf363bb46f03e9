"""Read one image file of any format and mode as 8-bit RGB."""

from __future__ import annotations

import os
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from elrcli.errors import DataError

# fmt: off
IMAGE_SUFFIXES = frozenset({
    ".apng", ".avif", ".bmp", ".bw", ".cur", ".dcx", ".dds", ".dib", ".gif", ".icns", ".ico", ".im",
    ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".mpo",
    ".msp", ".pbm", ".pcx", ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".qoi", ".ras", ".rgb",
    ".rgba", ".sgi", ".tga", ".tif", ".tiff", ".webp", ".xbm", ".xpm",
})
# fmt: on
MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs
MAX_ASPECT = 4  # a longer image loses its ends, so that memory stays bounded
DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
ORIENTATION_TAG = 0x0112
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageProblem(DataError):
    """Why one image cannot be read: a short line without the path."""


def read_image(path: str | os.PathLike[str], short_side: int | None = None) -> np.ndarray:
    """Return the first frame of an image file as uint8 [H, W, 3] RGB, upright and writable.

    With `short_side`, the shorter side is resized to it (bilinear with antialiasing); the longer
    side keeps the aspect, up to four times the shorter one: beyond that the ends are cut off.
    Transparent pixels become white. The file is always decoded to its end.
    """
    try:
        # Pillow warns about large images, odd palettes and damaged metadata: none of it matters
        # where the pixels can be read, and all of it would land in the middle of a progress bar.
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")
            with Image.open(file) as image:
                return _pixels(image, short_side)
    except ImageProblem:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise ImageProblem(_reason(path, error)) from error


def _pixels(image: Image.Image, short_side: int | None) -> np.ndarray:
    """Decode, crop to the widest aspect, convert, resize, turn upright: small images early."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageProblem(f"{width} x {height} pixels, more than {MAX_PIXELS / 1e6:.0f} million")
    if short_side is not None:
        # JPEG only: decode at 1/2, 1/4 or 1/8, never below the wanted size.
        image.draft(None, (short_side, short_side))
    image.load()
    orientation = _orientation(image)
    if short_side is not None:
        image = _crop_aspect(image)
    image = _to_rgb(image)
    if short_side is not None:
        image = _resize(image, short_side)
    if orientation in ORIENTATIONS:
        image = image.transpose(ORIENTATIONS[orientation])
    return np.array(image)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; call after `load`, which already turns TIFF files upright."""
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # damaged metadata: the pixels are still good
        return 1


def _crop_aspect(image: Image.Image) -> Image.Image:
    width, height = image.size
    longest = MAX_ASPECT * min(width, height)
    if max(width, height) <= longest:
        return image
    new_width, new_height = min(width, longest), min(height, longest)
    left, top = (width - new_width) // 2, (height - new_height) // 2
    return image.crop((left, top, left + new_width, top + new_height))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in DEEP_MODES:
        return Image.fromarray(_to_bytes(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_bytes(values: np.ndarray) -> np.ndarray:
    """Map 16-bit, 32-bit and float grey values [H, W] to uint8.

    16-bit files span 0..65535. The wider modes do not say their range, so the largest value
    tells: up to 1 (floats), up to 255, up to 65535, else smallest to largest.
    """
    if values.dtype.itemsize == 2:
        return _round(values / 257.0)
    is_float = values.dtype.kind == "f"
    values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    top = float(values.max())
    if is_float and top <= 1.0:
        return _round(values * 255.0)
    if top <= 255.0:
        return _round(values)
    if top <= 65535.0:
        return _round(values / 257.0)
    low = float(values.min())
    return _round((values - low) * (255.0 / (top - low)))


def _round(values: np.ndarray) -> np.ndarray:
    return np.asarray(np.clip(np.rint(values), 0, 255), dtype=np.uint8)


def _resize(image: Image.Image, short_side: int) -> Image.Image:
    width, height = image.size
    scale = short_side / min(width, height)
    size = (max(short_side, round(width * scale)), max(short_side, round(height * scale)))
    if size == image.size:
        return image
    return image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)


def _reason(path: str | os.PathLike[str], error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "the file does not exist"
    if isinstance(error, PermissionError):
        return "no permission to read the file"
    if isinstance(error, IsADirectoryError):
        return "a folder, not an image"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS / 1e6:.0f} million pixels"
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    if isinstance(error, UnidentifiedImageError):
        is_empty = os.path.getsize(path) == 0
        return "the file is empty" if is_empty else "not an image in a format that Pillow reads"
    detail = " ".join(str(error).split()) or type(error).__name__
    return f"damaged image: {detail[:120]}"
