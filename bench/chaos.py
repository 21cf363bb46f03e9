"""Kill trainings at random moments, resume them, and compare with twins that nobody killed.

python bench/chaos.py --kills 50 --minutes 60

Each training meets SIGKILL five times, in random order and at random moments: once while the
program starts, within an epoch, while a checkpoint is written, in validation, and in the last look
at all images. Of two processes one is killed or both. What has finished is kept in OUT/chaos.json,
and a second call goes on until there were so many kills. Runs and images lie in WORK. The program
is forked from a process that has imported everything: what is left of its start touches files.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from elrcli.audit.run import audit_run
from elrcli.cli.app import main as run_elr
from elrcli.engine.checkpoints import NAME, load_checkpoint
from elrcli.run import LEFTOVER, RunFolder

CELLS: dict[str, tuple[int, list[str]]] = {  # processes, options
    "elr": (1, []),
    "elr-plus": (1, ["--method", "elr-plus", "--optimizer", "sgd"]),
    "workers": (1, ["--workers", "2", "--accumulate", "2"]),
    "processes": (2, ["--mixup"]),
    "cache": (1, ["--cache", "disk", "--method", "elr-halves", "--checkpoint-minutes", "0.002"]),
}
EPOCHS = 4
COMMON = "-b test_resnet --no-pretrained --image-size 32 --batch-size 4 --val-fraction 0.25"
COMMON += f" --epochs {EPOCHS} --device cpu --workers 0 --augment strong --quiet"
COMMON += " --checkpoint-minutes 0"
IMAGES = 80
BATCHES = {1: (15, 5), 2: (8, 3)}  # of 60 training and 20 validation images, by processes
PLACES = ("start", "epoch", "checkpoint", "validation", "features")
START_SECONDS = 2.0  # within which the kill of a start falls
MOST_LATE = 0.1  # seconds after a place is reached, within which its kill falls
TIMES = ("seconds", "seconds_waiting", "images_per_second", "wait_share")
PROGRAM = multiprocessing.get_context("forkserver")
SETTLING = 60.0  # seconds after a kill, within which all that belonged to it must end


def main() -> None:
    """Kill until there were enough kills or the time is used up; print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("bench/results/chaos"))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "elr-chaos")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    PROGRAM.set_forkserver_preload(["elrcli.engine.fit", "elrcli.audit.run", "elrcli.cli.train"])
    deadline = time.monotonic() + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    result = args.out / "chaos.json"
    runs: list[dict[str, Any]] = json.loads(result.read_text()) if result.exists() else []
    data = args.work / "images"
    if not data.exists():
        write_images(data, np.random.default_rng(args.seed))
    names = list(CELLS)
    while sum(len(run["kills"]) for run in runs) < args.kills and time.monotonic() < deadline:
        name = names[len(runs) % len(names)]
        twin = args.work / f"twin-{name}"
        if not (twin / "features.safetensors").exists():
            shutil.rmtree(twin, ignore_errors=True)
            Training(name, data, twin).run_once("nowhere", (0, 0), random.Random(0))
        chance = random.Random(f"{args.seed} {len(runs)}")
        training = Training(name, data, args.work / f"victim-{name}")
        shutil.rmtree(training.run.path, ignore_errors=True)
        kills = training.run_and_kill(chance)
        different = differences(training.run.path, twin)
        runs.append({"cell": name, "kills": kills, "differences": different})
        result.write_text(json.dumps(runs) + "\n")
        hits = ", ".join(kill["place"] for kill in kills)
        print(f"{name}: killed in {hits}; {len(different)} differences", flush=True)
    print_table(runs)


def write_images(folder: Path, rng: np.random.Generator) -> None:
    """Write noisy images of 2 classes."""
    for number in range(IMAGES):
        path = folder / ("dark", "light")[number % 2] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 200, (32, 32, 3)) + 55 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(path)


