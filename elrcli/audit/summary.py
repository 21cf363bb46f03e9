"""The figures of an audit as one dictionary, the content of `summary.json`."""

from __future__ import annotations

from typing import Any

import numpy as np

PAIRS = 20
MOST_CLASSES = 1000  # of a matrix that a file holds and a person can look at


def summarise(
    labels: np.ndarray, joint: np.ndarray, flagged: np.ndarray, classes: tuple[str, ...]
) -> dict[str, Any]:
    """Return per-class rates, noise matrix and confused pairs.

    The matrix holds P(given class | true class); zeros for a class to which nothing belongs. With
    more than MOST_CLASSES it is None.
    labels [M] given, joint [K, K] expected samples per (true, given) class, flagged [M] bool.
    """
    given = joint.sum(axis=0)
    true = joint.sum(axis=1)
    is_there = true >= 0.5  # what is less than half a sample, calibration has added
    matrix = np.where(is_there[:, None], joint / np.maximum(true, 1e-12)[:, None], 0.0)
    samples = np.bincount(labels, minlength=len(classes))
    doubted = np.bincount(labels[flagged], minlength=len(classes))
    per_class = [
        {
            "class": name,
            "samples": int(samples[label]),
            "flagged": int(doubted[label]),
            "estimated_error_rate": _rate(given[label] - joint[label, label], given[label]),
        }
        for label, name in enumerate(classes)
    ]
    is_small = len(classes) <= MOST_CLASSES
    return {
        "per_class": per_class,
        "noise_matrix": matrix.round(6).tolist() if is_small else None,
        "most_confused": confused_pairs(joint, classes),
    }


def joint_counts(labels: np.ndarray, posterior: np.ndarray) -> np.ndarray:
    """Return the expected number of samples per (true, given) class, [K, K] float64.

    labels [M] given, posterior [M, K] P(true class).
    """
    counts = np.zeros((posterior.shape[1], posterior.shape[1]))
    order = np.argsort(labels, kind="stable")
    names, starts = np.unique(labels[order], return_index=True)
    counts[:, names] = np.add.reduceat(posterior[order], starts, axis=0, dtype=np.float64).T
    return counts


def confused_pairs(joint: np.ndarray, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the pairs of different classes with most samples, at least half a sample each."""
    off = joint.copy()
    np.fill_diagonal(off, 0.0)
    true_totals = np.maximum(joint.sum(axis=1), 1e-12)
    largest = np.argsort(-off, axis=None, kind="stable")[:PAIRS]
    pairs = []
    for true, given in zip(*np.unravel_index(largest, off.shape), strict=True):
        if off[true, given] < 0.5:
            break
        pairs.append(
            {
                "true": classes[true],
                "given": classes[given],
                "probability": round(float(off[true, given] / true_totals[true]), 6),
                "samples": round(float(off[true, given]), 1),
            }
        )
    return pairs


def _rate(part: float, whole: float) -> float | None:
    return round(float(part / whole), 6) if whole > 0 else None
