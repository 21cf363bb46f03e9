"""The CIFAR tables of Liu et al. 2020 (ELR) and of CIFAR-10N, cell by cell.

    python bench/paper.py --images CIFAR10 --cells 'cifar10-*' --out results
    python bench/paper.py --images CIFAR100 --cells 'cifar100-*' --out results
    python bench/paper.py --images CIFAR10 --labels cifar10n.csv --cells 'cifar10n-*' --out results
    python bench/paper.py --out results --table

`--images` is a folder with train/ and test/, class folders in both, or a CSV file with a split
column. `--labels` is a CSV file with a column `path` and one for each kind of human labels (aggre,
rand1, worst). A cell is named data-noise-method; its settings are those of `elr train --preset`.
With `--budget-minutes` the script stops after the epoch in which the time is used up; started
again, it goes on there. Every finished cell has one JSON file.

A tenth of the training images is left out, as in the paper, but not for CIFAR-10N, whose published
figures use all. The test images stand in the place of the validation split, so that their accuracy
is known after every epoch. Nothing in a training depends on that split.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import cells
import numpy as np
import sets
import torch

import elrcli
from elrcli import ElrError, RunFolder
from elrcli.data.manifest import Manifest, load_data
from elrcli.engine.observer import TrainingPlan

MIXED = ("sym20", "sym40", "sym60", "sym80", "asym10", "asym20", "asym30", "asym40")
HARD = ("sym20", "sym50", "sym80", "sym90", "asym40")
HUMAN = ("aggre", "rand1", "worst")
# Test accuracy in percent; of ELR+ after the last epoch, of CIFAR-10N in the best one.
PUBLISHED: dict[tuple[str, str], dict[str, float]] = {
    (data, method): dict(zip(kinds, figures, strict=True))
    for data, method, kinds, figures in (
        ("cifar10", "ce", MIXED, (86.98, 81.88, 74.14, 53.82, 90.69, 88.59, 86.14, 80.11)),
        ("cifar10", "elr", MIXED, (91.16, 89.15, 86.12, 73.86, 93.27, 93.52, 91.89, 90.12)),
        ("cifar10", "star", MIXED, (92.12, 91.43, 88.87, 80.69, 94.57, 93.28, 92.70, 90.35)),
        ("cifar10", "preact-ce", HARD, (86.8, 79.4, 62.9, 42.7, 83.2)),
        ("cifar10", "plus", HARD, (94.6, 93.8, 91.1, 75.2, 92.7)),
        ("cifar100", "ce", MIXED, (58.72, 48.20, 37.41, 18.10, 66.54, 59.20, 51.40, 42.74)),
        ("cifar100", "elr", MIXED, (74.21, 68.28, 59.28, 29.78, 74.20, 74.03, 73.71, 73.26)),
        ("cifar100", "star", MIXED, (74.68, 68.43, 60.05, 30.27, 74.52, 74.20, 74.02, 73.73)),
        ("cifar10n", "ce", HUMAN, (87.77, 85.02, 77.69)),
        ("cifar10n", "elr", HUMAN, (92.38, 91.46, 83.58)),
        ("cifar10n", "plus", HUMAN, (94.83, 94.43, 91.09)),
    )
}
COARSE = (("cifar10", "preact-ce"), ("cifar10", "plus"))  # published with one decimal
NAMES = {
    "ce": "cross-entropy",
    "elr": "ELR",
    "star": "ELR*",
    "preact-ce": "cross-entropy, PreActResNet-18",
    "plus": "ELR+",
}
# What turns the settings of ELR+ into cross-entropy on one network.
PLAIN = {"method": "ce", "mixup": False, "ema": False}
CURVE = ("epoch", "clean_right", "wrong_right", "wrong_memorised", "loss", "lr")


@dataclass(frozen=True)
class Cell:
    """One figure of a table, for one seed."""

    data: str
    noise: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        """The name that `--cells` looks at."""
        return f"{self.data}-{self.noise}-{self.method}"

    @property
    def preset(self) -> str:
        """The preset with the settings of the cell."""
        base = self.data
        if self.data != "cifar100":
            base = "cifar10-asym" if self.noise.startswith("asym") else "cifar10-sym"
        variant = {"star": "-star", "plus": "-plus", "preact-ce": "-plus"}
        return base + variant.get(self.method, "")

    @property
    def changes(self) -> dict[str, Any]:
        """The settings that differ from the preset."""
        own: dict[str, dict[str, Any]] = {"ce": {"method": "ce"}, "preact-ce": PLAIN}
        return own.get(self.method, {})


class Watch(cells.Clock):
    """A clock that prints every epoch."""

    def training_started(self, plan: TrainingPlan) -> None:
        """Remember which run it is."""
        self.plan = plan

    def epoch_finished(self, metrics: Mapping[str, float]) -> None:
        """Print a line, and stop here if the time is used up."""
        shown = f"{Path(self.plan.run).name}: {metrics['epoch']:.0f}/{self.plan.epochs}"
        print(f"{shown} {metrics['val_accuracy_true']:.2%}", flush=True)
        super().epoch_finished(metrics)


def chosen_cells(args: argparse.Namespace, seeds: Sequence[int]) -> Iterator[Cell]:
    """Yield the cells that the command line asks for, once for each of the seeds."""
    for (data, method), figures in PUBLISHED.items():
        for noise in figures:
            for seed in seeds:
                cell = Cell(data, noise, method, seed)
                if fnmatch(cell.name, args.cells):
                    yield cell


def stem(cell: Cell, args: argparse.Namespace) -> str:
    """Return the name of the cell's files; a smaller trial never passes for the real one."""
    small = f"-limit{args.limit}" if args.limit else ""
    short = f"-epochs{args.epochs}" if args.epochs else ""
    return f"{cell.name}-seed{cell.seed}{small}{short}"


