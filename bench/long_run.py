"""Memory over a long training: does it stay where it is after a few epochs?

python bench/long_run.py --epochs 200

Trains a tiny network in a fresh process for each kind of training. After every epoch, when its
checkpoint is written, it notes the resident memory of the process and the private memory of the
loading processes. Printed is the largest distance from the memory after epoch 10.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from elrcli import api
from elrcli.engine.observer import Observer

CELLS: dict[str, dict[str, Any]] = {
    "elr": {"workers": 0},
    "workers": {"workers": 2},
    "elr-plus": {"workers": 0, "method": "elr-plus"},
}
SETTLED = 10  # epochs, after which memory must not grow
IMAGES = 200


class Memory(Observer):
    """Notes the memory after each epoch."""

    def __init__(self) -> None:
        self.megabytes: list[float] = []

    def epoch_finished(self, metrics: Mapping[str, float]) -> None:
        """Called when the epoch's checkpoint is written."""
        children = Path("/proc/self/task").glob("*/children")
        workers = [pid for listed in children for pid in listed.read_text().split()]
        kilobytes = kilobytes_of("self", ("Rss",))
        kilobytes += sum(kilobytes_of(pid, ("Private_Clean", "Private_Dirty")) for pid in workers)
        self.megabytes.append(round(kilobytes / 1024, 2))


def kilobytes_of(pid: str, names: tuple[str, ...]) -> int:
    """Return the sum of some figures of a process's memory."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    figures = {
        name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)
    }
    return sum(figures[name] for name in names)


def write_images(folder: Path) -> None:
    """Write noisy images of 3 classes."""
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        path = folder / "abc"[number % 3] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 150, (32, 32, 3)) + 50 * (number % 3)
        Image.fromarray(pixels.astype(np.uint8)).save(path)


def measure(name: str, epochs: int) -> dict[str, Any]:
    """Train in this process; return the memory after every epoch."""
    memory, started = Memory(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="elr-long-") as folder:
        data = Path(folder) / "images"
        write_images(data)
        api.train(
            data,
            out=Path(folder) / "run",
            observer=memory,
            epochs=epochs,
            backbone="test_resnet",
            pretrained=False,
            image_size=32,
            batch_size=32,
            device="cpu",
            **CELLS[name],
        )
    return {
        "epochs": epochs,
        "seconds": round(time.monotonic() - started),
        "megabytes": memory.megabytes,
    }


def print_table(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Print memory after epoch 10 and the last one, and the largest distance between."""
    print(f"| training | epochs | MB after epoch {SETTLED} | MB at the end | least | most |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, result in results.items():
        first, *_ = settled = result["megabytes"][SETTLED - 1 :]
        least, most = min(settled) / first - 1, max(settled) / first - 1
        figures = f"{first:.1f} | {settled[-1]:.1f} | {100 * least:+.2f}% | {100 * most:+.2f}%"
        print(f"| {name} | {result['epochs']} | {figures} |")


def main() -> None:
    """Measure every cell in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=200, help=f"at least {SETTLED}")
    parser.add_argument("--cells", nargs="*", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--out", type=Path, default=Path("bench/results/long_run"))
    parser.add_argument("--child", choices=list(CELLS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child, args.epochs)))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in args.cells:
        command = [sys.executable, __file__, "--child", name, "--epochs", str(args.epochs)]
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        results[name] = json.loads(said)
        (args.out / f"{name}.json").write_text(json.dumps(results[name]) + "\n")
    print_table(results)


if __name__ == "__main__":
    main()
