"""How many labels are wrong, from what a network says of samples that it was not trained on.

Two things are unknown: how far the network's confidence can be believed, and how wrong labels
come about. Two models of the labels are fitted by maximum likelihood (EM).

1. Errors are uniform or between classes that the network confuses. This model judges the
   sharpness s of the belief p ** s: labels in classes that a surely wrong belief gives no chance
   speak for errors, labels in its second choices for doubt. It does not know that people err
   most where pictures are ambiguous: that looks like a network that is too sure, so against
   larger s its likelihood counts little.
2. At that sharpness, a free noise matrix P(given | true), drawn towards the first model: it also
   sees errors that always go from one class to another. Its share is the estimate.

The interval goes from the first model at the smallest likely sharpness, which takes every
plausible label for right, to the second at the largest, plus the chance of the draw of samples. A
network that is sure of hardly anything cannot tell wrong labels from its own ignorance: then any
label that it does not predict may be wrong. How the constants were chosen is in docs/benchmarks.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from elrcli.audit.evidence import FLOOR, normalised

STEP = np.log(5) / 24  # between two values of log s
SPAN = (0, 24)  # steps from s = 0.5, to 2.5: these are always looked at
FARTHEST = (-24, 76)  # to 0.1 and 81, where a network is so far off: with many classes, say
USUAL_SHARPNESS = (0.2, 0.2)  # mean and deviation of log s before any label is seen
WEIGHT = 0.1  # of the likelihood against a larger sharpness than the most likely one
LIKELY = 2.0  # below its maximum at the ends of the interval
DOUBT = 2  # steps beyond, which no number of samples takes away: models are not true
QUANTILE = 1.645  # of the normal distribution, for 90% on both sides
TOWARDS_FIRST = 0.3  # labels per cell of the matrix that the first model weighs in the second
PRIOR = (0.2, 0.1, 0.1)  # pseudo-counts that keep the shares inside (0, 1)
ITERATIONS = 200
WEAK = 0.2  # confidence below which a network cannot tell wrong labels from its own ignorance


@dataclass(frozen=True)
class ErrorShare:
    """Share of wrong labels with a 90% interval, all in [0, 1]."""

    estimate: float
    low: float
    high: float
    sharpness: float  # power of the belief that the estimate rests on
    confidence: float  # in the leading class: 0 all are alike, 1 certain; a mean, at that power


def estimate_error_share(belief: np.ndarray, labels: np.ndarray, population: int) -> ErrorShare:
    """Return the share of wrong labels among `population` samples of which these are a draw.

    belief [M, K] rows that sum to 1, of samples that were not trained on; labels [M] given.
    """
    order = np.argsort(labels, kind="stable")
    belief, labels = belief[order], labels[order]
    fits: dict[int, _Shares] = {}
    start, end = SPAN
    while True:
        for step in range(start, end + 1):
            if step not in fits:
                fits[step] = _fit_shares(sharpened(belief, _sharpness(step)), labels)
        first, best, last = _plausible(fits)
        if start <= first and last <= end:
            break
        start, end = min(start, first), max(end, last)
    estimate, highest = (
        _matrix_share(sharpened(belief, _sharpness(step)), labels, fits[step])
        for step in (best, last)
    )
    below, above = _chance(estimate, len(labels), population)
    low = min(fits[first].share, estimate) - below - 0.5 / population
    high = max(highest, estimate) + above
    leading = sharpened(belief, _sharpness(best)).max(axis=1).mean()
    chance = 1 / belief.shape[1]
    confidence = float((leading - chance) / (1 - chance))
    if confidence < WEAK:  # what it has predicted is mostly right, all else may be wrong
        low, high = 0.0, max(high, float((belief.argmax(axis=1) != labels).mean()))
    return ErrorShare(
        estimate,
        low=float(max(low, 0.0)),
        high=float(min(high, 1.0)),
        sharpness=_sharpness(best),
        confidence=confidence,
    )


def _sharpness(step: int) -> float:
    return 0.5 * float(np.exp(step * STEP))


def _plausible(fits: Mapping[int, _Shares]) -> tuple[int, int, int]:
    """Return the steps of the sharpness to go on with: the smallest, the best and the largest."""
    steps = np.array(sorted(fits))
    usual, spread = USUAL_SHARPNESS
    prior = -0.5 * ((np.log(0.5) + steps * STEP - usual) / spread) ** 2
    likelihood = np.array([fits[step].likelihood for step in steps])
    likelihood -= likelihood.max()
    is_larger = np.arange(len(steps)) > likelihood.argmax()
    plausible = prior + np.where(is_larger, WEIGHT, 1.0) * likelihood
    best = plausible.argmax()
    likely = steps[plausible >= plausible[best] - LIKELY]
    first, last = max(likely[0] - DOUBT, FARTHEST[0]), min(likely[-1] + DOUBT, FARTHEST[1])
    return int(first), int(steps[best]), int(last)


def _chance(share: float, drawn: int, population: int) -> tuple[float, float]:
    """Return how far the share of a population may lie below and above that of a draw from it.

    Wilson's interval (1927): where no wrong label was drawn there may still be some.
    """
    if drawn == population:
        return 0.0, 0.0
    width = QUANTILE**2 * (1 - drawn / population) / drawn
    middle = (share + width / 2) / (1 + width)
    half = np.sqrt(share * (1 - share) * width + width**2 / 4) / (1 + width)
    return share - middle + half, middle + half - share


def sharpened(belief: np.ndarray, sharpness: float) -> np.ndarray:
    """Return probabilities [M, K] raised to `sharpness` and normalised, float64."""
    return normalised(np.maximum(belief, FLOOR).astype(np.float64) ** sharpness)


@dataclass(frozen=True, eq=False)
class _Shares:
    shares: np.ndarray  # [3] right labels, uniform errors, errors by confusion
    likelihood: float  # log-likelihood of the labels

    @property
    def share(self) -> float:
        """Share of wrong labels."""
        return float(1 - self.shares[0])


def _fit_shares(belief: np.ndarray, labels: np.ndarray) -> _Shares:
    """Fit the first model: a share of uniform errors and one of errors by confusion."""
    classes = belief.shape[1]
    confusion = _confusion(belief)
    right = belief[np.arange(len(labels)), labels]
    uniform = (1 - right) / (classes - 1)
    confused = np.einsum("mk,km->m", belief, confusion[:, labels])
    kinds = np.stack([right, uniform, confused], axis=1)
    shares = np.array([0.9, 0.05, 0.05])
    for _ in range(ITERATIONS):
        joint = kinds * shares
        counts = (joint / joint.sum(axis=1, keepdims=True)).sum(axis=0) + PRIOR
        updated = counts / counts.sum()
        change = np.abs(updated - shares).max()
        shares = updated
        if change < 1e-6:
            break
    return _Shares(shares, float(np.log(kinds @ shares).sum()))


def _confusion(belief: np.ndarray) -> np.ndarray:
    """Return how the belief in other classes spreads, per leading class: [K, K], rows sum to 1."""
    classes = belief.shape[1]
    leading = belief.argmax(axis=1)
    order = np.argsort(leading, kind="stable")
    confusion = np.full((classes, classes), 1e-3)
    names, starts = np.unique(leading[order], return_index=True)
    confusion[names] += np.add.reduceat(belief[order], starts, axis=0)
    np.fill_diagonal(confusion, 0.0)
    return normalised(confusion)


def _matrix_share(belief: np.ndarray, labels: np.ndarray, fit: _Shares) -> float:
    """Fit the second model, a free noise matrix; labels are sorted. Return its share of errors."""
    classes = belief.shape[1]
    right, uniform, confused = fit.shares
    matrix = confused * _confusion(belief)
    matrix += uniform / (classes - 1)
    np.fill_diagonal(matrix, right)
    prior = TOWARDS_FIRST * classes * matrix
    names, starts = np.unique(labels, return_index=True)
    counts = np.zeros_like(matrix)
    for _ in range(ITERATIONS):
        joint = belief * matrix.T[labels]
        counts[:, names] = np.add.reduceat(normalised(joint), starts, axis=0).T
        updated = normalised(counts + prior)
        change = np.abs(updated - matrix).max()
        matrix = updated
        if change < 1e-4:
            break
    np.fill_diagonal(counts, 0.0)
    return float(np.clip(counts.sum() / len(labels), FLOOR, 1 - FLOOR))
