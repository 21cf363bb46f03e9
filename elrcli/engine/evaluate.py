"""Comparing a run's predictions with the labels of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from elrcli.config import Reading
from elrcli.data.folders import left_out
from elrcli.data.manifest import load_data
from elrcli.data.rows import SPLITS
from elrcli.engine.distributed import joined
from elrcli.engine.observer import Observer
from elrcli.engine.predict import NOT_FINITE, Predictor
from elrcli.errors import ConfigError, DataError
from elrcli.run import RunFolder


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Agreement of predictions and labels over the images that could be read."""

    images: int
    accuracy: float  # [0, 1]
    balanced_accuracy: float  # mean recall of the classes that occur
    per_class: list[dict[str, Any]]  # class, images, precision, recall, f1; None where undefined
    confusion: np.ndarray  # [K, K] int64 counts, rows are labels, columns predictions
    classes: tuple[str, ...]
    unreadable: list[tuple[str, str]]  # (path, reason)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        return {
            "accuracy": self.accuracy,
            "balanced_accuracy": self.balanced_accuracy,
            "images": self.images,
            "per_class": self.per_class,
            "confusion": self.confusion.tolist(),
            "classes": list(self.classes),
            "unreadable": [{"path": path, "reason": reason} for path, reason in self.unreadable],
        }


@joined()
def evaluate_run(
    run_path: Path,
    data: Path,
    *,
    reading: Reading = Reading(),
    split: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int = 64,
    workers: int | None = None,
    observer: Observer | None = None,
) -> Evaluation:
    """Classify the images of `data` (one split of it, or all) and compare with their labels.

    Raises DataError for a label that the run does not know and where no image can be read.
    """
    if split is not None and split not in SPLITS:
        raise ConfigError(f"--split {split}: choose one of {', '.join(SPLITS)}.")
    predictor = Predictor.load(run_path, device=device, precision=precision)
    manifest = load_data(data, reading, classes=predictor.classes)
    rows = np.arange(len(manifest)) if split is None else manifest.rows(split)
    if len(rows) == 0:
        run = RunFolder(run_path)
        remedy = "Leave --split out."
        if split == "val" and run.manifest_file.is_file():
            root = run.config().get("data_root")
            remedy = f"What the run has drawn is in {run.manifest_file}, with --root {root}."
        raise DataError(f"{data}: has no images in the split '{split}'. {remedy}")
    observer = observer or Observer()
    for line in left_out(data):
        observer.note(line)
    count = len(predictor.classes)
    confusion = np.zeros((count, count), dtype=np.int64)
    unreadable: list[tuple[str, str]] = []
    done = 0
    for seen, probs, problems in predictor.manifest_batches(
        manifest, rows, batch_size=batch_size, workers=workers
    ):
        np.add.at(confusion, (manifest.labels[seen], probs.argmax(axis=1)), 1)
        unreadable += [(manifest.paths[row], reason) for row, reason in problems]
        done += len(seen) + len(problems)
        observer.progress("evaluate", done, len(rows))
    if len(unreadable) == len(rows):
        path, reason = unreadable[0]
        what = "predicted" if reason == NOT_FINITE else "read"
        raise DataError(f"{data}: no image can be {what}. {path}: {reason}.")
    return evaluation_of(confusion, predictor.classes, unreadable)


def evaluation_of(
    confusion: np.ndarray, classes: tuple[str, ...], unreadable: list[tuple[str, str]]
) -> Evaluation:
    """Return all figures that follow from the counts [K, K], rows labels, columns predictions."""
    right, labelled, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    per_class = []
    for label, name in enumerate(classes):
        recall = _ratio(right[label], labelled[label])
        precision = _ratio(right[label], predicted[label])
        per_class.append(
            {
                "class": name,
                "images": int(labelled[label]),
                "precision": precision,
                "recall": recall,
                "f1": _ratio(2 * right[label], labelled[label] + predicted[label]),
            }
        )
    present = labelled > 0
    return Evaluation(
        images=int(confusion.sum()),
        accuracy=float(right.sum() / confusion.sum()),
        balanced_accuracy=float((right[present] / labelled[present]).mean()),
        per_class=per_class,
        confusion=confusion,
        classes=classes,
        unreadable=unreadable,
    )


def _ratio(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None
