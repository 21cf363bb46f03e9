"""Synthetic label noise with known truth: clean labels in, given labels out.

Every function takes labels [N] of integer class ids and returns a new array of the same shape
and type; nothing is changed in place. `rng` alone decides the draws.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def symmetric(
    labels: np.ndarray, num_classes: int, rate: float, rng: np.random.Generator
) -> np.ndarray:
    """Redraw each label with probability `rate` (0..1), uniformly over all classes.

    A redrawn label may be the true one, so rate 0.4 at 10 classes gives 36% wrong labels: the
    definition behind the tables of Liu et al. 2020 (ELR).
    """
    _check_rate(rate)
    redrawn = rng.random(len(labels)) < rate
    drawn = rng.integers(0, num_classes, len(labels))
    return np.where(redrawn, drawn, labels).astype(labels.dtype)


def asymmetric(
    labels: np.ndarray, mapping: Mapping[int, int], rate: float, rng: np.random.Generator
) -> np.ndarray:
    """Turn class a into `mapping[a]` with probability `rate` (0..1); other classes stay.

    All flips start from the clean labels, so cat <-> dog swaps both ways without flipping any
    label back. Patrini et al. 2017; on CIFAR-10 truck -> automobile, bird -> airplane,
    deer -> horse, cat <-> dog.
    """
    _check_rate(rate)
    flipped = rng.random(len(labels)) < rate
    noisy = labels.copy()
    for source, target in mapping.items():
        noisy[flipped & (labels == source)] = target
    return noisy


def pair(labels: np.ndarray, num_classes: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Turn each label into the next class (the last into the first) with probability `rate`.

    Han et al. 2018 (Co-teaching), "pair flip".
    """
    return asymmetric(labels, {k: (k + 1) % num_classes for k in range(num_classes)}, rate, rng)


def from_matrix(labels: np.ndarray, matrix: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw each label from its row of `matrix` [K, K], P(given | true); rows sum to 1."""
    matrix = np.asarray(matrix, dtype=np.float64)
    num_classes = len(matrix)
    if matrix.shape != (num_classes, num_classes):
        raise ValueError(f"matrix must be square, not {matrix.shape}")
    if (matrix < 0).any() or not np.allclose(matrix.sum(axis=1), 1.0, atol=1e-6):
        raise ValueError("each row of the matrix must be probabilities that sum to 1")
    return _draw(np.cumsum(matrix, axis=1)[labels], rng).astype(labels.dtype)


def instance_dependent(
    labels: np.ndarray,
    features: np.ndarray,
    num_classes: int,
    rate: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Mislabel hard-looking samples more than others: the flip depends on the features [N, D].

    Xia et al. 2020 (part-dependent noise), algorithm 2: a sample's flip rate q is drawn from a
    normal around `rate` (deviation 0.1) cut to [0, 1], so that the mean rate is higher near 0 and
    lower near 1; its wrong class is drawn from the softmax of x @ W[y], with one random
    projection W[y] [D, K] per class and the true class left out. Standardise the features first:
    large values make the wrong class certain.
    """
    _check_rate(rate)
    flip_rates = _truncated_normal(rate, 0.1, len(labels), rng)
    noisy = labels.copy()
    for label in range(num_classes):
        projection = rng.standard_normal((features.shape[1], num_classes))
        rows = np.flatnonzero(labels == label)
        logits = features[rows].astype(np.float64) @ projection
        logits[:, label] = -np.inf
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = weights / weights.sum(axis=1, keepdims=True) * flip_rates[rows, None]
        probabilities[:, label] = 1.0 - flip_rates[rows]
        noisy[rows] = _draw(np.cumsum(probabilities, axis=1), rng)
    return noisy


def _draw(cumulative: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw one class per row from cumulative probabilities [N, K]."""
    points = rng.random(len(cumulative))[:, None] * cumulative[:, -1:]  # rounding: not quite 1
    return np.asarray((points >= cumulative).sum(axis=1))


def _truncated_normal(
    mean: float, deviation: float, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Draw from a normal, again where a value falls outside [0, 1]."""
    values = rng.normal(mean, deviation, count)
    while (outside := (values < 0.0) | (values > 1.0)).any():
        values[outside] = rng.normal(mean, deviation, int(outside.sum()))
    return values


def _check_rate(rate: float) -> None:
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"noise rate must lie in 0..1, not {rate}")
