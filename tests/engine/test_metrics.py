from __future__ import annotations

import time

import pytest
import torch

from elrcli.engine.distributed import Group
from elrcli.engine.metrics import (
    METRIC_COLUMNS,
    EpochTotals,
    agreement_metrics,
    held_out_metrics,
    loss_metrics,
    memorisation_metrics,
)
from elrcli.errors import TrainingError
from elrcli.methods.base import StepResult

CPU = torch.device("cpu")


def step(cross_entropy: float, term: float) -> StepResult:
    parts = torch.tensor(cross_entropy), torch.tensor(term)
    return StepResult(parts[0] + parts[1], *parts, probs=torch.empty(0))


def tensor(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def test_losses_are_means_over_images_not_batches():
    totals = EpochTotals(CPU)
    totals.add(step(1.0, -0.5), images=3)
    totals.add(step(5.0, -0.5), images=1)
    assert totals.losses() == pytest.approx((1.5, 2.0, -0.5))
    assert EpochTotals(CPU).losses() == (0.0, 0.0, 0.0)


def test_the_loss_is_that_of_an_image_whatever_the_step_minimised():
    """Two networks minimise the sum of two means: 2 * (3 - 1) for the same images."""
    totals = EpochTotals(CPU)
    totals.add(step(3.0, -1.0)._replace(loss=torch.tensor(4.0)), images=2)
    assert totals.losses() == (2.0, 3.0, -1.0)


def test_sums_of_all_processes_are_exact():
    totals = EpochTotals(CPU)
    totals.add(step(1.0, 0.0), images=2**24 + 1)
    assert totals.of_all(Group()).images == 2**24 + 1


def test_waiting_is_measured_between_items():
    totals = EpochTotals(CPU)

    def slow():
        for number in range(3):
            time.sleep(0.01)
            yield number

    for _ in totals.time_waiting(slow()):
        time.sleep(0.005)
    assert totals.seconds_waiting >= 0.03
    assert totals.seconds >= totals.seconds_waiting + 0.014
    totals.add(step(1.0, 0.0), images=10)
    metrics = loss_metrics(totals)
    assert metrics["images_per_second"] == pytest.approx(10 / totals.seconds)
    assert 0 < metrics["wait_share"] < 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_the_training(value):
    totals = EpochTotals(CPU)
    totals.add(step(1.0, 0.0), images=4)
    totals.add(step(value, 0.0), images=4)
    with pytest.raises(TrainingError, match=r"^the loss became (nan|inf)$"):
        loss_metrics(totals)


def test_agreement_by_hand():
    """Five rows, one never seen, one not seen an epoch ago."""
    predicted, before = tensor(0, 1, 1, 2, -1), tensor(0, 0, -1, 2, -1)
    target = tensor(0, 1, 0, 0, 0)
    metrics = agreement_metrics(predicted, before, target, tensor(0, 1, 0, 0, 0))
    assert metrics == {
        "train_agreement": 0.5,  # rows 0 and 1 of 4
        "target_agreement": 1.0,
        "changed": pytest.approx(1 / 3),  # row 1 of 0, 1, 3
    }


def test_nothing_has_changed_in_the_first_epoch():
    unknown = tensor(-1, -1)
    metrics = agreement_metrics(tensor(0, 1), unknown, tensor(0, 1), tensor(0, 1))
    assert "changed" not in metrics


def test_memorisation_by_hand():
    """Three clean rows (2 right), four wrong: 1 right, 2 memorised, 1 otherwise; one unseen."""
    truth = tensor(0, 1, 2, 0, 0, 0, 0, 0)
    labels = tensor(0, 1, 2, 1, 1, 1, 1, 1)
    predicted = tensor(0, 1, 0, 0, 1, 1, 2, -1)
    metrics = memorisation_metrics(predicted, labels, truth)
    assert metrics == pytest.approx(
        {
            "clean_right": 2 / 3,
            "clean_other": 1 / 3,
            "wrong_right": 0.25,
            "wrong_memorised": 0.5,
            "wrong_other": 0.25,
        }
    )


def test_shares_of_nothing_are_left_out():
    assert memorisation_metrics(tensor(-1), tensor(0), tensor(0)) == {}
    assert set(memorisation_metrics(tensor(0), tensor(0), tensor(0))) == {
        "clean_right",
        "clean_other",
    }


def test_held_out_by_hand():
    """One row was never seen, one was seen in an earlier epoch only."""
    predicted = tensor(0, 1, -1, 1)
    given_prob = torch.tensor([0.5, 0.25, torch.nan, torch.nan]).half()
    labels, truth = tensor(0, 0, 0, 1), tensor(0, 1, 0, 1)
    metrics = held_out_metrics("val", predicted, given_prob, labels, truth)
    assert metrics == pytest.approx(
        {"val_agreement": 0.5, "val_loss": 1.5 * 0.693147, "val_accuracy_true": 1.0}
    )
    assert held_out_metrics("test", predicted, given_prob, labels, None) == {"test_agreement": 0.5}
    assert held_out_metrics("val", tensor(-1), given_prob[2:3], labels[:1], None) == {}


def test_every_metric_has_a_column():
    names = {"train_agreement", "changed", "wrong_memorised", "val_loss", "test_accuracy_true"}
    assert names <= set(METRIC_COLUMNS)
    assert len(set(METRIC_COLUMNS)) == len(METRIC_COLUMNS)
