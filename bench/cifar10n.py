"""The main job on CIFAR-10 with human and with synthetic label errors, beside its peers.

    python bench/cifar10n.py --cifar DIR --labels cifar10n.csv --weights lite0.safetensors \
        --out results/ --budget-minutes 60
    python bench/cifar10n.py --out results/ --table

For every kind of labels: `elr train` with ELR and with cross-entropy, `elr audit --truth`,
`elr predict` and `elr evaluate` on the test folder; then cleanlab's ranking from the five
cross-entropy trainings of its cross-validation, same network, same epochs. Every training is a
cell with a JSON file of its own; the script stops when its time is used up and goes on where it
stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import sets
from cleanlab.count import num_label_issues
from cleanlab.rank import get_label_quality_scores
from sklearn.model_selection import StratifiedKFold

from elrcli import api
from elrcli.audit.evidence import normalised
from elrcli.audit.scores import ranking_figures
from elrcli.data.manifest import load_data
from elrcli.engine.checkpoints import load_checkpoint
from elrcli.engine.predict import Predictor
from elrcli.tables import write_table

FOLDS = 5
LABELS = ("rand1", "sym40")
METHODS = ("elr", "ce")


def elr(*words: object) -> str:
    """Run the command line as a user does and return what it prints."""
    command = [sys.executable, "-m", "elrcli", *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def train_cell(noise: str, method: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train, audit, predict and evaluate through the command line."""
    made = make_set(noise, args)
    run = args.out / f"run-{noise}-{method}"
    common = ("--backbone", "tf_efficientnet_lite0", "--weights", args.weights)
    common += ("--image-size", 64, "--epochs", args.epochs, "--seed", args.seed)
    common += ("--root", args.cifar, "--truth-column", "true_label", "--workers", 1)
    started = time.monotonic()
    elr("train", made.csv, *common, "--method", method, "--out", run, "--overwrite")
    minutes = (time.monotonic() - started) / 60
    words = ("audit", run, "--truth", made.csv, "--truth-column", "true_label", "--json", "--quiet")
    summary = json.loads(elr(*words))
    test = args.cifar / "test"
    evaluation = json.loads(elr("evaluate", run, test, "--json", "--quiet"))
    predictions = args.out / f"predictions-{noise}-{method}.csv"
    elr("predict", run, test, "--out", predictions, "--quiet")
    return {
        "accuracy": evaluation["accuracy"],
        "audit": summary["truth"],
        "target": target_figures(run),
        "estimated_errors": summary["estimated_errors"],
        "memorised": last_metrics(run)["wrong_memorised"],
        "predicted": sum(1 for _ in predictions.open()) - 1,
        "minutes": minutes,
        "epochs": args.epochs,
        "images": args.images,
    }


def last_metrics(run: Path) -> dict[str, float | None]:
    """Return the last row of `metrics.csv`."""
    from elrcli.run import RunFolder

    return RunFolder.open(run).metrics()[-1]


def target_figures(run_path: Path) -> dict[str, float | None]:
    """Return the ranking by the target alone, over all labels."""
    from elrcli.run import RunFolder

    run = RunFolder.open(run_path)
    manifest = run.manifest()
    assert manifest.truth is not None
    targets = load_checkpoint(run.checkpoint_folder)["method"]["loss.targets"].numpy()
    score = 1 - normalised(targets)[np.arange(len(manifest)), manifest.labels]
    return ranking_figures(score, manifest.labels != manifest.truth)


