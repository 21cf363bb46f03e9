from __future__ import annotations

import numpy as np
import pytest

from elrcli.audit.calibration import (
    fit_label_model,
    likely_error_rate,
    posterior,
    sharpened,
    unpulled,
)
from elrcli.audit.evidence import Evidence, normalised


def make_evidence(
    error_rate: float,
    samples: int = 4000,
    classes: int = 5,
    held_out: float = 0.25,
    pull: float = 0.0,
    seed: int = 0,
) -> tuple[Evidence, np.ndarray]:
    """Draw beliefs, true classes from them, labels with uniform errors; return evidence, errors.

    Trained samples have `pull` logits added to the class of their label.
    """
    rng = np.random.default_rng(seed)
    probs = normalised(np.exp(rng.normal(0, 2.5, (samples, classes))))
    truth = (probs.cumsum(axis=1) > rng.random((samples, 1))).argmax(axis=1)
    wrong = rng.random(samples) < error_rate
    shift = rng.integers(1, classes, samples)
    labels = np.where(wrong, (truth + shift) % classes, truth)
    is_held_out = np.arange(samples) < held_out * samples
    pulled = probs.copy()
    pulled[np.arange(samples), labels] *= np.where(is_held_out, 1.0, np.exp(pull))
    pulled = normalised(pulled).astype(np.float32)
    evidence = Evidence(np.arange(samples), labels.astype(np.int32), is_held_out, pulled, pulled)
    return evidence, wrong


def calibration_error(probability: np.ndarray, happened: np.ndarray) -> float:
    bins = np.minimum((probability * 10).astype(int), 9)
    return sum(
        abs(probability[bins == k].mean() - happened[bins == k].mean()) * (bins == k).mean()
        for k in range(10)
        if (bins == k).any()
    )


def test_labels_that_the_belief_is_sure_of_hold_no_errors():
    assert likely_error_rate(np.full(1000, 0.999), classes=10) < 0.001


def test_a_tenth_of_impossible_labels_is_a_tenth_of_errors():
    given = np.concatenate([np.full(900, 0.9999), np.full(100, 0.0001)])
    assert likely_error_rate(given, classes=10) == pytest.approx(0.1, abs=0.005)


@pytest.mark.parametrize("error_rate", [0.05, 0.2, 0.4])
def test_the_share_lies_in_its_interval(error_rate):
    evidence, wrong = make_evidence(error_rate)
    model = fit_label_model(evidence)
    assert model.interval[0] <= wrong.mean() <= model.interval[1]
    assert model.interval[0] <= model.error_rate <= model.interval[1]


def test_probabilities_mean_what_they_say_although_training_pulled_the_beliefs():
    evidence, wrong = make_evidence(0.2, pull=2.0)
    model = fit_label_model(evidence)
    belief = posterior(unpulled(evidence, model), evidence.labels, model.error_rate)
    error = 1 - belief[np.arange(len(wrong)), evidence.labels]
    assert model.pull_trained == pytest.approx(2.0, abs=0.7)
    assert abs(model.pull_held_out) < 0.7
    assert calibration_error(error, wrong) < 0.05
    assert error.mean() == pytest.approx(model.error_rate, abs=0.01)


def test_without_held_out_samples_the_trained_ones_judge():
    evidence, wrong = make_evidence(0.3, held_out=0.0)
    assert fit_label_model(evidence).error_rate == pytest.approx(wrong.mean(), abs=0.1)


def test_the_same_evidence_gives_the_same_model():
    evidence, _ = make_evidence(0.2)
    assert fit_label_model(evidence) == fit_label_model(evidence)


def test_the_posterior_by_hand():
    # belief (.5, .3, .2), label 0, errors 20%: odds (.8 / .2) * 2 = 8 for the given class
    belief = posterior(np.array([[0.5, 0.3, 0.2]]), np.array([0]), 0.2)
    np.testing.assert_allclose(belief, [[4.0 / 4.5, 0.3 / 4.5, 0.2 / 4.5]], rtol=1e-6)


def test_sharpening_keeps_the_order_and_sums_to_one():
    sharp = sharpened(np.array([[0.6, 0.3, 0.1]]), 2.0)
    np.testing.assert_allclose(sharp, [[0.36 / 0.46, 0.09 / 0.46, 0.01 / 0.46]])
