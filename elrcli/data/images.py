"""Read one image file of any format and mode as 8-bit RGB."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from elrcli.errors import DataError

cv2.setNumThreads(0)  # the loader's processes are the parallelism

# fmt: off
IMAGE_SUFFIXES = frozenset({
    ".apng", ".avif", ".bmp", ".bw", ".cur", ".dcx", ".dds", ".dib", ".gif", ".icns", ".ico", ".im",
    ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".mpo",
    ".msp", ".pbm", ".pcx", ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".qoi", ".ras", ".rgb",
    ".rgba", ".sgi", ".tga", ".tif", ".tiff", ".webp", ".xbm", ".xpm",
})
# fmt: on
MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs
LARGEST_JPEG = 1 << 28  # bytes read at once; a larger file is decoded piece by piece
STRIP = 4_194_304  # pixels whose colours are converted at once: some ways take 16 bytes for each
MAX_ASPECT = 4  # a longer image loses its ends, so that memory stays bounded
DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
ORIENTATION_TAG = 0x0112
ORIENTATIONS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}
TURNED = (5, 6, 7, 8)  # orientations that swap height and width
END_OF_JPEG = b"\xff\xd9"
DECODERS = {  # OpenCV's, at one pixel for so many a side
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}


class ImageProblem(DataError):
    """Why one image cannot be read: a short line without the path."""


class Window(NamedTuple):
    """A part of an upright image, in shares of its height and width."""

    top: float
    left: float
    height: float
    width: float


def read_image(path: str | os.PathLike[str], short_side: int | None = None) -> np.ndarray:
    """Return the first frame of an image file as uint8 [H, W, 3] RGB, upright and writable.

    With `short_side`, the shorter side is resized to it (bilinear with antialiasing); the longer
    side keeps the aspect, up to four times the shorter one: beyond that the ends are cut off.
    Transparent pixels become white. The file is always decoded to its end. Raises ImageProblem.
    """
    if short_side is None:
        return _decode(path, lambda height, width: 1.0)
    pixels = _without_ends(_decode(path, lambda height, width: short_side / min(height, width)))
    height, width = pixels.shape[:2]
    scale = short_side / min(height, width)
    size = max(short_side, round(height * scale)), max(short_side, round(width * scale))
    return np.ascontiguousarray(resize(pixels, *size))


def read_window(
    path: str | os.PathLike[str], size: int, choose: Callable[[int, int], Window]
) -> np.ndarray:
    """Return one window of an image file as uint8 [size, size, 3] RGB.

    `choose` is called once with height and width of the upright image, in pixels, without the
    ends of a very long one. Otherwise as `read_image`.
    """
    windows: list[Window] = []

    def scale(height: int, width: int) -> float:
        height, width = _shape_without_ends(height, width)
        window = choose(height, width)
        windows.append(window)
        return max(size / (window.height * height), size / (window.width * width))

    pixels = _decode(path, scale)
    return cut(_without_ends(pixels), windows[0], size)


def cut(pixels: np.ndarray, window: Window, size: int) -> np.ndarray:
    """Return a window of pixels uint8 [H, W, 3], scaled to [size, size, 3]."""
    height, width = pixels.shape[:2]
    top = min(round(window.top * height), height - 1)
    left = min(round(window.left * width), width - 1)
    bottom = max(round((window.top + window.height) * height), top + 1)
    right = max(round((window.left + window.width) * width), left + 1)
    return resize(pixels[top:bottom, left:right], size, size)


def resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return pixels uint8 [H, W, 3] at another size: bilinear, with antialiasing to shrink.

    Not for the last fifth: so little leaves no pixel out, and takes half the time without.
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    if pixels.shape[0] <= 1.2 * height and pixels.shape[1] <= 1.2 * width:
        return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
    # The numbers of Pillow's resize up to one grey level, in a third of the time.
    import torch  # only here: listing a folder should not wait for it

    planes = torch.from_numpy(np.array(pixels))[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(
        planes, (height, width), mode="bilinear", antialias=True
    )
    shrunk: np.ndarray = resized[0].permute(1, 2, 0).numpy()
    return shrunk


def _decode(path: str | os.PathLike[str], scale: Callable[[int, int], float]) -> np.ndarray:
    """Return the upright pixels [H, W, 3], of a JPEG file at 1/2, 1/4 or 1/8 where that will do.

    `scale(height, width)` of the upright image says what share of its pixels a side is needed.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode) and not os.path.isdir(path):
            raise ImageProblem("not a regular file")  # opening a pipe might wait for ever
        # Pillow warns about large images, odd palettes and damaged metadata: none of it matters
        # where the pixels can be read, and all of it would land in the middle of a progress bar.
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")
            with Image.open(file) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise ImageProblem(
                        f"{width} x {height} pixels, more than {MAX_PIXELS / 1e6:.0f} million"
                    )
                if image.format == "EPS":
                    raise ImageProblem("EPS is a program, which is not run. Convert it to PNG")
                if image.format in ("JPEG", "MPO"):
                    return _jpeg(image, file, scale)
                image.load()  # turns TIFF files upright already
                pixels = _upright(np.array(_to_rgb(image)), _orientation(image))
                scale(*pixels.shape[:2])
                return pixels
    except ImageProblem:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise ImageProblem(_reason(path, error)) from error


