from __future__ import annotations

import numpy as np
import pytest

from elrcli.audit.calibration import cautions, doubt_labels, posterior, share_of_errors
from elrcli.audit.evidence import Evidence, normalised
from tests.audit.labels import calibration_error, draw_beliefs, uniform_errors

CLASSES = 5


def make_evidence(
    rate: float, held_out: float = 0.25, pull: float = 0.0
) -> tuple[Evidence, np.ndarray]:
    """Return evidence whose trained samples have `pull` logits added to their label; errors."""
    belief, truth = draw_beliefs(4000, CLASSES)
    labels = uniform_errors(truth, CLASSES, rate)
    samples = np.arange(len(labels))
    is_held_out = samples < held_out * len(samples)
    pulled = belief.copy()
    pulled[samples, labels] *= np.where(is_held_out, 1.0, np.exp(pull))
    seen = normalised(pulled).astype(np.float32)
    return Evidence(samples, labels.astype(np.int32), is_held_out, seen), labels != truth


def doubts_of(evidence: Evidence):
    samples = np.arange(len(evidence))
    given = evidence.belief(samples)[samples, evidence.labels]
    share = share_of_errors(evidence)
    return doubt_labels(given, evidence.held_out, share.estimate, share.sharpness, CLASSES), share


@pytest.mark.parametrize("rate", [0.05, 0.3])
def test_held_out_samples_judge_where_training_has_pulled_the_others(rate):
    evidence, wrong = make_evidence(rate, pull=3.0)
    share = share_of_errors(evidence)
    assert share.low <= wrong.mean() <= share.high
    assert share.estimate == pytest.approx(wrong.mean(), abs=0.04)


def test_a_network_that_never_saw_a_sample_judges_it():
    evidence, wrong = make_evidence(0.2, held_out=0.0)
    pulled, _ = make_evidence(0.2, held_out=0.0, pull=4.0)
    judged = Evidence(
        evidence.rows, evidence.labels, evidence.held_out, pulled.seen, judged=evidence.seen
    )
    assert share_of_errors(judged).estimate == pytest.approx(wrong.mean(), abs=0.04)
    assert share_of_errors(pulled).estimate < 0.1


@pytest.mark.parametrize(
    ("held_out", "says"),
    [
        (0, "None of 300 were held out from training"),
        (1, "Only 1 image of 300 was held out from training"),
        (9, "Only 9 images of 300 were held out from training"),
        (29, "Only 29 images of 300 were held out from training"),
        (30, None),
    ],
)
def test_few_held_out_samples_are_a_reason_for_caution(held_out, says):
    samples = np.arange(300)
    labels = (samples % 2).astype(np.int32)
    evidence = Evidence(samples, labels, samples < held_out, sure_of(labels.tolist()))
    found = cautions(evidence, ("cat", "dog"), share_of_errors(evidence))
    assert len(found) == (says is not None)
    if says:
        assert found[0].startswith(says)


@pytest.mark.parametrize(("right", "says_poor"), [(20, True), (24, True), (28, False)])
def test_a_network_that_has_learned_nothing_is_no_judge(right, says_poor):
    """Of 40 held-out labels 20 are cats: chance alone reaches 50% + 16%."""
    samples = np.arange(200)
    labels = (samples % 2).astype(np.int32)
    predicted = np.where(samples < right, labels, 1 - labels)
    evidence = Evidence(samples, labels, samples < 40, sure_of(predicted.tolist()))
    found = cautions(evidence, ("cat", "dog"), share_of_errors(evidence))
    assert len(found) == says_poor
    if says_poor:
        assert f"predicts {right / 40:.0%} of the labels that were held out" in found[0]
        assert "always saying 'cat' would predict 50%" in found[0]


def test_a_network_that_is_sure_of_nothing_is_a_reason_for_caution():
    """It predicts a fifth of 50 classes, far above chance, but hardly prefers what it predicts."""
    rng = np.random.default_rng(0)
    samples, labels = np.arange(1000), rng.integers(0, 50, 1000).astype(np.int32)
    belief = rng.dirichlet(np.full(50, 200.0), 1000)
    belief[samples % 5 == 0, labels[samples % 5 == 0]] += 0.01
    evidence = Evidence(samples, labels, samples < 200, belief / belief.sum(axis=1, keepdims=True))
    share = share_of_errors(evidence)
    (found,) = cautions(evidence, tuple(map(str, range(50))), share)
    assert found.startswith("The run is hardly surer of one class than of another: it predicts 2")
    assert share.high > 0.7


@pytest.mark.parametrize(("right", "says_poor"), [(100, False), (99, False), (98, True)])
def test_a_rare_class_that_is_found_is_no_luck(right, says_poor):
    """Two of 100 held-out labels are dogs: no share of right ones is far above 98%."""
    samples = np.arange(400)
    labels = (samples % 50 == 0).astype(np.int32)
    missed = np.flatnonzero(labels[:100])[: 100 - right]
    predicted = labels.copy()
    predicted[missed] = 0
    evidence = Evidence(samples, labels, samples < 100, sure_of(predicted.tolist()))
    assert len(cautions(evidence, ("cat", "dog"), share_of_errors(evidence))) == says_poor


