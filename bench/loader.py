"""Images per second from JPEG files into the device, beside timm's and torchvision's loaders.

python bench/loader.py --out bench/results/loader

Makes photo-like JPEGs of three sizes, loads them with the same augmentation, batch size and number
of workers, in rounds that take turns, and prints ratios: the machine's mood cancels out of them.
Also per second of CPU time, of all processes together: what counts where others use the machine.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_loader
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from elrcli.data.cache import ImageCache
from elrcli.data.loader import RowLoader
from elrcli.data.manifest import load_data
from elrcli.data.transforms import AREAS, RATIOS, train_transform
from elrcli.engine.device import choose_runtime
from elrcli.models import Preprocessing

# width, height, JPEG quality, images, batch size, size of the network's input
SIZES = {
    "32": (32, 32, 90, 8192, 128, 32),
    "500x375": (500, 375, 90, 768, 32, 224),
    "2048x1536": (2048, 1536, 85, 128, 16, 224),
}
PICTURES = 24
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Epoch = Callable[[int], Iterator[Tensor]]  # normalised batches on the device


def write_photos(folder: Path, width: int, height: int, quality: int, count: int) -> int:
    """Write JPEGs that are like photographs to a decoder; return their mean size in bytes.

    The spectrum falls like that of photographs, and fine detail is there in parts of the picture
    only. Each picture has several names: they take longer to make than to read.
    """
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf  # no constant part

    def field(fall: float) -> np.ndarray:
        waves = rng.standard_normal(frequency.shape) + 1j * rng.standard_normal(frequency.shape)
        values: np.ndarray = np.fft.irfft2(waves * frequency**-fall, (height, width))
        values /= values.std()
        return values

    pictures: list[bytes] = []
    for _ in range(PICTURES):
        fall = rng.uniform(0.8, 1.1)
        in_focus = 1 / (1 + np.exp(-4 * field(2.5)))
        light = field(2.0) + 0.5 * in_focus * field(fall)
        blue, red = field(fall + 0.3), field(fall + 0.3)
        colours = np.stack([red, -0.4 * blue - 0.6 * red, blue], axis=2)
        pixels = 128 + 45 * light[..., None] + 15 * colours
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "jpeg", quality=quality)
        pictures.append(buffer.getvalue())
    for number in range(count):
        path = folder / "ab"[number % 2] / f"{number:05d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pictures[number % len(pictures)])
    return sum(map(len, pictures)) // len(pictures)


def ours(
    folder: Path, size: int, batch: int, args: argparse.Namespace, cached: bool
) -> tuple[Epoch, Epoch]:
    """Return the loader of `elr train`, and the same up to its uint8 batches on the host."""
    manifest = load_data(folder)
    transform = train_transform(args.augment, size, flip=True)
    runtime, prepared = choose_runtime(args.device, "fp32"), Preprocessing(size, MEAN, STD)
    loader = RowLoader(
        manifest,
        np.arange(len(manifest)),
        transform,
        batch_size=batch,
        workers=args.workers,
        seed=0,
        shuffle=True,
        cache=ImageCache(manifest, transform.load_size, "ram") if cached else None,
        pin_memory=runtime.device.type == "cuda",
    )
    return (
        lambda epoch: (runtime.normalise(batch.images, prepared) for batch in loader.epoch(epoch)),
        lambda epoch: (batch.images for batch in loader.epoch(epoch)),
    )


def timms(folder: Path, size: int, batch: int, args: argparse.Namespace) -> Epoch:
    """Return timm's loader with its prefetcher: uint8 to the device, normalised there."""
    loader = create_loader(
        create_dataset("", str(folder)),
        input_size=(3, size, size),
        batch_size=batch,
        is_training=True,
        scale=AREAS,
        ratio=RATIOS,
        hflip=0.5,
        color_jitter=None,  # type: ignore[arg-type] # for none, says its code
        interpolation="bilinear",
        mean=MEAN,
        std=STD,
        num_workers=args.workers,
        persistent_workers=True,
        pin_memory=args.device != "cpu",
        device=torch.device(args.device),
    )
    return lambda epoch: (images for images, _ in loader)


