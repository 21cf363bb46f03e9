"""The ranking itself: arrays in, an ordered result out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from elrcli.audit.calibration import doubt_labels, posterior, share_of_errors
from elrcli.audit.error_share import ErrorShare
from elrcli.audit.evidence import Evidence
from elrcli.audit.neighbours import FeatureSpace
from elrcli.audit.result import AuditResult
from elrcli.audit.summary import joint_counts

TOP_CLASSES = 5
EXEMPLARS = 12  # per class
SURE = 0.1  # error probability below which a sample may stand for its class
CANDIDATES = 2_000  # surest samples of a class among which the nearest are looked for


@dataclass(frozen=True, eq=False)
class Ranking:
    """The result without summary, and what the summary is made from."""

    result: AuditResult
    share: ErrorShare
    joint: np.ndarray  # [K, K] expected samples per (true, given) class


def rank_labels(evidence: Evidence, threshold: float) -> Ranking:
    """Score, calibrate and order the evidence; labels are flagged from `threshold` on."""
    labels, classes = evidence.labels, evidence.classes
    given = np.concatenate(
        [evidence.belief(part)[np.arange(len(part)), labels[part]] for part in evidence.chunks()]
    )
    share = share_of_errors(evidence)
    doubts = doubt_labels(given, evidence.held_out, share.estimate, share.sharpness, classes)
    flagged = doubts.error >= threshold
    joint = np.zeros((classes, classes))
    suggested = labels.copy()
    top_classes = np.empty((len(labels), min(TOP_CLASSES, classes)), dtype=np.int32)
    top_probabilities = np.empty(top_classes.shape, dtype=np.float32)
    for part in evidence.chunks():
        probable = posterior(evidence.belief(part), labels[part], doubts.error[part])
        joint += joint_counts(labels[part], probable)
        top_classes[part], top_probabilities[part] = _leading(probable, top_classes.shape[1])
        suggested[part] = top_classes[part, 0]
        probable[np.arange(len(part)), labels[part]] = -1.0
        suggested[part[flagged[part]]] = probable.argmax(axis=1)[flagged[part]]
    order = np.lexsort((evidence.rows, -doubts.score))
    sure = sure_samples(labels[order], doubts.error[order])
    result = AuditResult(
        rows=evidence.rows[order],
        labels=labels[order],
        suggested=suggested[order],
        score=doubts.score[order].astype(np.float32),
        error_probability=doubts.error[order].astype(np.float32),
        flagged=flagged[order],
        top_classes=top_classes[order],
        top_probabilities=top_probabilities[order],
        exemplars={
            label: evidence.rows[order[places[:EXEMPLARS]]] for label, places in sure.items()
        },
        summary={},
    )
    return Ranking(result, share, joint)


def sure_samples(labels: np.ndarray, error: np.ndarray) -> dict[int, np.ndarray]:
    """Return per class the places of samples that may stand for it, the surest first.

    labels and error [M], most suspicious first. A class without sure samples has its least
    doubtful ones, as long as they are more probably right than wrong.
    """
    surest_first = np.arange(len(labels))[::-1]
    by_class = surest_first[np.argsort(labels[surest_first], kind="stable")]
    names, starts = np.unique(labels[by_class], return_index=True)
    sure = {}
    for label, places in zip(names.tolist(), np.split(by_class, starts[1:]), strict=True):
        count = max(int((error[places] < SURE).sum()), EXEMPLARS)
        places = places[: min(count, CANDIDATES)]
        sure[label] = places[error[places] < 0.5]
    return sure


def nearest_exemplars(
    result: AuditResult, rows: np.ndarray, space: FeatureSpace, suspects: int
) -> dict[int, dict[int, np.ndarray]]:
    """Return, for the leading suspects, the sure samples of both classes that are most like them.

    rows [M] ascending are the manifest rows of `space`. Manifest row -> class -> up to 12
    manifest rows, nearest first.
    """
    sure = sure_samples(result.labels, result.error_probability)
    leading = result.rows[:suspects]
    classes = np.stack([result.labels[:suspects], result.suggested[:suspects]])
    nearest: dict[int, dict[int, np.ndarray]] = {int(row): {} for row in leading}
    for label in np.unique(classes).tolist():
        concerned = leading[(classes == label).any(axis=0)]
        candidates = np.sort(np.searchsorted(rows, result.rows[sure.get(label, [])]))
        queries = np.searchsorted(rows, concerned)
        found, _ = space.nearest(queries, candidates, EXEMPLARS)
        for row, places in zip(concerned.tolist(), found, strict=True):
            nearest[row][label] = rows[places]
    return nearest


def _leading(probable: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the `count` most probable classes of every row and their probabilities."""
    best = torch.from_numpy(probable).topk(count, dim=1)
    return best.indices.numpy(), best.values.numpy()
