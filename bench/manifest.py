"""Memory of a manifest of many rows, and of the workers that load from it, epoch by epoch.

python bench/manifest.py --rows 10000000

Writes `manifest.csv` of a run with made-up paths, reads it, and lets two workers look for a random
part of its images in each epoch; there are none, so only the manifest is at work. What a worker
owns alone must not grow with the epochs. With `--csv` the file is read as a CSV file of a user,
whose images are taken for granted.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from elrcli.data.loader import RowLoader
from elrcli.data.manifest import load_data, read_manifest
from elrcli.data.transforms import train_transform

CLASSES = [f"class {label:04d}" for label in range(1000)]
LOOKED_AT = 200_000  # rows an epoch, from all over the manifest


def megabytes(process: str, field: str) -> float:
    """Return one line of a process's memory summary."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--csv", action="store_true", help="read it as a user's CSV file")
    args = parser.parse_args()
    figures: dict[str, object] = {"rows": args.rows, "start_mb": round(megabytes("self", "Rss"))}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "manifest.csv"
        with open(path, "w") as file:
            file.write("path,label,split\n")
            for row in range(args.rows):
                file.write(f"images/{row // 1000:05d}/{row:08d}.jpg,{CLASSES[row % 1000]},train\n")
        started = time.monotonic()
        if args.csv:
            os.path.exists = lambda path: True
            manifest = load_data(path)
        else:
            manifest = read_manifest(path, Path(folder), CLASSES)
        figures["read_seconds"] = round(time.monotonic() - started, 1)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        figures["read_peak_mb"] = round(peak)
        gc.collect()
        figures["held_mb"] = round(megabytes("self", "Rss"))
        rows = np.random.default_rng(0).permutation(args.rows)[:LOOKED_AT]
        loader = RowLoader(
            manifest,
            rows,
            train_transform("light", 32, flip=True),
            batch_size=64,
            workers=2,
            seed=0,
            shuffle=True,
        )
        private = []
        for epoch in range(args.epochs):
            for _ in loader.epoch(epoch):
                pass
            workers = [str(worker.pid) for worker in multiprocessing.active_children()]
            private.append(round(max(megabytes(worker, "Private_Dirty") for worker in workers)))
        figures["worker_private_mb_by_epoch"] = private
        figures["program_mb"] = round(megabytes("self", "Rss"))
    print(json.dumps(figures))


if __name__ == "__main__":
    assert os.path.exists("/proc/self/smaps_rollup"), "needs Linux"
    main()