def write_labels(cell: Cell, args: argparse.Namespace, out: Path) -> Path:
    """Write the CSV file of a cell: noisy training labels, clean test labels as val."""
    clean = load_data(args.images)
    classes = 100 if cell.data == "cifar100" else 10
    if clean.num_classes != classes:
        sys.exit(f"{args.images}: {clean.num_classes} classes. {cell.name} needs {classes}.")
    rng = np.random.default_rng(cell.seed)
    test = clean.rows("test")
    train = np.setdiff1d(np.arange(len(clean)), test)
    if len(test) == 0 or len(train) == 0:
        sys.exit(f"{args.images}: needs training and test images.")
    if args.limit:
        train, test = (subset(clean, rows, args.limit, rng) for rows in (train, test))
    if cell.data != "cifar10n":
        train = subset(clean, train, len(train) * 9 // 10 // classes * classes, rng)
    given = noisy_labels(cell, clean, train, args.labels, rng)
    paths, names = clean.paths, clean.classes
    lines = [
        (paths[row], label, names[clean.labels[row]], "train")
        for row, label in zip(train.tolist(), given, strict=True)
    ]
    for row in test.tolist():
        lines.append((paths[row], names[clean.labels[row]], names[clean.labels[row]], "val"))
    return sets.write(out, lines)


def subset(clean: Manifest, rows: np.ndarray, images: int, rng: np.random.Generator) -> np.ndarray:
    """Draw so many of the rows, equally many of every class."""
    return rows[sets.balanced([str(label) for label in clean.labels[rows]], images, rng)]


def noisy_labels(
    cell: Cell, clean: Manifest, rows: np.ndarray, labels: Path | None, rng: np.random.Generator
) -> list[str]:
    """Return the given labels of `rows`: human ones, or drawn as in the paper."""
    if cell.data == "cifar10n":
        if labels is None:
            sys.exit(f"{cell.name}: needs --labels.")
        with labels.open(newline="") as file:
            human = {row["path"]: row.get(cell.noise) for row in csv.DictReader(file)}
        found = [human.get(clean.paths[row]) for row in rows.tolist()]
        if None in found:
            sys.exit(f"{labels}: has no {cell.noise} label for {found.count(None)} images.")
        return [label for label in found if label is not None]
    truth = clean.labels[rows]
    if cell.data == "cifar100":
        # In groups of five, in the order of the classes, each turns into the next: so does the
        # paper's code.
        mapping = {label: label - label % 5 + (label + 1) % 5 for label in range(100)}
    else:
        mapping = sets.confusions(clean.classes)
    given = sets.noisy(truth, clean.num_classes, cell.noise, rng, mapping)
    return [clean.classes[label] for label in given]


def train(cell: Cell, args: argparse.Namespace, clock: Watch, folder: Path) -> dict[str, Any]:
    """Train a cell, or go on with it, and return its figures."""
    changes = dict(cell.changes)
    if args.epochs:
        changes["epochs"] = args.epochs
    run = cells.train_or_resume(
        folder,
        clock,
        write_labels(cell, args, folder.with_suffix(".csv")),
        preset=cell.preset,
        root=args.images if args.images.is_dir() else args.images.parent,
        truth_column="true_label",
        seed=cell.seed,
        device=args.device,
        workers=args.workers,
        cache="ram",
        **changes,
    )
    return figures(cell, run)


def figures(cell: Cell, run: RunFolder) -> dict[str, Any]:
    """Return what a finished run says about its cell."""
    rows = run.metrics()
    accuracy = [row["val_accuracy_true"] or 0.0 for row in rows]
    best = int(np.argmax(accuracy))
    manifest = run.manifest()
    train_rows = manifest.rows("train")
    assert manifest.truth is not None
    return {
        "cell": cell.name,
        "preset": cell.preset,
        "seed": cell.seed,
        "images": len(train_rows),
        "wrong": int((manifest.labels != manifest.truth)[train_rows].sum()),
        "accuracy_last": accuracy[-1],
        "accuracy_best": accuracy[best],
        "best_epoch": best + 1,
        "memorised_last": rows[-1]["wrong_memorised"],
        "minutes": sum(row["seconds"] or 0.0 for row in rows) / 60,
        "device": device_name(str(run.train_config().device)),
        "versions": {"elr": elrcli.__version__, "torch": torch.__version__},
        "curve": [
            {name: row[name] for name in CURVE} | {"accuracy": accuracy[place]}
            for place, row in enumerate(rows)
        ],
        "settings": run.train_config().to_dict() | {"data": "", "root": ""},
    }


def device_name(device: str) -> str:
    """Return what the training ran on."""
    if torch.cuda.is_available() and device != "cpu":
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()}"


