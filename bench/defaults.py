"""Which fine-tuning defaults hold on data that nobody tuned for.

    python bench/defaults.py --cifar DIR --labels cifar10n.csv --weights lite0.safetensors \
        --out results/ --budget-minutes 60
    python bench/defaults.py --out results/ --table

Trains every (set, setting) cell, keeps one JSON file a cell, stops when the time is used up and
goes on where it stopped. Figures: accuracy on clean test labels after the last epoch, and
average precision (AP) of finding the wrong labels by `1 - mean probability` over the epochs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import sets
import torch
from sklearn.metrics import average_precision_score

from elrcli.config import TrainConfig
from elrcli.engine.checkpoints import load_checkpoint
from elrcli.engine.fit import fit
from elrcli.run import RunFolder

TIMM_HEAD = "timm_head"  # no setting of elr: the head as timm makes it, for comparison
SETTINGS: dict[str, dict[str, Any]] = {
    "adamw 1e-3": {"optimizer": "adamw", "lr": 1e-3},
    "adamw 3e-4": {"optimizer": "adamw", "lr": 3e-4},
    "adamw 3e-3": {"optimizer": "adamw", "lr": 3e-3},
    "sgd .005": {"optimizer": "sgd", "lr": 0.005},
    "sgd .01": {"optimizer": "sgd", "lr": 0.01},
    "sgd .02": {"optimizer": "sgd", "lr": 0.02},
    "sgd .05": {"optimizer": "sgd", "lr": 0.05},
    "sgd .02, timm's head": {"optimizer": "sgd", "lr": 0.02, TIMM_HEAD: True},
    "adamw 1e-3, ce": {"optimizer": "adamw", "lr": 1e-3, "method": "ce"},
    "adamw 1e-3, lambda 1": {"optimizer": "adamw", "lr": 1e-3, "lam": 1.0},
    "adamw 1e-3, lambda 7": {"optimizer": "adamw", "lr": 1e-3, "lam": 7.0},
    "adamw 1e-3, beta .9": {"optimizer": "adamw", "lr": 1e-3, "beta": 0.9},
}
SETS = (
    "cifar-rand1-1000",
    "cifar-sym40-1000",
    "catdog-sym20-400",
    "cifar-aggre-1000",
    "scratch-sym20-1000",
    "digits-sym30-0",
    "shapes3-sym20-180",
    "shapes24-sym20-1440",
)
LITE0 = {"backbone": "tf_efficientnet_lite0", "image_size": 64}
SCRATCH = {"backbone": "resnet10t", "pretrained": False}


def make_set(name: str, folder: Path, args: argparse.Namespace) -> sets.StudySet:
    """Return the set of that name: kind-noise-images."""
    kind, noise, images = name.split("-")
    out = folder / f"{name}.csv"
    if kind == "digits":
        return with_settings(sets.digits(out, noise), {**SCRATCH, "small_input": False})
    if kind.startswith("shapes"):
        per_class = int(images) // int(kind[6:])
        return with_settings(sets.shapes(out, noise, per_class, int(kind[6:])), SCRATCH)
    classes = ("cat", "dog") if kind == "catdog" else tuple(sets.CIFAR_CLASSES)
    made = sets.cifar(out, args.cifar, args.labels, noise, int(images), 1000, classes=classes)
    if kind == "scratch":
        return with_settings(made, {**SCRATCH, "image_size": 32, "small_input": True})
    return with_settings(made, {**LITE0, "weights": args.weights})


def with_settings(made: sets.StudySet, settings: dict[str, Any]) -> sets.StudySet:
    """Add settings to those of a set."""
    return sets.StudySet(made.csv, made.root, {**made.settings, **settings})


def run_cell(name: str, changes: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Train one cell and return its figures."""
    with tempfile.TemporaryDirectory() as folder:
        made = make_set(name, Path(folder), args)
        changes = dict(changes)
        keep_head = patch("elrcli.models.calm_head") if changes.pop(TIMM_HEAD, False) else None
        settings = {
            "data": made.csv,
            "truth_column": "true_label",
            "workers": 1,
            **made.settings,
            **changes,
        }
        started = time.monotonic()
        with keep_head or nullcontext():
            run = fit(TrainConfig(**settings), Path(folder) / "run")
        minutes = (time.monotonic() - started) / 60
        return figures(run) | {"epochs": settings["epochs"], "minutes": minutes}


def figures(run: RunFolder) -> dict[str, float | None]:
    """Return accuracy and AP of a run whose true labels are known."""
    manifest = run.manifest()
    assert manifest.truth is not None
    last = run.metrics()[-1]
    record = load_checkpoint(run.checkpoint_folder)["record"]
    rows = torch.from_numpy(manifest.rows("train"))
    labels = torch.from_numpy(manifest.labels).long()[rows]
    wrong = labels != torch.from_numpy(manifest.truth).long()[rows]
    mean = record["prob_sum"][rows] / record["visits"][rows, None].clamp_min(1)
    score = 1 - mean.gather(1, labels[:, None])[:, 0]
    result = {"accuracy": last["test_accuracy_true"], "memorised": last["wrong_memorised"]}
    if bool(wrong.any()):
        result["ap"] = float(average_precision_score(wrong.numpy(), score.numpy()))
    return result


def slug(setting: str) -> str:
    """Return the part of a file name that stands for a setting."""
    return setting.replace(", ", "-").replace(" ", "_").replace("'", "")


def main() -> None:
    """Run the cells that are missing, or print the table."""
    parser = sets.cifar_arguments(__doc__)
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--settings", default=";".join(SETTINGS))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget-minutes", type=float, default=60)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    deadline = time.monotonic() + 60 * args.budget_minutes
    for name in () if args.table else args.sets.split(","):
        for setting in args.settings.split(";"):
            cell = args.out / f"{name}--{slug(setting)}.json"
            if cell.exists() or time.monotonic() > deadline:
                continue
            changes = SETTINGS[setting] | {"epochs": args.epochs}
            result = run_cell(name, changes, args)
            cell.write_text(json.dumps(result))
            shown = {key: round(value, 3) for key, value in result.items() if value is not None}
            print(name, setting, shown, flush=True)
    if args.table:
        print_table(args.out)


def print_table(folder: Path) -> None:
    """Print accuracy and AP, a row per setting and a column per set."""
    cells = {
        tuple(path.stem.split("--")): json.loads(path.read_text()) for path in folder.glob("*.json")
    }
    names = sorted({name for name, _ in cells})
    print("| setting |", " | ".join(names), "|")
    print("|---|" + "---|" * len(names))
    for setting in SETTINGS:
        key = slug(setting)
        row = [cells.get((name, key)) for name in names]
        if any(row):
            text = [f"{r['accuracy']:.3f} / {r.get('ap', 0):.3f}" if r else "" for r in row]
            print(f"| {setting} |", " | ".join(text), "|")


if __name__ == "__main__":
    main()
