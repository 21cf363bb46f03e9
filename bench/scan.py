"""How long it takes to list a folder of many small files, warm, and to start `elr --help`.

python bench/scan.py --files 200000
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from elrcli.data.manifest import load_data

CLASSES = 20


def main() -> None:
    """Print the times, the best of three."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=200_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for label in range(CLASSES):
            (folder / f"class{label}").mkdir()
        for number in range(args.files):
            (folder / f"class{number % CLASSES}" / f"{number:07d}.jpg").write_bytes(b"x")
        seconds = min(timed(lambda: load_data(folder)) for _ in range(3))
        per_100k = seconds * 100_000 / args.files
        print(f"scan of {args.files:,} files: {seconds:.2f} s, {per_100k:.2f} s per 100,000")
    command = [sys.executable, "-m", "elrcli", "--help"]
    start = min(
        timed(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
        for _ in range(5)
    )
    print(f"elr --help: {start:.2f} s")


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that one call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
