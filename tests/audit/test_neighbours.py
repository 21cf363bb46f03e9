from __future__ import annotations

import numpy as np
import pytest

from elrcli.audit import neighbours
from elrcli.audit.neighbours import FeatureSpace, neighbourhoods


def fan(*degrees: float) -> FeatureSpace:
    """Unit vectors in the plane: the nearer the angles, the more alike."""
    radians = np.deg2rad(degrees)
    vectors = np.stack([np.cos(radians), np.sin(radians)], axis=1)
    return FeatureSpace.of_directions(vectors.astype(np.float32))


def cloud(samples: int, seed: int = 0) -> FeatureSpace:
    vectors = np.random.default_rng(seed).normal(size=(samples, 4))
    return FeatureSpace.of_directions(vectors.astype(np.float32))


def nearest(space: FeatureSpace, queries, candidates, count: int) -> list[list[int]]:
    found, _ = space.nearest(np.array(queries), np.array(candidates, dtype=np.int64), count)
    return found.tolist()


# --- the space ---


def test_features_are_seen_from_their_common_centre():
    """A common part of 10 would make all of them point the same way."""
    raw = np.array([[10, 3], [10, -3], [14, 0], [6, 0]], dtype=np.float16)
    vectors = FeatureSpace.of(raw).vectors.tolist()
    assert vectors == [[0.0, 1.0], [0.0, -1.0], [1.0, 0.0], [-1.0, 0.0]]


def test_directions_have_length_one_and_zero_stays_zero():
    space = FeatureSpace.of_directions(np.array([[3, 4], [0, 0]], dtype=np.float32))
    np.testing.assert_allclose(space.vectors.numpy(), [[0.6, 0.8], [0.0, 0.0]])


def test_equal_features_are_no_error():
    space = FeatureSpace.of(np.ones((3, 2), dtype=np.float16))
    assert not space.vectors.any()


# --- the nearest ---


def test_the_nearest_come_first_and_never_the_query_itself():
    space = fan(0, 10, 30, 90)
    found, cosines = space.nearest(np.array([0, 2]), np.arange(4), 2)
    assert found.tolist() == [[1, 2], [1, 0]]
    expected = np.cos(np.deg2rad([[10, 30], [20, 30]]))
    np.testing.assert_allclose(cosines, expected, atol=1e-6)
    assert found.dtype == np.int64
    assert cosines.dtype == np.float32


def test_a_copy_of_the_query_is_found_the_query_is_not():
    assert nearest(fan(0, 0, 180), [0, 1, 2], [0, 1, 2], 1)[:2] == [[1], [0]]


def test_even_the_opposite_is_found_before_the_query_itself():
    assert nearest(fan(0, 180), [0, 1], [0, 1], 1) == [[1], [0]]


def test_there_are_at_most_as_many_neighbours_as_other_candidates():
    assert nearest(fan(0, 10, 30), [1], [0, 1, 2], 10) == [[0, 2]]
    assert nearest(fan(0, 10, 30), [1], [0, 1, 2], 0) == [[]]


def test_only_candidates_are_found():
    space = fan(0, 1, 2, 50, 60, 3)
    assert nearest(space, [0, 3, 5], [2, 3, 4], 2) == [[2, 3], [4, 2], [2, 3]]


@pytest.mark.parametrize("candidates", [[], [1]])
def test_one_candidate_or_none_is_nobodys_neighbour(candidates):
    found, cosines = fan(0, 10, 30).nearest(
        np.arange(3), np.array(candidates, dtype=np.int64), count=5
    )
    assert found.shape == cosines.shape == (3, 0)


def test_nobody_asks():
    found, cosines = fan(0, 10, 30).nearest(np.array([], dtype=np.int64), np.arange(3), 2)
    assert found.shape == cosines.shape == (0, 2)


def test_as_by_sorting_all_cosines():
    space = cloud(30)
    vectors = space.vectors.numpy()
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -2)
    expected = np.argsort(-cosines, axis=1)[:, :5]
    assert nearest(space, range(30), range(30), 5) == expected.tolist()


@pytest.mark.parametrize("chunk", [1, 9, 18, 19])
def test_parts_give_the_same_as_all_at_once(monkeypatch, chunk):
    """9 candidates: 1 query at a time, or 2."""
    space, candidates = cloud(20), np.arange(0, 18, 2)
    found, cosines = space.nearest(np.arange(20), candidates, 3)
    monkeypatch.setattr(neighbours, "CHUNK", chunk)
    again, similar = space.nearest(np.arange(20), candidates, 3)
    assert again.tolist() == found.tolist()
    np.testing.assert_allclose(similar, cosines, atol=1e-6)


# --- neighbourhoods ---


@pytest.mark.parametrize(("samples", "classes", "count"), [(80, 1, 10), (80, 4, 5), (80, 50, 1)])
def test_a_class_has_four_candidates_per_neighbour(samples, classes, count):
    found = neighbourhoods(cloud(samples), classes)
    assert found.shape == (samples, count)
    assert not (found == np.arange(samples)[:, None]).any()


@pytest.mark.parametrize(("samples", "expected"), [(1, [[]]), (2, [[1], [0]])])
def test_neighbourhoods_of_almost_nothing(samples, expected):
    assert neighbourhoods(cloud(samples), classes=2).tolist() == expected


def test_a_sample_without_features_is_alone():
    space = cloud(80)
    space.vectors[[3, 7]] = 0.0
    found = neighbourhoods(space, classes=4)
    assert (found[[3, 7]] == [[3], [7]]).all()
    assert (found[:3] != np.arange(3)[:, None]).all()


def test_many_samples_look_among_a_random_part(monkeypatch):
    monkeypatch.setattr(neighbours, "PAIRS", 320)  # 40 samples x 8 candidates
    space = cloud(40)
    found = neighbourhoods(space, classes=1)
    assert found.shape == (40, 2)
    assert len(set(found.flatten().tolist())) <= 8
    assert not (found == np.arange(40)[:, None]).any()
    assert neighbourhoods(space, classes=1).tolist() == found.tolist()
    assert neighbourhoods(space, classes=1, seed=1).tolist() != found.tolist()


def test_two_candidates_are_left_at_least(monkeypatch):
    monkeypatch.setattr(neighbours, "PAIRS", 1)
    found = neighbourhoods(cloud(5), classes=3)
    assert found.shape == (5, 1)
    assert len(set(found.flatten().tolist())) == 2
