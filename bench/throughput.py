"""Images per second of a training on a GPU, beside the same steps without data to load.

python bench/throughput.py --cifar FOLDER --out bench/results/throughput

`elr train` on a JPEG folder (ResNet-50 at 224 pixels, photo-like files of 500x375) and on CIFAR-10
(the ResNet-34 of the paper): epoch by epoch, so that the first one reads files and later ones the
cache, with the share of the time in which the GPU was busy. The limit is the same training code
that is given one and the same batch in every step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from loader import write_photos

import elrcli
from elrcli.data.loader import Batch, RowLoader

WARM_UP = 10  # steps of an epoch that are not counted: queues fill


class Speed(elrcli.Observer):
    """Times the steps of every epoch."""

    def __init__(self) -> None:
        self.speeds: list[float] = []  # images per second
        self.spans: list[tuple[float, float]] = []  # of the wall clock
        self._seen: list[tuple[float, int]] = []

    def progress(self, stage: str, done: int, total: int | None) -> None:
        """Note when so many images were through."""
        if stage.startswith("epoch"):
            self._seen.append((time.time(), done))
            if done == total and torch.cuda.is_available():
                torch.cuda.synchronize()
                self._seen[-1] = (time.time(), done)

    def epoch_finished(self, metrics: Mapping[str, float]) -> None:
        """Close the epoch."""
        if len(self._seen) < 2:
            raise SystemExit("An epoch has one step, which gives no speed. Use more images.")
        begun, before = self._seen[min(WARM_UP, len(self._seen) // 2)]
        ended, after = self._seen[-1]
        self.speeds.append((after - before) / (ended - begun))
        self.spans.append((begun, ended))
        self._seen = []


class Utilisation:
    """Share of the time in which the GPU was busy, as nvidia-smi says."""

    def __enter__(self) -> Utilisation:
        """Start to look, five times a second."""
        query = ["--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200"]
        self.looks: list[tuple[float, float]] = []
        self._process: subprocess.Popen[str] | None = None
        if torch.cuda.is_available():
            self._file = tempfile.TemporaryFile("w+")
            self._began = time.time()
            self._process = subprocess.Popen(["nvidia-smi", *query], stdout=self._file, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            took = time.time() - self._began
            self._file.seek(0)
            values = [float(line) for line in self._file.read().split() if line.isdigit()]
            step = took / max(len(values), 1)
            self.looks = [(self._began + (i + 0.5) * step, v / 100) for i, v in enumerate(values)]

    def during(self, begun: float, ended: float) -> float | None:
        """Return the mean of a span."""
        found = [value for moment, value in self.looks if begun <= moment <= ended]
        return statistics.mean(found) if found else None


def repeated(load: Any) -> Any:
    """Return a way to load that gives the first batch again and again."""

    def epoch(self: RowLoader, number: int, start_batch: int = 0) -> Iterator[Batch]:
        batches = load(self, number, start_batch)
        first = next(batches, None)
        batches.close()
        if first is not None:
            yield from itertools.repeat(first, len(self) - start_batch)

    return epoch


def train(data: Path, settings: dict[str, Any], with_data: bool) -> dict[str, Any]:
    """Train once and return the speed and the utilisation of every epoch."""
    speed = Speed()
    load = RowLoader.epoch if with_data else repeated(RowLoader.epoch)
    with (
        tempfile.TemporaryDirectory() as out,
        mock.patch.object(RowLoader, "epoch", load),
        Utilisation() as busy,
    ):
        elrcli.train(data, out=Path(out) / "run", for_audit=False, observer=speed, **settings)
    return {
        "images_per_second": [round(value) for value in speed.speeds],
        "gpu_busy": [busy.during(*span) for span in speed.spans],
    }


def main() -> None:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cifar", type=Path, help="folder with class folders of CIFAR-10 images")
    parser.add_argument("--images", type=int, default=12_000, help="photo-like JPEGs; 0 for none")
    parser.add_argument("--batch-size", type=int, default=128, help="of ResNet-50")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--cuda-graphs", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, help="folder for the figures as JSON")
    args = parser.parse_args()
    common = {
        "pretrained": False,
        "epochs": args.epochs,
        "workers": args.workers,
        "cache": "ram",
        "cuda_graphs": args.cuda_graphs,
    }
    with tempfile.TemporaryDirectory() as made:
        works: dict[str, tuple[Path, dict[str, Any]]] = {}
        if args.cifar is not None:
            works["cifar"] = (args.cifar, {"preset": "cifar10-sym"})
        if args.images:
            write_photos(Path(made), 500, 375, 90, args.images)
            works["photos"] = (
                Path(made),
                {
                    "backbone": args.backbone,
                    "image_size": args.image_size,
                    "batch_size": args.batch_size,
                    "val_fraction": 0.02,
                },
            )
        for name, (data, settings) in works.items():
            loaded = train(data, common | settings, with_data=True)
            limit = train(data, common | settings, with_data=False)
            best = statistics.median(limit["images_per_second"][1:])
            figures = {
                "data": name,
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
                "versions": {"elr": elrcli.__version__, "torch": torch.__version__},
                "settings": common | settings,
                "training": loaded,
                "same_batch": limit,
                "first_epoch / limit": round(loaded["images_per_second"][0] / best, 3),
                "cached_epoch / limit": round(
                    statistics.median(loaded["images_per_second"][1:]) / best, 3
                ),
            }
            print(json.dumps(figures, indent=1), flush=True)
            if args.out is not None:
                args.out.mkdir(parents=True, exist_ok=True)
                (args.out / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