class Training:
    """One training: how it is started, where it is, and how it is killed."""

    def __init__(self, name: str, data: Path, run: Path) -> None:
        self.data, self.run = data, RunFolder(run)
        self.processes, self.options = CELLS[name]
        self.log = run.with_suffix(".log")

    def run_and_kill(self, chance: random.Random) -> list[dict[str, Any]]:
        """Train to the end; return what each kill has hit."""
        *others, last = PLACES
        places = chance.sample(others, len(others))
        epochs = sorted(chance.choices(range(EPOCHS), k=len(others)))
        train, val = BATCHES[self.processes]
        batches = {
            "start": 0,
            "epoch": chance.randrange(train),
            "checkpoint": chance.randrange(train + val),
            "validation": train + chance.randrange(val),
        }
        aims = [
            (place, (epoch, batches[place])) for place, epoch in zip(places, epochs, strict=True)
        ]
        kills = []
        for wanted, begin in [*aims, (last, (EPOCHS, 0)), ("nowhere", (0, 0))]:
            kill = self.run_once(wanted, begin, chance)
            if kill is None:
                break
            kills.append(kill)
        return kills

    def run_once(
        self, wanted: str, begin: tuple[int, int], chance: random.Random
    ) -> dict[str, Any] | None:
        """Start or go on, and kill at `wanted` from an epoch and batch on; return what was hit.

        None if the training has ended. The last look at all images is the last chance.
        """
        before = self.mark()
        processes = self.start()
        kill_at = time.monotonic() + chance.uniform(0, START_SECONDS) if wanted == "start" else None
        while any(process.is_alive() for process in processes):
            place = self.place(before)
            is_there = place == wanted and self.mark()[:2] >= begin
            is_last_chance = place == "features" and wanted != "nowhere"
            if kill_at is None and (is_there or is_last_chance):
                late = 0.0 if place == "checkpoint" else chance.uniform(0, MOST_LATE)
                kill_at = time.monotonic() + late
            if kill_at is not None and time.monotonic() >= kill_at:
                return {"wanted": wanted} | self.kill(processes, before, chance)
            time.sleep(0.002)
        codes = [process.exitcode for process in processes]
        if any(codes):
            raise RuntimeError(f"{self.run.path}: ended with {codes}: {self.log.read_text()}")
        return None

    def mark(self) -> tuple[int, int, int, int]:
        """Return epoch, batch and time of the last checkpoint, and the time of the model."""
        try:
            files = [
                (path.stat().st_mtime_ns, int(match[1]), int(match[2] or 0))
                for path in self.run.checkpoint_folder.glob("[0-9]*")
                if (match := NAME.fullmatch(path.name))
            ]
        except FileNotFoundError:  # removed while it was looked at
            return self.mark()
        when, epoch, batch = max(files, default=(0, 0, 0))
        model = self.run.model_file
        return epoch, batch, when, model.stat().st_mtime_ns if model.exists() else 0

    def place(self, before: tuple[int, int, int, int]) -> str:
        """Return where the training is that found the mark `before` when it began."""
        mark = self.mark()
        if mark == before:
            return "start"
        if any(LEFTOVER.fullmatch(path.name) for path in self.run.checkpoint_folder.glob(".*")):
            return "checkpoint"
        if mark[3] != before[3]:
            return "features"
        return "validation" if mark[1] >= BATCHES[self.processes][0] else "epoch"

    def kill(
        self,
        processes: list[BaseProcess],
        before: tuple[int, int, int, int],
        chance: random.Random,
    ) -> dict[str, Any]:
        """Kill one process or all, and wait until everything that belonged to them has ended."""
        victims = processes
        if self.place(before) != "start":  # there the other one would wait for it
            victims = chance.choice([processes, processes[:1], processes[-1:]])
        for process in victims:
            process.kill()
        deadline = time.monotonic() + SETTLING
        for process in processes:
            process.join(SETTLING)
        codes = [process.exitcode for process in processes]
        if any(code not in (1, -signal.SIGKILL) for code in codes):
            raise RuntimeError(f"{self.run.path}: ended with {codes}: {self.log.read_text()}")
        while left := living(process.pid for process in processes if process.pid):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.run.path}: {left} live on after their training")
            time.sleep(0.1)
        epoch, batch, *_ = self.mark()
        killed = [processes.index(process) for process in victims]
        return {"place": self.place(before), "epoch": epoch, "batch": batch, "killed": killed}

    def start(self) -> list[BaseProcess]:
        """Start the program in processes that find each other as those of torchrun do."""
        path = str(self.run.path)
        command = ["train", str(self.data), "--out", path, "--overwrite"]
        command += [*COMMON.split(), *self.options]
        if self.run.metrics_file.is_file():  # written after the first checkpoint
            command = ["train", "--resume", path, "--quiet"]
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        started: list[BaseProcess] = []
        for rank in range(self.processes):
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            numbers = {"RANK": rank, "LOCAL_RANK": rank}
            numbers |= {"WORLD_SIZE": self.processes, "LOCAL_WORLD_SIZE": self.processes}
            place |= {key: str(value) for key, value in numbers.items()}
            arguments = (command, place if self.processes > 1 else {}, self.log)
            process = PROGRAM.Process(target=run_program, args=arguments)
            process.start()
            started.append(process)
        return started