def _jpeg(image: Image.Image, file: IO[bytes], scale: Callable[[int, int], float]) -> np.ndarray:
    """Decode a JPEG file whose header Pillow has read."""
    orientation = _orientation(image)
    width, height = image.size
    wanted = scale(width, height) if orientation in TURNED else scale(height, width)
    step = next(step for step in (8, 4, 2, 1) if step == 1 or step * wanted <= 1)
    if image.mode in ("RGB", "L") and os.fstat(file.fileno()).st_size <= LARGEST_JPEG:
        file.seek(0)
        data = file.read()
        # OpenCV gives the same pixels sooner. But not every version of it tells where a file
        # ends too early, and some fill the rest with grey.
        if data.endswith(END_OF_JPEG):
            flags = DECODERS[step] | cv2.IMREAD_IGNORE_ORIENTATION
            pixels = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), flags)
            if pixels is not None:
                return _upright(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), orientation)
        file.seek(0)
    image.draft(None, (-(-width // step), -(-height // step)))
    return _upright(np.array(_to_rgb(image)), orientation)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; TIFF files must be loaded before, which turns them upright."""
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # damaged metadata: the pixels are still good
        return 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    if orientation not in ORIENTATIONS:
        return pixels
    return np.ascontiguousarray(ORIENTATIONS[orientation](pixels))


def _without_ends(pixels: np.ndarray) -> np.ndarray:
    """Return the middle [h, w, 3] of pixels [H, W, 3] that is not too long."""
    height, width = pixels.shape[:2]
    new_height, new_width = _shape_without_ends(height, width)
    top, left = (height - new_height) // 2, (width - new_width) // 2
    return pixels[top : top + new_height, left : left + new_width]


def _shape_without_ends(height: int, width: int) -> tuple[int, int]:
    longest = MAX_ASPECT * min(height, width)
    return min(height, longest), min(width, longest)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in DEEP_MODES:
        return Image.fromarray(_to_bytes(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        flat = Image.new("RGB", image.size)
        for box in _strips(*image.size):
            flat.paste(_on_white(image.crop(box)), box)
        return flat
    return image if image.mode == "RGB" else image.convert("RGB")


def _strips(width: int, height: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield boxes (left, top, right, bottom) of full width and few pixels."""
    step = max(1, STRIP // width)
    for top in range(0, height, step):
        yield 0, top, width, min(top + step, height)


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _to_bytes(values: np.ndarray) -> np.ndarray:
    """Map 16-bit, 32-bit and float grey values [H, W] to uint8.

    16-bit files span 0..65535. The wider modes do not say their range, so the largest value
    tells: up to 1 (floats), up to 255, up to 65535, else smallest to largest.
    """
    height, width = values.shape
    strips = [slice(top, bottom) for _, top, _, bottom in _strips(width, height)]
    low, factor = 0.0, 1 / 257
    if values.dtype.itemsize > 2:
        low, factor = _range(values, strips)
    grey = np.empty(values.shape, dtype=np.uint8)
    for strip in strips:
        scaled = (_finite(values[strip]) - low) * factor
        grey[strip] = np.clip(np.rint(scaled), 0, 255)
    return grey


def _range(values: np.ndarray, strips: list[slice]) -> tuple[float, float]:
    """Return the value that becomes black, and how many of 255 steps a unit is worth."""
    top = max(float(_finite(values[strip]).max()) for strip in strips)
    if values.dtype.kind == "f" and top <= 1.0:
        return 0.0, 255.0
    if top <= 65535.0:
        return 0.0, 1.0 if top <= 255.0 else 1 / 257
    low = min(float(_finite(values[strip]).min()) for strip in strips)
    return low, 255.0 / max(top - low, 1.0)


def _finite(values: np.ndarray) -> np.ndarray:
    return np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)


def _reason(path: str | os.PathLike[str], error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        is_link = os.path.islink(path)
        return "a link that leads nowhere" if is_link else "the file does not exist"
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
    if isinstance(error, OSError) and error.errno and error.strerror:
        return f"cannot be read: {error.strerror}"
    detail = " ".join(str(error).split()) or type(error).__name__
    return f"damaged image: {detail[:120]}"
