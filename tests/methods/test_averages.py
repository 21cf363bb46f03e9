from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from elrcli.methods.averages import WeightAverage, ramp


def test_a_ramp_rises_to_one_and_stays():
    """exp(-5 (1 - s/S)^2): exp(-5), exp(-5/4) half way, 1."""
    found = [ramp(step, 10) for step in (0, 5, 10, 11)]
    assert found == pytest.approx([math.exp(-5), math.exp(-1.25), 1.0, 1.0])


@pytest.mark.parametrize("step", [0, 1, 10**9])
def test_without_steps_there_is_no_ramp(step):
    assert ramp(step, 0) == 1.0


def test_the_average_starts_as_the_network_and_its_decay_rises():
    """Decay 0, 1/2, 2/3: the plain mean of the visited weights, until `decay` holds it."""
    model = nn.Linear(1, 1, bias=False)
    average = WeightAverage(model, decay=0.6)
    for value in (3.0, 6.0, 12.0):
        nn.init.constant_(model.weight, value)
        average.update(model)
    # 3; (3 + 6) / 2 = 4.5; 0.6 * 4.5 + 0.4 * 12 = 7.5
    assert average.network.weight.item() == pytest.approx(7.5)
    assert average.steps_done == 3


def test_the_decay_may_ramp_up_over_steps():
    """Decay 0.8 * exp(-5/4), then 0.8: a ramp of two steps that counts from one."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = WeightAverage(model, decay=0.8, ramp_steps=2)
    nn.init.ones_(model.weight)
    average.update(model)
    first = 1 - 0.8 * math.exp(-1.25)
    assert average.network.weight.item() == pytest.approx(first)
    average.update(model)
    assert average.network.weight.item() == pytest.approx(0.8 * first + 0.2)


def test_batch_norm_statistics_are_averaged_and_counters_copied():
    model = nn.BatchNorm1d(1)
    average = WeightAverage(model, decay=0.9)
    for value in (2.0, 4.0):
        model.running_mean.fill_(value)
        model.num_batches_tracked += 1
        average.update(model)
    assert average.network.running_mean.item() == pytest.approx(3.0)
    assert average.network.num_batches_tracked == 2


def test_the_average_never_learns_and_stays_in_eval_mode():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = WeightAverage(model, 0.9)
    nn.Sequential(model, average).train()
    assert not any(module.training for module in average.modules())
    assert not any(parameter.requires_grad for parameter in average.parameters())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_state_holds_the_count():
    model = nn.Linear(1, 1)
    average, other = WeightAverage(model, 0.9), WeightAverage(model, 0.9)
    for _ in range(3):
        average.update(model)
    other.load_state_dict(average.state_dict())
    assert other.steps_done == 3
    assert torch.equal(other.network.weight, average.network.weight)
