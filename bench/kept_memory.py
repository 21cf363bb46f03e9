"""What a network on the CPU gains where its process keeps the memory that it frees.

python bench/kept_memory.py --out bench/results/kept_memory

Times forward passes in eval mode and whole training steps at 224 pixels, each in a process of its
own that keeps freed memory or, as the C library does, hands large pieces back to the kernel. The
processes take turns; what is printed are ratios of paired rounds, of time and of peak memory.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import timm
import torch
from torch.nn import functional

from elrcli.engine.memory import keep_freed_memory

IMAGES = {"predict": 64, "train": 32}  # in a batch
WARM = 2  # calls before the first that counts


def measure(work: str, backbone: str, size: int, calls: int) -> tuple[float, int]:
    """Return the median seconds of a call, and the peak memory of this process in KiB."""
    torch.manual_seed(0)
    network = timm.create_model(backbone, num_classes=10).to(memory_format=torch.channels_last)
    images = torch.randn(IMAGES[work], 3, size, size).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (len(images),))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.001, fused=True)

    def predict() -> None:
        with torch.inference_mode():
            network(images)

    def train() -> None:
        functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    network.train(work == "train")
    call = {"predict": predict, "train": train}[work]
    seconds = []
    for _ in range(WARM + calls):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[WARM:]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run(keep: bool, work: str, backbone: str, args: argparse.Namespace) -> tuple[float, int]:
    """Measure in a process of its own."""
    words = ["--side", str(int(keep)), work, backbone, str(args.size), str(args.calls)]
    done = subprocess.run(
        [sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True
    )
    seconds, peak = json.loads(done.stdout)
    return seconds, peak


def main() -> None:
    """Measure, print, and write JSON if asked."""
    if sys.argv[1:2] == ["--side"]:
        keep, work, backbone, size, calls = sys.argv[2:]
        if int(keep):
            keep_freed_memory()
        print(json.dumps(measure(work, backbone, int(size), int(calls))))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbones", default="resnet18,resnet50")
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--calls", type=int, default=8, help="passes or steps in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for the figures as JSON")
    args = parser.parse_args()
    for backbone in args.backbones.split(","):
        for work in IMAGES:
            rounds = []
            for number in range(args.rounds):
                turns = [True, False] if number % 2 else [False, True]
                found = {keep: run(keep, work, backbone, args) for keep in turns}
                rounds.append([found[True][part] / found[False][part] for part in range(2)])
            times, peaks = zip(*rounds, strict=True)
            figures = {
                "work": work,
                "backbone": backbone,
                "image_size": args.size,
                "batch_size": IMAGES[work],
                "threads": torch.get_num_threads(),
                "ratios": {
                    "time": round(statistics.median(times), 2),
                    "peak memory": round(statistics.median(peaks), 2),
                },
                "rounds": {"time": [round(ratio, 2) for ratio in times]},
                "machine": platform.machine(),
                "torch": torch.__version__,
            }
            print(json.dumps(figures, indent=1), flush=True)
            if args.out is not None:
                args.out.mkdir(parents=True, exist_ok=True)
                path = args.out / f"{backbone}-{work}.json"
                path.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
