from __future__ import annotations

import numpy as np
import pytest

from elrcli.data import noise

N = 200_000  # the standard error of a share is about 0.001


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def labels() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 10, N).astype(np.int32)


def confusion(labels: np.ndarray, given: np.ndarray, num_classes: int) -> np.ndarray:
    """Return P(given | true), [K, K]."""
    counts = np.bincount(labels * num_classes + given, minlength=num_classes**2)
    table = counts.reshape(num_classes, num_classes)
    return table / table.sum(axis=1, keepdims=True)


def test_symmetric_redraws_over_all_classes(labels, rng):
    """40% at 10 classes is 36% wrong: a tenth of the redrawn labels is the true one."""
    given = noise.symmetric(labels, 10, 0.4, rng)
    assert (given != labels).mean() == pytest.approx(0.36, abs=0.005)
    wrong = confusion(labels, given, 10)[~np.eye(10, dtype=bool)]
    np.testing.assert_allclose(wrong, 0.04, atol=0.01)


def test_asymmetric_starts_from_the_clean_labels(rng):
    labels = np.array([3, 5, 1] * 4_000)
    given = noise.asymmetric(labels, {3: 5, 5: 3}, 0.4, rng)
    assert (given[labels == 3] == 5).mean() == pytest.approx(0.4, abs=0.03)
    assert (given[labels == 5] == 3).mean() == pytest.approx(0.4, abs=0.03)
    assert (given[labels == 1] == 1).all()


def test_asymmetric_at_rate_one_swaps(rng):
    given = noise.asymmetric(np.array([0, 1, 2]), {0: 1, 1: 0}, 1.0, rng)
    assert given.tolist() == [1, 0, 2]


def test_pair_goes_to_the_next_class(rng):
    assert noise.pair(np.array([0, 1, 2]), 3, 1.0, rng).tolist() == [1, 2, 0]


def test_from_matrix_follows_the_rows(labels, rng):
    matrix = np.eye(10)
    matrix[3, 3], matrix[3, 5] = 0.75, 0.25
    given = noise.from_matrix(labels, matrix, rng)
    assert (given[labels != 3] == labels[labels != 3]).all()
    assert (given[labels == 3] == 5).mean() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(
    "matrix", [np.ones((2, 2)), np.array([[1.5, -0.5], [0.0, 1.0]]), np.ones((2, 3)) / 3]
)
def test_matrices_that_are_no_probabilities(matrix, rng):
    with pytest.raises(ValueError, match=r"square|sum to 1"):
        noise.from_matrix(np.array([0, 1]), matrix, rng)


def test_instance_dependent_flips_at_the_rate_by_the_features(rng):
    labels = np.repeat(np.arange(4), N // 4)
    features = rng.standard_normal((N, 8))
    given = noise.instance_dependent(labels, features, 4, 0.3, rng)
    wrong = given != labels
    assert wrong.mean() == pytest.approx(0.3, abs=0.005)
    # Which wrong class is a matter of the features: a linear read-out tells two targets apart.
    rows = np.flatnonzero(wrong & (labels == 0) & (given != 3))
    side = np.where(given[rows] == 1, 1.0, -1.0)
    weights, *_ = np.linalg.lstsq(features[rows], side, rcond=None)
    assert (np.sign(features[rows] @ weights) == side).mean() > 0.75


def test_instance_dependent_stays_in_bounds_at_extreme_rates(rng):
    labels = np.array([0, 1] * 500)
    features = rng.standard_normal((1000, 3)) * 1e3
    assert (noise.instance_dependent(labels, features, 2, 1.0, rng) != labels).mean() > 0.85
    assert (noise.instance_dependent(labels, features, 2, 0.0, rng) != labels).mean() < 0.15


def every_kind(labels: np.ndarray, rate: float, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    matrix = np.full((10, 10), rate / 9) + np.eye(10) * (1 - rate - rate / 9)
    return [
        noise.symmetric(labels, 10, rate, rng),
        noise.asymmetric(labels, {1: 2}, rate, rng),
        noise.pair(labels, 10, rate, rng),
        noise.from_matrix(labels, matrix, rng),
        noise.instance_dependent(labels, np.ones((len(labels), 2)), 10, rate, rng),
    ]


def test_labels_keep_their_type_and_are_never_changed_in_place(labels):
    before = labels.copy()
    for given, again in zip(every_kind(labels, 0.3, 5), every_kind(labels, 0.3, 5), strict=True):
        assert given.dtype == labels.dtype
        assert given.shape == labels.shape
        assert given.min() >= 0
        assert given.max() < 10
        np.testing.assert_array_equal(given, again)
    np.testing.assert_array_equal(labels, before)


def test_rate_zero_changes_nothing(labels):
    for given in every_kind(labels, 0.0, 0)[:4]:
        np.testing.assert_array_equal(given, labels)


def test_no_labels_at_all(rng):
    assert len(noise.symmetric(np.array([], dtype=np.int32), 3, 0.5, rng)) == 0


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_rates_out_of_range(rate, rng):
    with pytest.raises(ValueError, match=r"0\.\.1"):
        noise.symmetric(np.array([0, 1]), 2, rate, rng)
