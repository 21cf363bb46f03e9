"""The whole story on real handwritten digits: plant errors, train, audit, count."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import elrcli
from elrcli.audit.run import audit_run
from elrcli.config import TrainConfig
from elrcli.engine.evaluate import evaluate_run
from elrcli.engine.fit import fit
from elrcli.engine.observer import Observer
from elrcli.errors import Interrupted, RunError
from elrcli.files import json_text, write_text
from elrcli.tables import write_table

SIDE = 32  # the digits are 8 x 8 pixels
FLIPPED = 0.3
TEST_SHARE = 0.2
MARK = "demo.json"  # only a folder with it is ever cleared


@dataclass(frozen=True)
class DemoResult:
    """What the demo found, counted with the labels that it planted itself."""

    folder: Path
    report: Path
    run: Path  # the ELR run
    images: int  # in the training set
    planted: int  # wrong labels among them
    flagged: int
    found: int  # wrong labels among the flagged
    accuracy: dict[str, float]  # method -> accuracy on the clean test labels

    @property
    def precision(self) -> float:
        """Share of the flagged labels that are wrong, in [0, 1]."""
        return self.found / self.flagged if self.flagged else 0.0

    @property
    def recall(self) -> float:
        """Share of the wrong labels that are flagged, in [0, 1]."""
        return self.found / self.planted if self.planted else 0.0


def run_demo(
    out: Path | str = "elr-demo",
    *,
    seed: int = 0,
    epochs: int = 12,
    overwrite: bool = False,
    observer: Observer | None = None,
) -> DemoResult:
    """Write the digits with 30% wrong labels, train with and without ELR, audit the ELR run."""
    observer = observer or Observer()
    folder = Path(out)
    _prepare(folder, overwrite)
    digits, table = folder / "digits", folder / "labels.csv"
    planted = write_digits(digits, table, seed)
    observer.note(
        f"{len(planted):,} training images of digits, {sum(planted.values()):,} wrongly labelled: "
        f"{table}"
    )
    accuracy = {}
    for method in ("ce", "elr"):
        config = TrainConfig(
            data=table, root=digits / "train", method=method, **_settings(seed, epochs)
        )
        try:
            run = fit(config, folder / f"run-{method}", overwrite=overwrite, observer=observer)
        except Interrupted as error:
            words = ["elr", "demo", "--out", str(out), "--epochs", str(epochs), "--seed", str(seed)]
            command = f"{shlex.join(words)} --overwrite"
            raise Interrupted(error.signal_number, command) from None
        evaluation = evaluate_run(run.path, digits / "test", observer=observer)
        accuracy[method] = evaluation.accuracy
    result = audit_run(run.path, observer=observer)
    paths = run.manifest().paths
    flagged = [paths[int(row)] for row in result.rows[result.flagged]]
    return DemoResult(
        folder=folder,
        report=run.audit_folder / "report.html",
        run=run.path,
        images=len(planted),
        planted=sum(planted.values()),
        flagged=len(flagged),
        found=sum(planted[path] for path in flagged),
        accuracy=accuracy,
    )


def write_digits(folder: Path, table: Path, seed: int) -> dict[str, bool]:
    """Write the digits of scikit-learn as class folders; tell which training labels are wrong.

    `folder/train/<given label>/` holds 80%, of which 30% lie in the folder of another digit;
    `folder/test/<true label>/` the rest. `table` lists path, label and true_label of the
    training images, paths from `folder/train`.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pictures, truth = load_digits(return_X_y=True)
    numbers = np.arange(len(truth))
    train, test = train_test_split(numbers, test_size=TEST_SHARE, stratify=truth, random_state=seed)
    train = np.sort(train)
    rng = np.random.default_rng(seed)
    flipped = rng.permutation(len(train))[: round(FLIPPED * len(train))]
    given = truth[train]
    given[flipped] = (given[flipped] + rng.integers(1, 10, len(flipped))) % 10
    for number in test:
        _save(folder / "test" / f"{truth[number]}" / f"{number:04d}.png", pictures[number])
    rows = []
    for number, label in zip(train, given, strict=True):
        path = f"{label}/{number:04d}.png"
        _save(folder / "train" / path, pictures[number])
        rows.append({"path": path, "label": f"{label}", "true_label": f"{truth[number]}"})
    write_table(table, ("path", "label", "true_label"), rows)
    return {row["path"]: row["label"] != row["true_label"] for row in rows}


def _save(path: Path, values: Sequence[float]) -> None:
    """Write 64 values of 0..16 as a white-on-black picture."""
    pixels = (np.asarray(values).reshape(8, 8) * (255 / 16)).round().astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path)


def _settings(seed: int, epochs: int) -> dict[str, Any]:
    """Return the settings of both runs: small pictures, a small network, from scratch."""
    return {
        "truth_column": "true_label",
        "backbone": "resnet10t",
        "pretrained": False,
        "image_size": SIDE,
        "flip": False,  # a mirrored digit is no digit
        "epochs": epochs,
        "workers": 0,
        "cache": "ram",
        "seed": seed,
    }


def _prepare(folder: Path, overwrite: bool) -> None:
    """Make the folder, or clear that of an earlier demo, which has a mark."""
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder}: is a file. Choose another --out.")
    mark = folder / MARK
    if folder.is_dir() and any(folder.iterdir()):
        if not mark.is_file():
            raise RunError(f"{folder}: not empty and not a demo. Choose another --out.")
        if not overwrite:
            raise RunError(f"{folder}: exists. Add --overwrite, or choose another --out.")
        shutil.rmtree(folder / "digits", ignore_errors=True)
    write_text(mark, json_text({"elr": elrcli.__version__}))
