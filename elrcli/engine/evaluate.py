"""Comparing a run's predictions with the labels of a data set."""

from __future__ import annotations

from dataclasses import dataclass, replace
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

BINS = 15  # of confidence: usual for the expected calibration error
FEW = 5  # classes that may hold the label


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
    top5_accuracy: float | None = None  # [0, 1]; None for up to five classes
    calibration_error: float | None = None  # [0, 1], 0 is best, see `Confidence`

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        return {
            "accuracy": self.accuracy,
            "balanced_accuracy": self.balanced_accuracy,
            "top5_accuracy": self.top5_accuracy,
            "calibration_error": self.calibration_error,
            "images": self.images,
            "per_class": self.per_class,
            "confusion": self.confusion.tolist(),
            "classes": list(self.classes),
            "unreadable": [{"path": path, "reason": reason} for path, reason in self.unreadable],
        }


class Confidence:
    """Sums over images: how far confidence is from accuracy, and labels among the likeliest five.

    The expected calibration error (Guo et al., ICML 2017) is the mean over images of the distance
    between mean confidence and accuracy of their bin, one of 15 of equal width.
    """

    def __init__(self) -> None:
        self._bins = np.zeros((BINS, 3))  # images, of these right, sum of confidences
        self._among_few = 0

    def add(self, probs: np.ndarray, labels: np.ndarray) -> None:
        """Add predictions [B, K] for images with these labels [B]."""
        confidence, is_right = probs.max(axis=1), probs.argmax(axis=1) == labels
        place = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
        columns = np.ones(len(labels)), is_right, confidence
        np.add.at(self._bins, place, np.stack(columns, axis=1))
        likelier = (probs > probs[np.arange(len(labels)), labels][:, None]).sum(axis=1)
        self._among_few += int((likelier < FEW).sum())

    def top5_accuracy(self) -> float:
        """Return the share of images whose label is among the five likeliest classes."""
        return self._among_few / float(self._bins[:, 0].sum())

    def calibration_error(self) -> float:
        """Return the expected calibration error in [0, 1], of at least one image."""
        images, right, confidence = self._bins.T
        return float(np.abs(right - confidence).sum() / images.sum())


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
    confusion, confidence = np.zeros((count, count), dtype=np.int64), Confidence()
    unreadable: list[tuple[str, str]] = []
    done = 0
    for seen, probs, problems in predictor.manifest_batches(
        manifest, rows, batch_size=batch_size, workers=workers
    ):
        np.add.at(confusion, (manifest.labels[seen], probs.argmax(axis=1)), 1)
        confidence.add(probs, manifest.labels[seen])
        unreadable += [(manifest.paths[row], reason) for row, reason in problems]
        done += len(seen) + len(problems)
        observer.progress("evaluate", done, len(rows))
    if len(unreadable) == len(rows):
        path, reason = unreadable[0]
        what = "predicted" if reason == NOT_FINITE else "read"
        raise DataError(f"{data}: no image can be {what}. {path}: {reason}.")
    found = evaluation_of(confusion, predictor.classes, unreadable)
    return replace(
        found,
        top5_accuracy=confidence.top5_accuracy() if count > FEW else None,
        calibration_error=confidence.calibration_error(),
    )


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
