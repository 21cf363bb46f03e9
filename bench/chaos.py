"""Kill trainings at random moments, resume them, and compare with twins that nobody killed.

python bench/chaos.py --kills 50 --minutes 60 --out bench/results/chaos

Each training is killed with SIGKILL again and again until it has finished. Finished trainings are
kept in OUT/chaos.json: a second call goes on until there were so many kills.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from PIL import Image
from torch import Tensor

from elrcli.engine.checkpoints import load_checkpoint
from elrcli.run import RunFolder

CELLS: dict[str, tuple[int, list[str]]] = {  # processes, options
    "elr": (1, []),
    "elr-plus": (1, ["--method", "elr-plus", "--optimizer", "sgd"]),
    "workers": (1, ["--workers", "2", "--accumulate", "2"]),
    "processes": (2, ["--mixup"]),
    "cache": (1, ["--cache", "disk", "--method", "elr-halves"]),
}
COMMON = "-b test_resnet --no-pretrained --image-size 32 --batch-size 4 --epochs 4 --device cpu"
COMMON += " --workers 0 --augment strong --checkpoint-minutes 0 --quiet"
TIMES = ("seconds", "seconds_waiting", "images_per_second", "wait_share")
START_SHARE = 0.2  # of the kills fall anywhere, also while the program starts
SECONDS = 4.0  # after the first checkpoint, within which the other kills fall


def main() -> None:
    """Kill until there were enough kills or the time is used up; print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("bench/results/chaos"))
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    result = args.out / "chaos.json"
    runs: list[dict[str, Any]] = json.loads(result.read_text()) if result.exists() else []
    data = args.out / "images"
    if not data.exists():
        write_images(data, np.random.default_rng(args.seed))
    names = list(CELLS)
    while sum(run["kills"] for run in runs) < args.kills:
        name = names[len(runs) % len(names)]
        twin = args.out / f"twin-{name}"
        if not (twin / "features.safetensors").exists():
            shutil.rmtree(twin, ignore_errors=True)
            train(name, data, twin, deadline, None)
        chance = random.Random(f"{args.seed} {len(runs)}")
        victim = args.out / "victim"
        shutil.rmtree(victim, ignore_errors=True)
        run = train(name, data, victim, deadline, chance)
        if run is None:
            break
        run["differences"] = differences(victim, twin)
        runs.append(run)
        result.write_text(json.dumps(runs, indent=2) + "\n")
        print(f"{name}: {run['kills']} kills, {len(run['differences'])} differences", flush=True)
    print_table(runs)


def write_images(folder: Path, rng: np.random.Generator) -> None:
    """Write 40 noisy images of 2 classes."""
    for number in range(40):
        path = folder / ("dark", "light")[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 200, (32, 32, 3)) + 55 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(path)


def train(
    name: str, data: Path, run: Path, deadline: float, chance: random.Random | None
) -> dict[str, Any] | None:
    """Train to the end, killed by `chance`; return what happened, None if the time is used up."""
    kills = within_epoch = 0
    while True:
        if RunFolder(run).checkpoint_folder.is_dir():
            command = ["train", "--resume", str(run), "--quiet"]
        else:
            options = COMMON.split() + CELLS[name][1]
            command = ["train", str(data), "--out", str(run), "--overwrite", *options]
        before = newest(run)
        processes = start(command, CELLS[name][0])
        kill_at = None
        while any(process.poll() is None for process in processes):
            now = time.monotonic()
            if chance is not None and kill_at is None:
                if chance.random() < START_SHARE / 100:  # asked about 100 times while it starts
                    kill_at = now
                elif newest(run) != before:
                    kill_at = now + chance.uniform(0.0, SECONDS)
            if now > deadline or (kill_at is not None and now >= kill_at):
                for process in processes:
                    process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.05)
        said = [process.communicate()[1] for process in processes]
        codes = [process.returncode for process in processes]
        if codes == [0] * len(codes):
            return {"cell": name, "kills": kills, "within_epoch": within_epoch}
        if time.monotonic() > deadline:
            return None
        if -signal.SIGKILL not in codes:
            raise RuntimeError(f"{name}: ended with {codes}: {said}")
        kills += 1
        within_epoch += "-" in newest(run)[0]


def newest(run: Path) -> tuple[str, float]:
    """Return the name and time of the last checkpoint."""
    folder = RunFolder(run).checkpoint_folder
    try:
        files = [(path.stat().st_mtime, path.name) for path in folder.glob("[0-9]*.safetensors")]
    except FileNotFoundError:  # removed while it was looked at
        return newest(run)
    return max(files, default=(0.0, ""))[::-1]


def start(command: list[str], processes: int) -> list[subprocess.Popen[str]]:
    """Start the program in processes that find each other as those of torchrun do."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    started = []
    for rank in range(processes):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        numbers = {"RANK": rank, "LOCAL_RANK": rank}
        numbers |= {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        place |= {key: str(value) for key, value in numbers.items()} if processes > 1 else {}
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "elrcli", *command],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", **place},
            )
        )
    return started


def differences(one: Path, other: Path) -> list[str]:
    """Return the names of all that two runs do not have in common bit for bit, but times."""
    first, second = contents(one), contents(other)
    return sorted(
        name
        for name in first.keys() | second.keys()
        if name not in first or name not in second or not same(first[name], second[name])
    )


def contents(path: Path) -> dict[str, Any]:
    """Return the last state, the model, the features and the metrics of a run by name."""
    run = RunFolder(path)
    state = {
        "state": load_checkpoint(run.checkpoint_folder),
        "model": safetensors.torch.load_file(run.model_file),
        "features": safetensors.torch.load_file(run.features_file),
        "metrics": run.metrics(),
    }
    return {name: value for name, value in flat(state) if not name.endswith(TIMES)}


def flat(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """Return the leaves of nested mappings and lists by dotted name."""
    if not isinstance(value, Mapping | list):
        return [(name, value)]
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    return [leaf for key, part in items for leaf in flat(part, f"{name}.{key}")]


def same(one: Any, other: Any) -> bool:
    """Tell whether two leaves are equal bit for bit; NaN equals NaN."""
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes()
    return bool(one == other)


def print_table(runs: list[dict[str, Any]]) -> None:
    """Print runs, kills and differences of each kind of training."""
    print(f"{'training':<12}{'runs':>6}{'kills':>7}{'within an epoch':>17}{'different runs':>16}")
    for name in CELLS:
        own = [run for run in runs if run["cell"] == name]
        kills, within = (sum(run[key] for run in own) for key in ("kills", "within_epoch"))
        different = sum(bool(run["differences"]) for run in own)
        print(f"{name:<12}{len(own):>6}{kills:>7}{within:>17}{different:>16}")


if __name__ == "__main__":
    main()
