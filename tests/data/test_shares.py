from __future__ import annotations

import numpy as np
import pytest
import torch

from elrcli.data.shares import Share, deal_rows
from elrcli.methods.halves import draw_halves

LABELS = np.random.default_rng(0).integers(0, 5, 101).astype(np.int32)
SPLITS = np.random.default_rng(1).integers(0, 3, 101).astype(np.int8)


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_every_class_and_every_split_is_dealt_out_evenly(processes):
    owner = deal_rows(LABELS, SPLITS, processes, seed=0)
    for split in range(3):
        counts = np.bincount(owner[split == SPLITS], minlength=processes)
        assert np.ptp(counts) <= 1
        assert counts[0] == counts.max()
        for label in range(5):
            part = owner[(split == SPLITS) & (label == LABELS)]
            assert np.ptp(np.bincount(part, minlength=processes)) <= 1


def test_the_deal_depends_on_the_seed_alone():
    first, again, other = (deal_rows(LABELS, SPLITS, 2, seed) for seed in (3, 3, 4))
    assert (first == again).all()
    assert (first != other).any()


def test_neighbours_in_the_manifest_are_not_dealt_out_in_turn():
    """Files often alternate, such as left and right pictures of the same thing."""
    owner = deal_rows(np.zeros(1000, np.int32), np.zeros(1000, np.int8), 2, seed=0)
    assert 400 < (owner == np.arange(1000) % 2).sum() < 600


def test_a_process_has_rows_of_both_halves():
    labels = np.zeros(1000, np.int32)
    owner = deal_rows(labels, np.zeros(1000, np.int8), 2, seed=0)
    assert 400 < (owner == draw_halves(labels, seed=0)).sum() < 600


def test_places_in_a_share():
    share = Share(np.array([1, 4, 6, 9]), processes=3)
    assert share.places(torch.tensor([9, 1, 4])).tolist() == [3, 0, 1]
    assert share.places(torch.tensor([], dtype=torch.int64)).tolist() == []
