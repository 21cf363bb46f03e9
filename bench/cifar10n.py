"""ELR against cross-entropy on CIFAR-10 with human and with synthetic label errors.

    python bench/cifar10n.py --cifar DIR --labels cifar10n.csv --weights lite0.safetensors \
        --out results/ --budget-minutes 60
    python bench/cifar10n.py --out results/ --table

For every kind of labels: `elr train` with both methods, then `elr predict` and `elr evaluate` on
the test folder. Every training is a cell with a JSON file of its own; the script stops when its
time is used up and goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import sets

from elrcli.run import RunFolder

LABELS = ("rand1", "sym40")
METHODS = ("elr", "ce")


def elr(*words: object) -> str:
    """Run the command line as a user does and return what it prints."""
    command = [sys.executable, "-m", "elrcli", *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def train_cell(noise: str, method: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train, predict and evaluate through the command line."""
    # Without test rows: those are the test folder.
    out = args.out / f"labels-{noise}.csv"
    made = sets.cifar(out, args.cifar, args.labels, noise, args.images, 0, seed=args.seed)
    run = args.out / f"run-{noise}-{method}"
    common = ["--backbone", "tf_efficientnet_lite0", "--weights", args.weights]
    common += ["--image-size", 64, "--epochs", args.epochs, "--seed", args.seed]
    common += ["--root", args.cifar, "--truth-column", "true_label", "--workers", 1]
    started = time.monotonic()
    elr("train", made.csv, *common, "--method", method, "--out", run, "--overwrite")
    minutes = (time.monotonic() - started) / 60
    test = args.cifar / "test"
    evaluation = json.loads(elr("evaluate", run, test, "--json", "--quiet"))
    predictions = args.out / f"predictions-{noise}-{method}.csv"
    elr("predict", run, test, "--out", predictions, "--quiet")
    return {
        "accuracy": evaluation["accuracy"],
        "memorised": RunFolder.open(run).metrics()[-1]["wrong_memorised"],
        "predicted": sum(1 for _ in predictions.open()) - 1,
        "minutes": minutes,
        "epochs": args.epochs,
        "images": args.images,
    }


def run_cells(args: argparse.Namespace) -> None:
    """Train every cell that has no result yet, while the time lasts."""
    deadline = time.monotonic() + 60 * args.budget_minutes
    for noise in args.noise.split(","):
        for method in METHODS:
            result = args.out / f"{noise}-{method}.json"
            if not result.exists() and time.monotonic() < deadline:
                result.write_text(json.dumps(train_cell(noise, method, args), indent=2) + "\n")
                print(noise, method, result.read_text(), flush=True)


def print_table(folder: Path) -> None:
    """Print the results as Markdown."""
    print("| labels | method | test accuracy | wrong labels memorised |")
    print("|---|---|---|---|")
    for noise in LABELS:
        for method in METHODS:
            path = folder / f"{noise}-{method}.json"
            if path.exists():
                cell = json.loads(path.read_text())
                shares = f"{cell['accuracy']:.2%} | {cell['memorised']:.0%}"
                print(f"| {noise} | {method} | {shares} |")


def main() -> None:
    """Run what is missing, then print the table."""
    parser = sets.cifar_arguments(__doc__)
    parser.add_argument("--noise", default=",".join(LABELS))
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget-minutes", type=float, default=240)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.table:
        run_cells(args)
    print_table(args.out)


if __name__ == "__main__":
    main()
