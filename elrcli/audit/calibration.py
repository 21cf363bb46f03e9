"""From evidence to probabilities: how likely is each label wrong, and how many are.

The share of wrong labels comes from held-out samples, whose targets no label has pulled. Their
target, raised to a sharpness and normalised, is taken for the probability of the true class; the
share is the one that makes the given labels most likely. The true sharpness cannot be known from
labels alone (a network that is surely wrong looks like a label that is wrong), so the share is
estimated for sharpness 1, a target that means what it says, and for 1.5, one that is
under-confident: the interval covers both.

The beliefs behind the single probabilities are then shifted so that their mean is that share:
training has pulled each sample's belief towards its own label, averaging over epochs has pulled
it away.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from elrcli.audit.evidence import Evidence, normalised

SHARPNESS = (1.0, 1.2247, 1.5)  # low, the geometric middle, high
FLOOR = 1e-6
MAX_FITTED = 50_000  # samples that a fit looks at; more change little
MIN_HELD_OUT = 30  # fewer say nothing about a share: trained samples help out
BOOTSTRAPS = 100
PRIOR_ERRORS = 0.1  # pseudo-counts of a Beta prior that keeps the share inside (0, 1)
MAX_PULL = 20.0


@dataclass(frozen=True)
class LabelModel:
    """How labels come about."""

    error_rate: float  # share of wrong labels, in (0, 1)
    interval: tuple[float, float]  # 90% interval of the share
    pull_trained: float  # logits that the belief of trained samples leans to their label
    pull_held_out: float  # the same for held-out samples


def fit_label_model(evidence: Evidence, seed: int = 0) -> LabelModel:
    """Return the model of the given labels.

    With fewer than 30 held-out samples the trained ones are judges as well; their targets follow
    the labels a little, which counts too few errors.
    """
    rng = np.random.default_rng(seed)
    judges = np.flatnonzero(evidence.held_out)
    if len(judges) < MIN_HELD_OUT:
        judges = np.arange(len(evidence.labels))
    if len(judges) > MAX_FITTED:
        judges = rng.choice(judges, MAX_FITTED, replace=False)
    classes = evidence.probs.shape[1]
    labels = evidence.labels[judges]
    given = [
        sharpened(evidence.targets[judges], power)[np.arange(len(judges)), labels]
        for power in SHARPNESS
    ]
    resampled = rng.integers(0, len(judges), (BOOTSTRAPS, len(judges)))
    low, high = (
        np.quantile([likely_error_rate(ends[draw], classes) for draw in resampled], quantile)
        for ends, quantile in ((given[0], 0.05), (given[-1], 0.95))
    )
    error_rate = likely_error_rate(given[1], classes)
    trained = ~evidence.held_out
    return LabelModel(
        error_rate=error_rate,
        interval=(min(float(low), error_rate), max(float(high), error_rate)),
        pull_trained=_pull(evidence.probs[trained], evidence.labels[trained], error_rate),
        pull_held_out=_pull(evidence.probs[~trained], evidence.labels[~trained], error_rate),
    )


def likely_error_rate(given: np.ndarray, classes: int) -> float:
    """Return the share of wrong labels that makes the labels most likely (EM).

    given [M] is the probability of the given label if it were right; a wrong label is any other
    class with equal probability.
    """
    wrong = (1 - given) / (classes - 1)
    rate = 0.1
    for _ in range(500):
        share = rate * wrong / (rate * wrong + (1 - rate) * given)
        updated = float((share.sum() + PRIOR_ERRORS) / (len(given) + 2 * PRIOR_ERRORS))
        if abs(updated - rate) < 1e-5:
            break
        rate = updated
    return rate


def unpulled(evidence: Evidence, model: LabelModel) -> np.ndarray:
    """Return what the images alone say of the true class, [M, K] float64 rows that sum to 1."""
    belief = np.maximum(evidence.probs, FLOOR).astype(np.float64)
    pull = np.where(evidence.held_out, model.pull_held_out, model.pull_trained)
    belief[np.arange(len(pull)), evidence.labels] *= np.exp(-pull)
    return normalised(belief)


def posterior(belief: np.ndarray, labels: np.ndarray, error_rate: float) -> np.ndarray:
    """Return P(true class | image, given label), belief [M, K] -> [M, K] float32."""
    odds = (1 - error_rate) / error_rate * (belief.shape[1] - 1)
    joint = belief.copy()
    joint[np.arange(len(labels)), labels] *= odds
    return normalised(joint).astype(np.float32)


def sharpened(probs: np.ndarray, sharpness: float) -> np.ndarray:
    """Return probabilities [M, K] raised to `sharpness` and normalised, float64."""
    return normalised(np.maximum(probs, FLOOR).astype(np.float64) ** sharpness)


def _pull(probs: np.ndarray, labels: np.ndarray, error_rate: float) -> float:
    """Return the pull at which the samples [M] are wrong with a mean probability `error_rate`."""
    if len(labels) == 0:
        return 0.0
    given = np.clip(probs[np.arange(len(labels)), labels], FLOOR, 1 - FLOOR).astype(np.float64)
    wrong = error_rate / (probs.shape[1] - 1) * (1 - given)
    right = (1 - error_rate) * given
    low, high = -MAX_PULL, MAX_PULL
    for _ in range(40):
        middle = 0.5 * (low + high)
        if (wrong / (wrong + right * np.exp(-middle))).mean() < error_rate:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)