def print_table(args: argparse.Namespace) -> None:
    """Print measured and published accuracies as Markdown."""
    print("| data | labels | method | last epoch | best epoch | published | memorised | minutes |")
    print("|---|---|---|---|---|---|---|---|")
    for cell in chosen_cells(args, seeds=[args.seeds[0]]):
        results = [args.out / f"{stem(replace(cell, seed=n), args)}.json" for n in args.seeds]
        found = [json.loads(result.read_text()) for result in results if result.exists()]
        shares = ["to be measured", "", "", ""]
        if found:
            shares = [
                percent([result["accuracy_last"] for result in found]),
                percent([result["accuracy_best"] for result in found]),
                percent([result["memorised_last"] or 0.0 for result in found]),
                f"{mean(result['minutes'] for result in found):.1f}",
            ]
        digits = 1 if (cell.data, cell.method) in COARSE else 2
        published = f"{PUBLISHED[cell.data, cell.method][cell.noise]:.{digits}f}"
        line = [cell.data, cell.noise, NAMES[cell.method], *shares[:2], published, *shares[2:]]
        print("| " + " | ".join(line) + " |")


def percent(shares: list[float]) -> str:
    """Return the mean in percent, with deviation and number where there are several."""
    text = f"{100 * mean(shares):.2f}"
    if len(shares) > 1:
        text += f" ± {100 * stdev(shares):.2f} ({len(shares)})"
    return text


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="folder with train/ and test/, or a CSV file")
    parser.add_argument("--labels", type=Path, help="CSV file with the labels of CIFAR-10N")
    parser.add_argument("--out", type=Path, required=True, help="folder of the result files")
    parser.add_argument("--cells", default="*", help="pattern such as 'cifar10-sym40-*'")
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in text.split(",")], default=[0])
    parser.add_argument("--budget-minutes", type=float, default=1e9)
    parser.add_argument("--limit", type=int, help="so many training and test images, for a trial")
    parser.add_argument("--epochs", type=int, help="for a trial")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--table", action="store_true", help="only print what is there")
    args = parser.parse_args()
    if not args.table:
        if args.images is None:
            parser.error("--images: needed to train. With --table results are only printed.")
        args.out.mkdir(parents=True, exist_ok=True)
        clock = Watch(args.budget_minutes)
        work = (
            (args.out / f"{stem(cell, args)}.json", partial(train, cell, args, clock))
            for cell in chosen_cells(args, args.seeds)
        )
        try:
            cells.run_cells(work, clock)
        except ElrError as error:
            sys.exit(str(error))
    print_table(args)


if __name__ == "__main__":
    main()
