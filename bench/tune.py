"""Whether `elr tune` picks a setting that is nearly the best of its grid.

    python bench/tune.py --cifar DIR --labels cifar10n.csv --out results/
    python bench/tune.py --out results/ --table

Trains every setting of the grid for all epochs on small sets with planted noise and notes the
accuracy on clean test labels, which the search never sees. Then lets `elr tune` search the same
grid. The best of many single trainings is partly luck: `--seeds 3` trains every setting thrice, and
the table compares means. One JSON file a cell; stops when the time is used up and goes on where it
stopped.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import sets
import torch

from elrcli.config import TrainConfig
from elrcli.engine.fit import fit
from elrcli.engine.tune import Candidate, tune

SETS = (
    "digits-sym20",
    "digits-sym40",
    "digits-asym30",
    "cifar5-sym40",
    "shapes12-sym30",
    "cifar5b-sym20",
    "shapes8-asym25",
    "cifar6-sym30",
    "cifar6b-asym30",
    "shapes10-sym50",
)
CIFAR_IMAGES, CIFAR_TESTS = 1500, 2500
CIFAR_CLASSES = {
    "cifar5": ("airplane", "automobile", "cat", "frog", "ship"),
    "cifar5b": ("bird", "deer", "dog", "horse", "truck"),
    "cifar6": ("bird", "cat", "frog", "horse", "ship", "truck"),
    "cifar6b": ("airplane", "bird", "cat", "deer", "dog", "horse"),
}
SHAPES = {  # classes, images of each
    "shapes12": (12, 100),
    "shapes8": (8, 150),
    "shapes10": (10, 120),
}
GRID: dict[str, tuple[float, ...]] = {
    "lambdas": (1.0, 3.0, 7.0),
    "betas": (0.7, 0.9),
    "lrs": (0.0003, 0.001, 0.003),  # what `elr tune` tries with this network
}
DEFAULT = Candidate(3.0, 0.7, 0.001)
TRAINING = {
    "backbone": "test_resnet",
    "pretrained": False,
    "image_size": 32,
    "small_input": False,
    "epochs": 16,
    "augment": "none",  # invites memorisation: otherwise lambda has little to do
    "cache": "ram",
    "workers": 0,
    "truth_column": "true_label",
}


def make_config(name: str, folder: Path, cifar: Path | None, labels: Path | None) -> TrainConfig:
    """Write the set of that name and return how it is trained on."""
    kind, noise = name.split("-")
    out = folder / f"{name}.csv"
    if kind == "digits":
        made = sets.digits(out, noise)
    elif kind in SHAPES:
        classes, per_class = SHAPES[kind]
        made = sets.shapes(out, noise, per_class, classes)
    else:
        if cifar is None or labels is None:
            raise SystemExit("CIFAR-10 needs --cifar and --labels.")
        names = CIFAR_CLASSES[kind]
        made = sets.cifar(out, cifar, labels, noise, CIFAR_IMAGES, CIFAR_TESTS, classes=names)
    return TrainConfig(**{"data": made.csv, **made.settings, **TRAINING})


def run_cell(config: TrainConfig, setting: Candidate | None, folder: Path) -> dict[str, Any]:
    """Return test accuracy of one setting, or the outcome of the search for None."""
    started = time.monotonic()
    if setting is None:
        search = tune(
            config,
            folder / "tune",
            lambdas=GRID["lambdas"],
            betas=GRID["betas"],
            lrs=GRID["lrs"],
        )
        result = search.to_dict()
        del result["folder"]
    else:
        changed = config.replace(**setting._asdict())
        last = fit(changed, folder / "run", overwrite=True, for_audit=False).metrics()[-1]
        result = {"test_accuracy": last["test_accuracy_true"], "memorised": last["wrong_memorised"]}
    return result | {"minutes": (time.monotonic() - started) / 60}


def cell_name(name: str, setting: Candidate | None, seed: int = 0) -> str:
    """Return the file of a cell."""
    values = "tune" if setting is None else "-".join(f"{value:g}" for value in setting)
    return f"{name}--{values}{f'-seed{seed}' if seed else ''}.json"


def main() -> None:
    """Run the cells that are missing, or print the table."""
    parser = sets.cifar_arguments(__doc__)
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--seeds", type=int, default=1, help="trainings of every setting")
    parser.add_argument("--budget-minutes", type=float, default=60)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    deadline = time.monotonic() + 60 * args.budget_minutes
    settings = [Candidate(*values) for values in itertools.product(*GRID.values())]
    for name in () if args.table else args.sets.split(","):
        with tempfile.TemporaryDirectory() as folder:
            config = make_config(name, Path(folder), args.cifar, args.labels)
            for setting, seed in [(None, 0), *itertools.product(settings, range(args.seeds))]:
                cell = args.out / cell_name(name, setting, seed)
                if cell.exists() or time.monotonic() > deadline:
                    continue
                result = run_cell(config.replace(seed=seed), setting, Path(folder))
                cell.write_text(json.dumps(result))
                print(name, setting or "tune", f"{result['minutes']:.1f} min", flush=True)
    if args.table:
        print_table(args.out, settings)


def print_table(folder: Path, settings: list[Candidate]) -> None:
    """Print test accuracies: the best of the grid, the pick, the defaults."""
    print(
        "| set | seeds | best of the grid | its accuracy | pick | its accuracy | defaults | cost |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in SETS:
        seeds, accuracy = mean_accuracies(folder, name, settings)
        outcome = folder / cell_name(name, None)
        if seeds == 0 or not outcome.exists():
            continue
        search = json.loads(outcome.read_text())
        best = max(accuracy, key=lambda setting: accuracy[setting])
        pick = Candidate(*search["pick"].values())
        shown = (accuracy[best], accuracy[pick], accuracy[DEFAULT])
        first, second, third = (f"{share:.1%}" for share in shown)
        row = (name, seeds, best, first, pick, second, third, f"{search['cost']:.0%}")
        print(f"| {' | '.join(map(str, row))} |")


def mean_accuracies(
    folder: Path, name: str, settings: list[Candidate]
) -> tuple[int, dict[Candidate, float]]:
    """Return how many seeds trained the whole grid, and each setting's mean over these."""
    found: list[list[float]] = []
    for seed in itertools.count():
        cells = [folder / cell_name(name, setting, seed) for setting in settings]
        if not all(cell.exists() for cell in cells):
            break
        found.append([json.loads(cell.read_text())["test_accuracy"] for cell in cells])
    if not found:
        return 0, {}
    return len(found), dict(zip(settings, np.mean(found, axis=0).tolist(), strict=True))


if __name__ == "__main__":
    main()