def fold_cell(noise: str, fold: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train cross-entropy on four fifths and keep the predictions for the last fifth."""
    made = make_set(noise, args)
    manifest = load_data(made.csv, root=args.cifar, truth_column="true_label")
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=args.seed)
    held_out = list(folds.split(manifest.labels, manifest.labels))[fold][1]
    split = np.full(len(manifest), "train", dtype=object)
    split[held_out] = "val"
    table = args.out / f"fold-{noise}-{fold}.csv"
    names = manifest.classes
    write_table(
        table,
        ("path", "label", "split"),
        (
            {"path": path, "label": names[label], "split": part}
            for path, label, part in zip(manifest.paths, manifest.labels, split, strict=True)
        ),
    )
    started = time.monotonic()
    run = api.train(
        table,
        root=args.cifar,
        out=args.out / f"run-{noise}-fold{fold}",
        overwrite=True,
        backbone="tf_efficientnet_lite0",
        weights=args.weights,
        image_size=64,
        epochs=args.epochs,
        method="ce",
        seed=args.seed,
        workers=1,
    )
    minutes = (time.monotonic() - started) / 60
    predictor = Predictor.load(run.path)
    batches = list(predictor.manifest_batches(run.manifest(), held_out))
    np.savez(
        args.out / f"fold-{noise}-{fold}.npz",
        rows=np.concatenate([rows for rows, _, _ in batches]),
        probs=np.concatenate([probs for _, probs, _ in batches]),
    )
    return {"minutes": minutes}


def cleanlab_figures(noise: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return the ranking and the count that cleanlab gives for the five folds."""
    manifest = load_data(make_set(noise, args).csv, root=args.cifar, truth_column="true_label")
    assert manifest.truth is not None
    probs = np.zeros((len(manifest), manifest.num_classes))
    for fold in range(FOLDS):
        stored = np.load(args.out / f"fold-{noise}-{fold}.npz")
        probs[stored["rows"]] = stored["probs"]
    labels = manifest.labels.astype(int)
    score = 1 - get_label_quality_scores(labels, probs, method="self_confidence")
    figures: dict[str, Any] = ranking_figures(score, manifest.labels != manifest.truth)
    return figures | {"count": int(num_label_issues(labels, probs))}


def make_set(noise: str, args: argparse.Namespace) -> sets.StudySet:
    """Write the CSV of one kind of labels, without test rows: those are the test folder."""
    out = args.out / f"labels-{noise}.csv"
    return sets.cifar(out, args.cifar, args.labels, noise, args.images, 0, seed=args.seed)


def run_cells(args: argparse.Namespace) -> None:
    """Train every cell that has no result yet, while the time lasts."""
    deadline = time.monotonic() + 60 * args.budget_minutes
    for noise in args.noise.split(","):
        cells = {method: lambda n, m=method: train_cell(n, m, args) for method in METHODS}
        cells |= {f"fold{k}": lambda n, k=k: fold_cell(n, k, args) for k in range(FOLDS)}
        for name, cell in cells.items():
            result = args.out / f"{noise}-{name}.json"
            if result.exists() or time.monotonic() > deadline:
                continue
            result.write_text(json.dumps(cell(noise), indent=2))
            print(noise, name, result.read_text(), flush=True)
        if all((args.out / f"{noise}-fold{k}.json").exists() for k in range(FOLDS)):
            figures = cleanlab_figures(noise, args)
            (args.out / f"{noise}-cleanlab.json").write_text(json.dumps(figures, indent=2))


def print_table(folder: Path) -> None:
    """Print the results as Markdown."""
    print("| labels | method | test accuracy | AUROC | AP | P@N | count (true) | trainings |")
    print("|---|---|---|---|---|---|---|---|")
    for noise in LABELS:
        for method in (*METHODS, "cleanlab"):
            path = folder / f"{noise}-{method}.json"
            if not path.exists():
                continue
            cell = json.loads(path.read_text())
            if method == "cleanlab":
                rows = [("cleanlab, 5 folds", "", cell, f"{cell['count']}", FOLDS)]
            else:
                errors = cell["estimated_errors"]
                count = f"{errors['estimate']:.0f} [{errors['low']:.0f}, {errors['high']:.0f}]"
                accuracy = f"{cell['accuracy']:.2%}"
                rows = [
                    (f"{method}: audit", accuracy, cell["audit"], count, 1),
                    (f"{method}: target", "", cell["target"], "", 1),
                ]
            for name, accuracy, figures, count, trainings in rows:
                ranks = " | ".join(f"{figures[key]:.3f}" for key in ("auroc", "ap", "p_at_n"))
                true = f" ({figures['errors']})"
                print(f"| {noise} | {name} | {accuracy} | {ranks} | {count}{true} | {trainings} |")


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--labels", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--noise", default=",".join(LABELS))
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget-minutes", type=float, default=240)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.table:
        run_cells(args)
    print_table(args.out)


if __name__ == "__main__":
    main()