def test_a_class_that_was_not_trained_is_a_reason_for_caution():
    samples = np.arange(300)
    labels = (samples % 2).astype(np.int32)
    labels[:3] = 2  # of 60 that are held out
    belief = np.where(np.eye(3)[labels] > 0, 0.98, 0.01).astype(np.float32)
    evidence = Evidence(samples, labels, samples < 60, belief)
    found = cautions(evidence, ("cat", "dog", "cow"), share_of_errors(evidence))
    assert [line.startswith("No training image of 'cow'") for line in found] == [True]


def test_every_sample_judged_apart_leaves_no_doubt_of_that_kind():
    evidence, _ = make_evidence(0.2, held_out=0.0)
    judged = Evidence(
        evidence.rows, evidence.labels, evidence.held_out, evidence.seen, judged=evidence.seen
    )
    assert cautions(judged, tuple("abcde"), share_of_errors(judged)) == []


def test_a_small_draw_without_errors_does_not_prove_that_there_are_none():
    """Of 20 held-out labels none is wrong: up to 11% of all may be (Wilson's interval)."""
    samples = np.arange(200)
    labels = (samples % 2).astype(np.int32)
    evidence = Evidence(samples, labels, samples < 20, sure_of(labels.tolist()))
    share = share_of_errors(evidence)
    assert share.low == 0
    assert 0.1 < share.high < 0.15


def sure_of(classes: list[int]) -> np.ndarray:
    return np.where(np.eye(2)[classes] > 0, 0.99, 0.01).astype(np.float32)


@pytest.mark.parametrize(
    ("unlearned", "weight"),
    [(40, 0.0), (20, 0.5), (0, 0.0)],  # training resolved nothing, half, everything
)
def test_labels_that_training_could_not_teach_weigh_as_far_as_it_taught_others(unlearned, weight):
    samples = np.arange(100)
    labels = np.zeros(100, dtype=np.int32)
    seen = sure_of([1] * unlearned + [0] * (100 - unlearned))
    judged = sure_of([1] * 40 + [0] * 60)
    apart = np.zeros(100, dtype=bool)
    alone = share_of_errors(Evidence(samples, labels, ~apart, judged)).estimate
    both = share_of_errors(Evidence(samples, labels, apart, seen, judged)).estimate
    assert both == pytest.approx((1 - weight) * alone + weight * unlearned / 100, abs=1e-3)


def test_the_same_evidence_gives_the_same_share():
    evidence, _ = make_evidence(0.2)
    assert share_of_errors(evidence) == share_of_errors(evidence)


def test_probabilities_mean_what_they_say_although_training_pulled_the_beliefs():
    evidence, wrong = make_evidence(0.2, pull=2.0)
    doubts, share = doubts_of(evidence)
    assert calibration_error(doubts.error, wrong) < 0.05
    for kind in (evidence.held_out, ~evidence.held_out):
        assert doubts.error[kind].mean() == pytest.approx(share.estimate, abs=1e-3)


def test_score_and_error_probability_have_the_same_order():
    doubts, _ = doubts_of(make_evidence(0.2, pull=2.0)[0])
    order = np.argsort(doubts.score)
    assert (np.diff(doubts.error[order]) >= 0).all()


def test_a_few_held_out_samples_share_the_pull_of_the_others():
    given = np.array([0.9] * 80 + [0.1] * 20)
    held_out = np.arange(100) == 0
    doubts = doubt_labels(given, held_out, 0.2, 1.0, 4)
    assert doubts.error[0] == doubts.error[1] < 0.1  # not 0.2, the share of all


def test_the_share_is_met_where_hardly_anything_is_believed():
    """A thousand classes after a few epochs: every label is far from believed."""
    given = np.random.default_rng(0).uniform(0.0005, 0.004, 400)
    doubts = doubt_labels(given, np.arange(400) < 40, 0.2, sharpness=8.0, classes=1000)
    assert doubts.error.mean() == pytest.approx(0.2, abs=1e-6)


def test_a_label_that_is_believed_in_is_less_doubtful():
    held_out = np.zeros(3, dtype=bool)
    doubts = doubt_labels(np.array([0.9, 0.5, 0.0]), held_out, 0.2, 1.0, 2)
    assert doubts.score[0] < doubts.score[1] < doubts.score[2] <= 1


def test_the_posterior_by_hand():
    # the label is wrong with 40%, which the others share as 3 to 1
    found = posterior(np.array([[0.2, 0.6, 0.2]]), np.array([0]), np.array([0.4]))
    np.testing.assert_allclose(found, [[0.6, 0.3, 0.1]], rtol=1e-6)


def test_the_posterior_of_a_label_that_nothing_speaks_against():
    found = posterior(np.array([[1.0, 0.0, 0.0]]), np.array([0]), np.array([0.0]))
    np.testing.assert_allclose(found, [[1.0, 0.0, 0.0]])


def test_the_posterior_of_a_label_that_is_wrong_although_nothing_else_is_believed():
    found = posterior(np.array([[1.0, 0.0, 0.0]]), np.array([0]), np.array([0.5]))
    np.testing.assert_allclose(found, [[0.5, 0.25, 0.25]])
