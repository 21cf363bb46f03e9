"""Figure 1 of the paper on scikit-learn's digits: what becomes of right and of wrong labels.

    python bench/memorisation.py --out docs/images/memorisation.svg

Trains the same small network from scratch with cross-entropy and with ELR on digits of which 40%
of the labels were redrawn, long enough and without augmentation, so that cross-entropy memorises.
The optimiser is the paper's SGD (0.02, weight decay 0.001); all other settings are the defaults.
Prints the shares after the last epoch.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import sets
import torch
from matplotlib.figure import Figure

from elrcli.config import TrainConfig
from elrcli.engine.fit import fit
from elrcli.plots import svg, truth_panel

NAMES = {"ce": "Cross-entropy", "elr": "ELR"}
COLUMNS = ("clean_right", "wrong_right", "wrong_memorised", "wrong_other", "test_accuracy_true")


def figure(metrics: dict[str, list[dict[str, float | None]]]) -> Figure:
    """Return right and wrong labels below each other, the methods side by side."""
    whole = Figure(figsize=(10.0, 6.4), layout="constrained")
    axes = whole.subplots(2, len(metrics), sharey=True)
    for column, (method, rows) in enumerate(metrics.items()):
        for panel, kind in zip(axes[:, column], ("clean", "wrong"), strict=True):
            truth_panel(panel, rows, kind)
            title = f"{NAMES[method]}, {panel.get_title('left').lower()}"
            panel.set_title(title, fontsize=11, loc="left", pad=24)
    return whole


def main() -> None:
    """Train both, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="SVG file to write")
    parser.add_argument("--noise", default="sym40")
    parser.add_argument("--backbone", default="test_resnet")
    parser.add_argument("--optimizer", default="sgd")
    parser.add_argument("--epochs", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| |", " | ".join(COLUMNS), "|\n|---|" + "---|" * len(COLUMNS))
    metrics = {}
    with tempfile.TemporaryDirectory() as folder:
        digits = sets.digits(Path(folder) / "digits.csv", args.noise)
        training = {
            "backbone": args.backbone,
            "pretrained": False,
            "small_input": False,
            "augment": "none",
            "optimizer": args.optimizer,
            "epochs": args.epochs,
            "cache": "ram",
            "workers": 0,
            "truth_column": "true_label",
        }
        for method in NAMES:
            settings = {"data": digits.csv, **digits.settings, **training, "method": method}
            run = fit(TrainConfig(**settings), Path(folder) / method, for_audit=False)
            metrics[method] = run.metrics()
            cells = [f"{metrics[method][-1][name]:.1%}" for name in COLUMNS]
            print(f"| {NAMES[method]} |", " | ".join(cells), "|", flush=True)
    args.out.write_text(svg(figure(metrics)))


if __name__ == "__main__":
    main()
