"""Beliefs and labels of which the truth is known."""

from __future__ import annotations

import numpy as np

from elrcli.audit.evidence import normalised


def draw_beliefs(samples: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return beliefs [M, K] that mean what they say, and true classes [M] drawn from them."""
    rng = np.random.default_rng(seed)
    belief = normalised(np.exp(rng.normal(0, 3.5, (samples, classes))))
    truth = (belief.cumsum(axis=1) > rng.random((samples, 1))).argmax(axis=1)
    return belief, truth


def uniform_errors(truth: np.ndarray, classes: int, rate: float, seed: int = 0) -> np.ndarray:
    """Return labels [M] of which the share `rate` is any other class."""
    rng = np.random.default_rng(seed)
    shift = rng.integers(1, classes, len(truth)) * (rng.random(len(truth)) < rate)
    return np.asarray((truth + shift) % classes)


def pair_errors(truth: np.ndarray, classes: int, rate: float, seed: int = 0) -> np.ndarray:
    """Return labels [M] of which the share `rate` is the next class."""
    rng = np.random.default_rng(seed)
    return np.asarray((truth + (rng.random(len(truth)) < rate)) % classes)


def calibration_error(probability: np.ndarray, happened: np.ndarray) -> float:
    """Return the mean distance of predicted and true shares over 10 bins, weighted by size."""
    bins = np.minimum((probability * 10).astype(int), 9)
    return sum(
        abs(probability[bins == k].mean() - happened[bins == k].mean()) * (bins == k).mean()
        for k in range(10)
        if (bins == k).any()
    )
