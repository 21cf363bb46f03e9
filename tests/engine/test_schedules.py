from __future__ import annotations

import math

import pytest
import torch

from elrcli.engine.schedules import Schedule, set_learning_rate


def schedule(kind: str, **changes: object) -> Schedule:
    settings = {
        "epochs": 10,
        "warmup": 0.0,
        "min_factor": 0.0,
        "milestones": (),
        "step_factor": 0.1,
        "restart_epochs": 10.0,
    }
    return Schedule(kind=kind, **{**settings, **changes})


def test_cosine_by_hand():
    factor = schedule("cosine").factor
    assert factor(0) == 1.0
    assert factor(2.5) == pytest.approx((1 + math.sqrt(0.5)) / 2)  # cos 45 degrees
    assert factor(5) == pytest.approx(0.5)
    assert factor(10) == pytest.approx(0.0)


def test_cosine_ends_at_the_lowest_factor():
    factor = schedule("cosine", min_factor=0.2).factor
    assert factor(5) == pytest.approx(0.6)  # half way from 1 to 0.2
    assert factor(10) == pytest.approx(0.2)


def test_warm_up_is_linear_from_the_lowest_factor_and_cosine_fills_the_rest():
    factor = schedule("cosine", warmup=2.0, min_factor=0.1).factor
    assert factor(0) == pytest.approx(0.1)
    assert factor(1) == pytest.approx(0.55)
    assert factor(2) == 1.0
    assert factor(6) == pytest.approx(0.55)  # half of the 8 epochs that are left


@pytest.mark.parametrize("kind", ["cosine", "step", "restarts", "constant"])
def test_short_runs_warm_up_for_a_quarter_at_most(kind):
    factor = schedule(kind, epochs=2, warmup=5.0).factor
    assert factor(0.25) == pytest.approx(0.5)
    assert factor(0.5) == pytest.approx(1.0)


def test_constant():
    factor = schedule("constant", warmup=1.0).factor
    assert [factor(time) for time in (0.5, 1.0, 7.3, 10.0)] == [0.5, 1.0, 1.0, 1.0]


def test_step_falls_after_each_milestone():
    factor = schedule("step", epochs=120, milestones=(40.0, 80.0), step_factor=0.01).factor
    assert [factor(time) for time in (1, 40, 40.1, 80)] == [1.0, 1.0, 0.01, 0.01]
    assert factor(80.1) == pytest.approx(1e-4)


def test_milestones_below_one_are_shares_of_the_run():
    factor = schedule("step", milestones=(0.7, 2.0)).factor
    assert [factor(time) for time in (2, 2.5, 7, 7.5)] == pytest.approx([1.0, 0.1, 0.1, 0.01])


def test_restarts_repeat_the_cosine_and_end_low():
    factor = schedule("restarts", epochs=20, restart_epochs=10.0, min_factor=0.05).factor
    for start in (0, 10):
        assert factor(start + 0.001) == pytest.approx(1.0)
        assert factor(start + 5) == pytest.approx(0.525)
        assert factor(start + 10) == pytest.approx(0.05)


def test_restarts_count_from_the_end_of_the_warm_up():
    factor = schedule("restarts", epochs=21, warmup=1.0, restart_epochs=10.0).factor
    assert factor(1) == 1.0
    assert factor(6) == pytest.approx(0.5)
    assert factor(11) == pytest.approx(0.0)


@pytest.mark.parametrize("kind", ["cosine", "step", "restarts", "constant"])
def test_every_factor_is_a_share(kind):
    factor = schedule(kind, epochs=7, warmup=1.3, milestones=(0.3,), restart_epochs=2.3).factor
    assert all(0 <= factor(step / 97) <= 1 for step in range(7 * 97 + 1))


def test_groups_get_their_share_of_the_rate():
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[:1], "lr_scale": 0.1}, {"params": weights[1:]}])
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.5]
