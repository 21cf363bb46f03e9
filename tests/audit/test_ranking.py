from __future__ import annotations

import numpy as np
import pytest

from elrcli.audit import evidence as evidence_module
from elrcli.audit.evidence import Evidence
from elrcli.audit.neighbours import FeatureSpace
from elrcli.audit.ranking import nearest_exemplars, rank_labels, sure_samples
from tests.audit.labels import draw_beliefs, uniform_errors

CLASSES = 4


@pytest.fixture
def evidence() -> Evidence:
    """200 samples on every other manifest row."""
    belief, truth = draw_beliefs(200, CLASSES)
    labels = uniform_errors(truth, CLASSES, 0.2).astype(np.int32)
    table = np.zeros((400, CLASSES), dtype=np.float32)
    table[::2] = belief
    return Evidence(np.arange(0, 400, 2), labels, np.ones(200, dtype=bool), table)


def test_most_suspicious_first(evidence):
    result = rank_labels(evidence, 0.5).result
    assert sorted(result.rows.tolist()) == evidence.rows.tolist()
    assert (np.diff(result.score) <= 0).all()
    assert (result.labels == evidence.labels[result.rows // 2]).all()


def test_flagged_labels_have_another_suggestion(evidence):
    result = rank_labels(evidence, 0.3).result
    assert result.flagged.sum() == (result.error_probability >= 0.3).sum() > 0
    assert (result.suggested != result.labels)[result.flagged].all()


def test_the_top_classes_are_the_most_probable(evidence):
    result = rank_labels(evidence, 0.5).result
    assert result.top_classes.shape == (200, CLASSES)
    assert (np.diff(result.top_probabilities, axis=1) <= 0).all()
    np.testing.assert_allclose(result.top_probabilities.sum(axis=1), 1, atol=1e-5)
    given = result.top_classes == result.labels[:, None]
    np.testing.assert_allclose(
        result.top_probabilities[given], 1 - result.error_probability, atol=1e-5
    )


def test_joint_counts_add_up_to_the_labels(evidence):
    ranking = rank_labels(evidence, 0.5)
    counts = np.bincount(evidence.labels, minlength=CLASSES)
    np.testing.assert_allclose(ranking.joint.sum(axis=0), counts, rtol=1e-4)
    errors = ranking.joint.sum() - np.trace(ranking.joint)
    assert errors == pytest.approx(ranking.result.error_probability.sum(), rel=1e-4)


def test_parts_give_the_same_ranking_as_the_whole(evidence, monkeypatch):
    whole = rank_labels(evidence, 0.5)
    monkeypatch.setattr(evidence_module, "CHUNK", 7 * CLASSES)
    parts = rank_labels(evidence, 0.5)
    assert np.array_equal(whole.result.rows, parts.result.rows)
    assert np.array_equal(whole.result.suggested, parts.result.suggested)
    np.testing.assert_allclose(whole.joint, parts.joint, rtol=1e-6)


def test_sure_samples_are_the_least_doubtful_of_their_class():
    labels = np.array([0, 1, 0, 0, 1])
    error = np.array([0.9, 0.6, 0.3, 0.01, 0.02])
    sure = sure_samples(labels, error)
    assert {label: places.tolist() for label, places in sure.items()} == {0: [3, 2], 1: [4]}


def test_exemplars_are_sure_of_their_class_and_nearest_first(evidence):
    result = rank_labels(evidence, 0.5).result
    rng = np.random.default_rng(0)
    space = FeatureSpace.of(rng.normal(size=(200, 8)))
    nearest = nearest_exemplars(result, evidence.rows, space, suspects=5)
    assert list(nearest) == result.rows[:5].tolist()
    for place, row in enumerate(result.rows[:5].tolist()):
        wanted = {int(result.labels[place]), int(result.suggested[place])}
        assert set(nearest[row]) == wanted
        for label, rows in nearest[row].items():
            assert len(rows) > 0
            assert row not in rows
            assert (evidence.labels[rows // 2] == label).all()
            vectors = space.vectors.numpy()
            cosines = vectors[rows // 2] @ vectors[row // 2]
            assert (np.diff(cosines) <= 1e-6).all()
