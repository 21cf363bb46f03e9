"""ELR, ELR+ and their peers against cross-entropy: accuracy and memorisation.

On 5,000 images of CIFAR-10 with synthetic noise (or CIFAR-10N's human labels), with EfficientNet-
Lite0 from ImageNet weights and with a small network from scratch: test accuracy after the last
epoch against true labels, and the share of the wrong training labels that the network predicts
then. Every training is a cell with a JSON file of its own; a training that is cut off is resumed.
The script stops when its time is used up and goes on where it stopped; several may share the work.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cells
import numpy as np
import sets

NETWORKS: dict[str, dict[str, Any]] = {
    "pretrained": {"backbone": "tf_efficientnet_lite0", "image_size": 64, "epochs": 10},
    "scratch": {
        "backbone": "test_resnet",
        "pretrained": False,
        "image_size": 32,
        "epochs": 40,
        "optimizer": "sgd",
        "lr": 0.05,
    },
}
METHODS: dict[str, dict[str, Any]] = {
    "ce": {"method": "ce"},
    "elr": {"method": "elr"},
    "elr, ema, mixup": {"method": "elr", "ema": True, "mixup": True},
    "elr-plus": {"method": "elr-plus"},
    "sop": {"method": "sop"},
    "gce": {"method": "gce"},
    "sl": {"method": "sl"},
}
NOISE = ("sym20", "sym40", "sym60", "asym40")
THREE_SEEDS = (("pretrained", "sym40"), ("scratch", "sym20"), ("scratch", "sym40"))
ONE_SEED = ("gce", "sl")  # everywhere
CONFUSED = {"lam": 1.0}  # for ELR where similar classes are confused, as in the paper


class Cell(NamedTuple):
    """One training of the study."""

    network: str
    noise: str
    seed: int
    method: str

    def result(self, folder: Path) -> Path:
        """Return the JSON file of its figures."""
        method = self.method.replace(", ", "-")
        return folder / f"{self.network}-{self.noise}-{self.seed}-{method}.json"


def chosen_cells(args: argparse.Namespace) -> Iterator[Cell]:
    """Yield the cells that were asked for, first seeds first."""
    for seed in range(args.seeds or 3):
        for network in args.networks:
            for noise in args.noise:
                for method in args.methods:
                    if seed < seeds_of(network, noise, method, args):
                        yield Cell(network, noise, seed, method)


def seeds_of(network: str, noise: str, method: str, args: argparse.Namespace) -> int:
    """Return how many seeds a cell of the table has."""
    if args.seeds:
        return int(args.seeds)
    return 3 if (network, noise) in THREE_SEEDS and method not in ONE_SEED else 1


def train(cell: Cell, args: argparse.Namespace, clock: cells.Clock, folder: Path) -> dict[str, Any]:
    """Train one cell, or go on with it, and return its figures."""
    made = sets.cifar(
        folder.with_suffix(".csv"),
        args.cifar,
        args.labels,
        cell.noise,
        args.images,
        args.tests,
        seed=cell.seed,
    )
    settings = NETWORKS[cell.network] | METHODS[cell.method]
    if cell.noise.startswith("asym") and cell.method.startswith("elr"):
        settings |= CONFUSED
    if cell.network == "pretrained":
        settings |= {"weights": args.weights}
    run = cells.train_or_resume(
        folder,
        clock,
        made.csv,
        root=made.root,
        seed=cell.seed,
        workers=args.workers,
        truth_column="true_label",
        cache="ram",
        device=args.device,
        **settings,
    )
    rows = run.metrics()
    config = run.train_config()
    return {
        "accuracy": rows[-1]["test_accuracy_true"],
        "memorised": rows[-1]["wrong_memorised"],
        "memorised_by_epoch": [round(row["wrong_memorised"] or 0.0, 4) for row in rows],
        "minutes": sum(row["seconds"] or 0.0 for row in rows) / 60,
        "images": args.images,
        "settings": config.to_dict() | {"data": "", "root": "", "weights": ""},
    }


def print_table(args: argparse.Namespace) -> None:
    """Print accuracy / memorised share as Markdown: mean over the seeds, and their range."""
    minutes: list[float] = []
    for network in args.networks:
        print(f"| {network} | {' | '.join(args.methods)} |\n|{'---|' * (len(args.methods) + 1)}")
        for noise in args.noise:
            row = [noise]
            for method in args.methods:
                found = [
                    json.loads(path.read_text())
                    for seed in range(seeds_of(network, noise, method, args))
                    if (path := Cell(network, noise, seed, method).result(args.out)).exists()
                ]
                row.append(_shown(found))
                minutes += [cell["minutes"] for cell in found]
            print(f"| {' | '.join(row)} |")
        print()
    print(f"{len(minutes)} trainings, {sum(minutes) / 60:.1f} hours of one core")


def _shown(found: list[dict[str, Any]]) -> str:
    if not found:
        return ""
    accuracy = [cell["accuracy"] for cell in found]
    text = f"{np.mean(accuracy):.1%}"
    if len(found) > 1:
        text += f" ({min(accuracy):.1%} to {max(accuracy):.1%})"
    return f"{text} / {np.mean([cell['memorised'] for cell in found]):.0%}"


def main() -> None:
    """Run what is missing, then print the table."""
    parser = sets.cifar_arguments(__doc__)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--noise", nargs="+", default=NOISE, help="also aggre, rand1")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, help="of every kind of labels")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--tests", type=int, default=2000, help="test images")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--budget-minutes", type=float, default=240)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.table:
        clock = cells.Clock(args.budget_minutes)
        work = ((c.result(args.out), partial(train, c, args, clock)) for c in chosen_cells(args))
        cells.run_cells(work, clock)
    print_table(args)


if __name__ == "__main__":
    main()
