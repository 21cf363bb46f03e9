"""From evidence to probabilities: how likely is each label wrong.

Training has pulled the belief in each sample towards its own label, averaging over epochs has
pulled it away. Both cannot be seen one by one, but their sum can: the beliefs are shifted by so
many logits that the mean error probability is the share of wrong labels, which is estimated from
samples that were not trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from elrcli.audit.error_share import WEAK, ErrorShare, estimate_error_share
from elrcli.audit.evidence import CHUNK, FLOOR, Evidence, Table
from elrcli.errors import legible, named

JUDGES = 10  # held-out samples, fewer say nothing about a share of wrong labels
FEW = 30  # samples of one kind that have no pull of their own
BIASED = 10  # trained samples say as little as a draw from a population so many times as large
MAX_JUDGED = 5_000_000  # samples times classes that a fit looks at; more change little
MAX_PULL = 20.0  # beyond the most extreme belief


@dataclass(frozen=True, eq=False)
class Doubts:
    """How doubtful each of M labels is."""

    score: np.ndarray  # [M] float64 in [0, 1]: what speaks against the label, the pull taken out
    error: np.ndarray  # [M] float64 in (0, 1): probability that the label is wrong


def share_of_errors(evidence: Evidence) -> ErrorShare:
    """Return the share of wrong labels, as two witnesses see it.

    One is what networks say of samples that they did not train on: few, and what they confuse
    looks wrong to them. The other is the share of labels that training could not teach the
    network: of many samples, but it misses what was memorised and counts what was not learned.

    With fewer than 10 held-out samples the trained ones are judges too; their predictions follow
    the labels, which counts too few errors.
    """
    judges, population, is_apart = np.arange(len(evidence)), len(evidence), True
    if evidence.judged is None:
        held_out = np.flatnonzero(evidence.held_out)
        is_apart = len(held_out) >= JUDGES
        if is_apart:
            judges = held_out
        elif len(held_out) < len(evidence):
            population *= BIASED
    limit = max(1, MAX_JUDGED // evidence.classes)
    drawn = judges
    if len(judges) > limit:
        drawn = np.sort(np.random.default_rng(0).choice(judges, limit, replace=False))
    share = estimate_error_share(evidence.verdict(drawn), evidence.labels[drawn], population)
    trained = np.flatnonzero(~evidence.held_out)
    if not is_apart or len(trained) == 0:
        return share
    return _with_unlearned(
        share,
        unlearned=_disagreement(evidence.seen, evidence, trained),
        apart=_disagreement(evidence.apart, evidence, judges),
    )


def cautions(evidence: Evidence, classes: Sequence[str], share: ErrorShare) -> list[str]:
    """Return reasons not to trust the estimates, a sentence or two each; most runs have none."""
    judges = np.arange(len(evidence))
    found = []
    if evidence.judged is None and not evidence.held_out.all():
        judges = np.flatnonzero(evidence.held_out)
        if len(judges) < FEW:
            number = {0: "None", 1: "Only 1 image"}.get(len(judges), f"Only {len(judges)} images")
            verb = "was" if len(judges) == 1 else "were"
            found.append(
                f"{number} of {len(evidence):,} {verb} held out from training, so the number of"
                " wrong labels is a rough guess. A larger --val-fraction makes it better."
            )
        trained = np.unique(evidence.labels[~evidence.held_out])
        untaught = np.setdiff1d(evidence.labels[judges], trained)
        if len(untaught):
            names = named([f"'{legible(classes[label])}'" for label in untaught])
            found.append(
                f"No training image of {names}: the run cannot know them, and their labels look"
                " wrong."
            )
    if len(judges) < JUDGES:
        return found
    agreement = 1 - _disagreement(evidence.apart, evidence, judges)
    counts = np.bincount(evidence.labels[judges], minlength=evidence.classes)
    largest = int(counts.argmax())
    usual = counts[largest] / len(judges)
    chance = usual + 2 * np.sqrt(usual * (1 - usual) / len(judges))
    if agreement < min(chance, (1 + usual) / 2):  # half of what one answer misses is not luck
        found.append(
            f"The run predicts {agreement:.0%} of the labels that were held out, and always saying"
            f" '{classes[largest]}' would predict {usual:.0%}: it has learned too little to judge"
            " labels. Train longer, or with another --backbone."
        )
    elif share.confidence < WEAK:
        found.append(
            f"The run is hardly surer of one class than of another: it predicts {agreement:.0%} of"
            " the labels that were held out. The number of wrong labels is a guess. Train longer,"
            " or with another --backbone."
        )
    return found


def _with_unlearned(share: ErrorShare, unlearned: float, apart: float) -> ErrorShare:
    """Return `share` drawn towards the share of labels that training did not teach the network.

    unlearned, apart: shares of labels that the prediction disagrees with, among trained samples
    and among those kept apart. The first counts most, as much as the estimate, where training
    resolved half of the disagreement; where it resolved none or all, it says nothing.
    """
    resolved = float(np.clip(1 - unlearned / max(apart, FLOOR), 0.0, 1.0))
    weight = 2 * resolved * (1 - resolved)
    estimate = (1 - weight) * share.estimate + weight * unlearned
    return replace(
        share,
        estimate=estimate,
        low=min(share.low, estimate),
        high=max(share.high, estimate),
    )


def _disagreement(table: Table, evidence: Evidence, positions: np.ndarray) -> float:
    """Return the share of the samples whose label is not the leading class of their line."""
    step = max(1, CHUNK // evidence.classes)
    differ = 0
    for start in range(0, len(positions), step):
        part = positions[start : start + step]
        differ += int((table[evidence.rows[part]].argmax(axis=1) != evidence.labels[part]).sum())
    return differ / len(positions)


def doubt_labels(
    given: np.ndarray, held_out: np.ndarray, share: float, sharpness: float, classes: int
) -> Doubts:
    """Return score and error probability of labels, given the belief in them.

    given [M] belief in the given label, `sharpness` the power that makes it a probability,
    held_out [M] bool: both kinds have a pull of their own, so that the mean error probability is
    `share` in each; fewer than 30 samples of one kind share the pull of the others.
    """
    inside = np.clip(given.astype(np.float64), FLOOR, 1 - FLOOR)
    logits = sharpness * (np.log(inside) - np.log1p(-inside))
    prior = np.log((1 - share) / share * (classes - 1))  # most labels are right
    score = np.empty(len(given))
    error = np.empty(len(given))
    kinds = [held_out, ~held_out]
    if min(int(kind.sum()) for kind in kinds) < FEW:
        kinds = [np.ones_like(held_out)]
    for kind in kinds:
        pull = _pull(logits[kind] + prior, share)
        score[kind] = _sigmoid(pull - logits[kind])
        error[kind] = _sigmoid(pull - logits[kind] - prior)
    return Doubts(score, error)


def _pull(logits: np.ndarray, share: float) -> float:
    """Return the shift at which the mean error probability is `share`, by bisection."""
    low = float(logits.min(initial=0.0)) - MAX_PULL
    high = float(logits.max(initial=0.0)) + MAX_PULL
    for _ in range(40 if len(logits) else 0):
        middle = 0.5 * (low + high)
        if _sigmoid(middle - logits).mean() < share:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # 1 / inf is 0
        return np.asarray(1 / (1 + np.exp(-x)))


def posterior(belief: np.ndarray, labels: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Return P(true class | image, given label) [M, K] float32.

    belief [M, K], labels [M] given, error [M] probability that the label is wrong: it is shared
    out among the other classes as the belief says.
    """
    samples = np.arange(len(labels))
    found: np.ndarray = np.maximum(belief, FLOOR).astype(np.float32)
    found[samples, labels] = 0.0
    found *= (error / np.maximum(found.sum(axis=1), FLOOR))[:, None].astype(np.float32)
    found[samples, labels] = 1 - error
    return found