def run_program(command: list[str], place: Mapping[str, str], log: Path) -> None:
    """Do what `elr` does in a process group of its own, with its messages in a file."""
    os.setsid()
    os.environ.update(place)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.argv = ["elr", *command]
    run_elr()


def living(groups: Iterable[int]) -> list[int]:
    """Return the processes of process groups that have not ended."""
    wanted, found = set(groups), []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
            if int(group) in wanted and state != "Z":
                found.append(int(path.parent.name))
    return found


def differences(one: Path, other: Path) -> list[str]:
    """Return the names of all that two runs do not have in common bit for bit, but times."""
    first, second = contents(one), contents(other)
    return sorted(
        name
        for name in first.keys() | second.keys()
        if name not in first or name not in second or not same(first[name], second[name])
    )


def contents(path: Path) -> dict[str, Any]:
    """Return the last state, model, features, metrics and audit of a run by name."""
    run = RunFolder(path)
    audit = audit_run(path, report=False)
    state = {
        "state": load_checkpoint(run.checkpoint_folder),
        "model": safetensors.torch.load_file(run.model_file),
        "features": safetensors.torch.load_file(run.features_file),
        "metrics": run.metrics(),
        "audit": (run.audit_folder / "audit.csv").read_text(),
        "summary": {name: value for name, value in audit.summary.items() if name != "run"},
    }
    return {name: value for name, value in flat(state) if not name.endswith(TIMES)}


def flat(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """Return the leaves of nested mappings and lists by dotted name."""
    if not isinstance(value, Mapping | list):
        return [(name, value)]
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    return [leaf for key, part in items for leaf in flat(part, f"{name}.{key}")]


def same(one: Any, other: Any) -> bool:
    """Tell whether two leaves are equal, tensors bit for bit."""
    if isinstance(one, Tensor):
        other_bytes: bytes = other.numpy().tobytes()
        return one.dtype == other.dtype and one.numpy().tobytes() == other_bytes
    return bool(one == other)


def print_table(runs: list[dict[str, Any]]) -> None:
    """Print the runs, where their kills fell, and how many differ from their twins."""
    print("| training | runs | kills |", " | ".join(PLACES), "| different runs |")
    print("| --- |" + " ---: |" * (len(PLACES) + 3))
    for name in [*CELLS, "all"]:
        own = [run for run in runs if name in (run["cell"], "all")]
        hits = Counter(kill["place"] for run in own for kill in run["kills"])
        different = sum(bool(run["differences"]) for run in own)
        counts = [len(own), hits.total(), *(hits[place] for place in PLACES), different]
        print(f"| {name} |", " | ".join(map(str, counts)), "|")


if __name__ == "__main__":
    main()