def torchvisions(folder: Path, size: int, batch: int, args: argparse.Namespace) -> Epoch:
    """Return torchvision's folder in torch's loader: uint8 to the device, normalised there."""
    bilinear = transforms.InterpolationMode.BILINEAR
    if args.augment == "light":
        crop = [
            transforms.Resize(size, bilinear),
            transforms.RandomCrop(size, padding=size // 8, padding_mode="reflect"),
        ]
    else:
        crop = [transforms.RandomResizedCrop(size, AREAS, RATIOS, bilinear)]
    chain = transforms.Compose([*crop, transforms.RandomHorizontalFlip(), transforms.PILToTensor()])
    loader = DataLoader(
        datasets.ImageFolder(str(folder), chain),
        batch_size=batch,
        shuffle=True,
        num_workers=args.workers,
        persistent_workers=True,
        pin_memory=args.device != "cpu",
    )
    mean = 255 * torch.tensor(MEAN, device=args.device).view(1, 3, 1, 1)
    std = 255 * torch.tensor(STD, device=args.device).view(1, 3, 1, 1)
    return lambda epoch: (
        images.to(args.device, non_blocking=True).float().sub_(mean).div_(std)
        for images, _ in loader
    )


def cpu_seconds() -> float:
    """Return the CPU time of this process and its workers."""
    total = time.process_time()
    for worker in multiprocessing.active_children():
        for thread in Path(f"/proc/{worker.pid}/task").iterdir():
            total += int((thread / "schedstat").read_text().split()[0]) / 1e9
    return total


def speed(epoch: Epoch, number: int) -> tuple[float, float]:
    """Return images per second and per second of CPU time of one epoch."""
    cpu, started = cpu_seconds(), time.perf_counter()
    images = sum(len(batch) for batch in epoch(number))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return images / (time.perf_counter() - started), images / (cpu_seconds() - cpu)


def measure(name: str, args: argparse.Namespace) -> dict[str, object]:
    """Return speeds and ratios for one size of files."""
    width, height, quality, count, batch, size = SIZES[name]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        file_bytes = write_photos(folder, width, height, quality, count)
        plain = ours(folder, size, batch, args, cached=False)
        cached = ours(folder, size, batch, args, cached=True)
        epochs = {
            "elr": plain[0],
            "elr, cached": cached[0],
            "elr, uint8": plain[1],
            "elr, cached, uint8": cached[1],
            "torchvision": torchvisions(folder, size, batch, args),
        }
        if args.augment != "light":  # which timm does not have
            epochs["timm"] = timms(folder, size, batch, args)
        for epoch in epochs.values():
            speed(epoch, 0)  # starts the workers, fills the cache
        rounds = [
            {key: speed(epoch, number) for key, epoch in epochs.items()}
            for number in range(1, args.rounds + 1)
        ]
    peers = [key for key in epochs if not key.startswith("elr")]

    def ratios(clock: int) -> dict[str, list[float]]:
        speeds = [{key: found[clock] for key, found in r.items()} for r in rounds]
        best = [max(r[peer] for peer in peers) for r in speeds]
        return {
            "elr / faster peer": [r["elr"] / b for r, b in zip(speeds, best, strict=True)],
            **{f"elr / {peer}": [r["elr"] / r[peer] for r in speeds] for peer in peers},
            "cached / faster peer": [
                r["elr, cached"] / b for r, b in zip(speeds, best, strict=True)
            ],
            "cached / elr": [r["elr, cached"] / r["elr"] for r in speeds],
            "cached / elr, uint8": [r["elr, cached, uint8"] / r["elr, uint8"] for r in speeds],
        }

    def medians(clock: int) -> dict[str, float]:
        return {key: round(statistics.median(v), 2) for key, v in ratios(clock).items()}

    return {
        "size": name,
        "file_bytes": file_bytes,
        "image_size": size,
        "batch_size": batch,
        "images_per_second": {
            key: round(statistics.median(r[key][0] for r in rounds)) for key in epochs
        },
        "ratios": medians(0),
        "ratios_of_cpu_time": medians(1),
        "rounds": {key: [round(v, 2) for v in values] for key, values in ratios(0).items()},
    }


def main() -> None:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--augment", choices=("standard", "light"), default="standard")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="folder for the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)  # for normalising on a CPU: the cores are for the workers
    for name in args.sizes.split(","):
        figures = {
            "augment": args.augment,
            "workers": args.workers,
            "device": args.device if args.device == "cpu" else torch.cuda.get_device_name(),
            "machine": platform.machine(),
            "versions": {
                package: version(package)
                for package in ("torch", "torchvision", "timm", "pillow", "numpy")
            },
            **measure(name, args),
        }
        print(json.dumps(figures, indent=1), flush=True)
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            path = args.out / f"{args.augment}-{name}.json"
            path.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
