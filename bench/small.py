"""How well an audit counts the wrong labels of a small folder.

    python bench/small.py --out results/
    python bench/small.py --out results/ --table

A few hundred images leave few that were not trained on. Digits and shapes with planted noise, 15
epochs from scratch; and two-digit numbers, 100 classes of 20 images, after 2, 5 and 15 epochs: a
network that has only begun to learn. One JSON file a cell, runs in a folder beside it; goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import sets
import torch

import elrcli

SETS = {  # classes, images, epochs
    "digits3": (3, 210, 15),
    "digits10": (10, 270, 15),
    "digits10-few": (10, 160, 15),
    "shapes6": (6, 180, 15),
    "numbers-e2": (100, 2000, 2),
    "numbers-e5": (100, 2000, 5),
    "numbers-e15": (100, 2000, 15),
}
RATES, SEEDS = (0, 10, 25, 40), (0, 1)
TRAINING: dict[str, Any] = {
    "backbone": "test_resnet",
    "pretrained": False,
    "image_size": 32,
    "flip": False,
    "workers": 0,
    "cache": "ram",
    "truth_column": "true_label",
}


def write_set(name: str, rate: int, seed: int, folder: Path) -> Path:
    """Write a random part of a set with symmetric noise; return the CSV file."""
    classes, images, _ = SETS[name]
    rng = np.random.default_rng(seed)
    if name.startswith("digits"):
        made = sets.digits(folder / "all.csv", "clean", tests=False)
    elif name.startswith("numbers"):
        made = sets.numbers(folder / "all.csv", images, seed)
    else:
        made = sets.shapes(folder / "all.csv", "clean", images // classes, classes, tests=0)
    with made.csv.open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if int(r["true_label"].lstrip("c")) < classes]
    rows = [rows[place] for place in rng.permutation(len(rows))[:images]]
    truth = np.array([int(row["true_label"].lstrip("c")) for row in rows])
    given = sets.noisy(truth, classes, f"sym{rate}", rng)
    lines = [(r["path"], str(g), str(t), "") for r, g, t in zip(rows, given, truth, strict=True)]
    return sets.write(folder / f"{name}-{rate}-{seed}.csv", lines)


def main() -> None:
    """Run the cells that are missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="only print what is there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, rate, seed in () if args.table else itertools.product(SETS, RATES, SEEDS):
        cell = args.out / f"{name}-{rate}-{seed}.json"
        if cell.exists():
            continue
        run = args.out / "runs" / cell.stem
        data = write_set(name, rate, seed, args.out / "runs")
        elrcli.audit_labels(
            data,
            out=run,
            epochs=SETS[name][2],
            report=False,
            seed=seed,
            overwrite=not run.exists(),
            **TRAINING,
        )
        summary = json.loads((run / "summary.json").read_text())
        kept = ("samples", "flagged", "estimated_errors", "truth")
        cell.write_text(json.dumps({key: summary[key] for key in kept}))
        print(cell.stem, summary["truth"]["errors"], summary["estimated_errors"], flush=True)
    print_table(args.out)


def print_table(folder: Path) -> None:
    """Print errors and estimates of every cell, and how often the interval held."""
    print("| set | images | planted | estimate (90% interval) | seed 1: planted | estimate |")
    print("|---|---|---|---|---|---|")
    held = cells = 0
    for name, rate in itertools.product(SETS, RATES):
        columns = []
        for seed in SEEDS:
            cell = folder / f"{name}-{rate}-{seed}.json"
            if not cell.exists():
                return
            found = json.loads(cell.read_text())
            count, errors = found["truth"]["errors"], found["estimated_errors"]
            held += errors["low"] <= count <= errors["high"]
            cells += 1
            estimate = "{estimate:.0f} ({low:.0f} to {high:.0f})".format(**errors)
            columns += [str(count), estimate]
        print(f"| {name} sym{rate} | {found['samples']} | {' | '.join(columns)} |")
    print(f"\nThe interval held in {held} of {cells}.")


if __name__ == "__main__":
    main()
