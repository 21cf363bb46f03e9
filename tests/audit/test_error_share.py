from __future__ import annotations

import numpy as np
import pytest

from elrcli.audit.error_share import estimate_error_share, sharpened
from tests.audit.labels import draw_beliefs, pair_errors, uniform_errors

SAMPLES, CLASSES = 3000, 5


def estimate(labels, belief):
    return estimate_error_share(belief, labels, population=len(labels))


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.2, 0.4])
@pytest.mark.parametrize("draw", [uniform_errors, pair_errors])
def test_the_share_is_found_and_lies_in_its_interval(rate, draw):
    belief, truth = draw_beliefs(SAMPLES, CLASSES)
    labels = draw(truth, CLASSES, rate)
    share = estimate(labels, belief)
    assert share.estimate == pytest.approx((labels != truth).mean(), abs=0.025)
    assert share.low <= (labels != truth).mean() <= share.high


@pytest.mark.parametrize("power", [0.1, 0.2, 0.75, 1.5])
def test_a_network_that_is_too_sure_or_not_sure_enough_does_not_mislead(power):
    belief, truth = draw_beliefs(SAMPLES, CLASSES)
    labels = uniform_errors(truth, CLASSES, 0.2)
    share = estimate(labels, sharpened(belief, power))
    assert share.estimate == pytest.approx((labels != truth).mean(), abs=0.03)
    assert (share.sharpness < 1) == (power > 1)


def test_few_of_many_samples_leave_more_in_doubt_than_all_of_them():
    belief, truth = draw_beliefs(300, CLASSES)
    labels = uniform_errors(truth, CLASSES, 0.2)
    all_seen = estimate_error_share(belief, labels, population=300)
    few_seen = estimate_error_share(belief, labels, population=30_000)
    assert few_seen.estimate == all_seen.estimate
    assert few_seen.high - few_seen.low > all_seen.high - all_seen.low + 0.05


def test_many_classes_with_few_samples_each():
    belief, truth = draw_beliefs(600, 100)
    labels = uniform_errors(truth, 100, 0.2)
    share = estimate(labels, belief)
    assert share.estimate == pytest.approx(0.2, abs=0.06)


def test_a_network_that_has_begun_to_learn_many_classes_does_not_call_all_labels_right():
    """It is hardly surer of one class than of another, as after a few epochs."""
    belief, truth = draw_beliefs(600, 100)
    labels = uniform_errors(truth, 100, 0.2)
    share = estimate(labels, sharpened(belief, 0.15))
    assert share.estimate == pytest.approx(0.2, abs=0.06)
    assert share.low <= (labels != truth).mean() <= share.high


def test_a_network_that_knows_next_to_nothing_leaves_everything_open():
    """Two of 100 images are predicted, chance is one: errors and ignorance look alike."""
    rng = np.random.default_rng(0)
    belief = rng.dirichlet(np.full(100, 50.0), 400)
    labels = rng.integers(0, 100, 400)
    share = estimate(labels, belief)
    assert share.confidence < 0.1
    assert share.low == 0
    assert share.high >= (belief.argmax(axis=1) != labels).mean()


def test_confidence_is_that_of_the_leading_class():
    labels = np.arange(40) % 2
    sure = np.where(np.eye(2)[labels] > 0, 0.999, 0.001)
    assert estimate(labels, sure).confidence > 0.95


def test_more_samples_do_not_make_the_models_true():
    """People err where pictures are ambiguous: both models miss that, whatever the number."""
    belief, truth = draw_beliefs(20_000, CLASSES)
    ambiguous = belief.max(axis=1) < 0.8
    labels = np.where(ambiguous, uniform_errors(truth, CLASSES, 0.5), truth)
    share = estimate(labels, belief)
    assert share.low < share.estimate - 0.005
    assert share.high > share.estimate + 0.005


@pytest.mark.parametrize("shift", [0, 1])
def test_all_labels_right_or_all_wrong_stay_inside_of_zero_and_one(shift):
    belief = np.tile(np.array([[0.98, 0.01, 0.01]]), (400, 1))
    share = estimate(np.full(400, shift), belief)
    assert 0 < share.estimate < 1


def test_one_sample():
    share = estimate_error_share(np.array([[0.9, 0.1]]), np.array([0]), population=1)
    assert 0 <= share.low <= share.estimate <= share.high <= 1


def test_the_order_of_the_samples_does_not_matter():
    belief, truth = draw_beliefs(200, 3)
    labels = uniform_errors(truth, 3, 0.2)
    order = np.random.default_rng(1).permutation(200)
    one, other = estimate(labels, belief), estimate(labels[order], belief[order])
    assert one.estimate == pytest.approx(other.estimate, abs=1e-6)


def test_sharpening_keeps_the_order_and_sums_to_one():
    sharp = sharpened(np.array([[0.6, 0.3, 0.1]]), 2.0)
    np.testing.assert_allclose(sharp, [[0.36 / 0.46, 0.09 / 0.46, 0.01 / 0.46]])
