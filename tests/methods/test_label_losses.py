from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from elrcli.methods.label_losses import (
    OverParameterisation,
    cross_entropy,
    generalised_cross_entropy,
    symmetric_cross_entropy,
)

LOGITS = torch.tensor([[0.6, 0.4], [0.1, 0.9]]).log()  # their softmax is what the log is of
LABELS, INDEX = torch.tensor([0, 0]), torch.tensor([2, 0])


def symmetric(logits: Tensor, labels: Tensor, index: Tensor) -> Tensor:
    return symmetric_cross_entropy(logits, labels, index, alpha=0.1, beta=1.0)


def sop(lr_u: float = 1.0, lr_v: float = 1.0, start: float = 1e-8) -> OverParameterisation:
    generator = torch.Generator().manual_seed(0)
    return OverParameterisation(3, 2, lr_u=lr_u, lr_v=lr_v, start=start, generator=generator)


# --- by hand: probabilities 0.6 and 0.1 of the given label ---


def test_cross_entropy():
    losses = cross_entropy(LOGITS, LABELS, INDEX)
    assert losses.tolist() == pytest.approx([-math.log(0.6), -math.log(0.1)])


def test_generalised_cross_entropy():
    """0.6 ** 0.7 = 0.69937 and 0.1 ** 0.7 = 0.19953."""
    losses = generalised_cross_entropy(LOGITS, LABELS, INDEX)
    assert losses.tolist() == pytest.approx([0.30063 / 0.7, 0.80047 / 0.7], rel=1e-4)


def test_symmetric_cross_entropy():
    """0.1 * 0.51083 + 4 * 0.4 and 0.1 * 2.30259 + 4 * 0.9."""
    losses = symmetric(LOGITS, LABELS, INDEX)
    assert losses.tolist() == pytest.approx([1.651083, 3.830259], rel=1e-5)


def test_an_unlikely_label_pulls_less_than_in_cross_entropy():
    """The gradient at the logit of the given label: (p - 1) in cross-entropy, times p ** q."""
    logits = LOGITS.clone().requires_grad_()
    generalised_cross_entropy(logits, LABELS, INDEX).sum().backward()
    pulls = [-0.4 * 0.6**0.7, -0.9 * 0.1**0.7]
    assert logits.grad[:, 0].tolist() == pytest.approx(pulls)


@pytest.mark.parametrize("loss", [generalised_cross_entropy, symmetric, sop()])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_logits_give_finite_losses_and_gradients(loss, dtype):
    logits = torch.tensor([[6e4, 0.0], [0.0, 6e4]], dtype=dtype, requires_grad=True)
    losses = loss(logits, LABELS, INDEX)
    assert losses.dtype == torch.float32
    losses.sum().backward()
    assert losses.isfinite().all()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("loss", [cross_entropy, generalised_cross_entropy, symmetric, sop()])
def test_autocast_does_not_lower_the_precision(loss):
    expected = loss(LOGITS, LABELS, INDEX)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(loss(LOGITS, LABELS, INDEX), expected, rtol=1e-6, atol=0)


# --- over-parameterisation ---


def test_sop_starts_as_cross_entropy():
    torch.testing.assert_close(sop()(LOGITS, LABELS, INDEX), cross_entropy(LOGITS, LABELS, INDEX))


def test_sop_corrects_the_prediction():
    """u^2 = 0.25 for the given label, v^2 = 0.16 against the other: (0.85, 0.24) of 1.09."""
    loss = sop()
    loss.u[2], loss.v[2] = 0.5, torch.tensor([0.3, 0.4])
    losses = loss(LOGITS[:1], LABELS[:1], INDEX[:1])
    assert losses.tolist() == pytest.approx([-math.log(0.85 / 1.09)])


def test_sop_moves_u_by_the_cross_entropy_and_v_by_the_squared_error():
    """Two samples, means over both; the first is predicted as labelled, the second otherwise.

    First: d(-log 0.85 / 1.09)/du = 2u (1 / 1.09 - 1 / 0.85); the residual of class 1 is -0.16.
    Second: (0.1 + 0.04, 0.9 - 0.09) of 0.95; the residual of class 1 is 1 - 0.09.
    """
    loss = sop(lr_u=0.2, lr_v=0.1)
    loss.u[2], loss.v[2] = 0.5, torch.tensor([0.3, 0.4])
    loss.u[0], loss.v[0] = 0.2, torch.tensor([0.3, -0.3])
    untouched = loss.u[1].item(), loss.v[1].tolist()
    loss(LOGITS, LABELS, INDEX)
    first = 0.5 - 0.2 / 2 * 2 * 0.5 * (1 / 1.09 - 1 / 0.85)
    second = 0.2 - 0.2 / 2 * 2 * 0.2 * (1 / 0.95 - 1 / 0.14)
    assert loss.u[[2, 0]].tolist() == pytest.approx([first, second])
    first = 0.4 - 0.1 / 2 * 2 * -0.16 * -2 * 0.4
    second = -0.3 - 0.1 / 2 * 2 * (1 - 0.09) * -2 * -0.3
    assert loss.v[[2, 0], 1].tolist() == pytest.approx([first, second])
    assert loss.v[[2, 0], 0].tolist() == pytest.approx([0.3, 0.3])  # of the given label
    assert (loss.u[1].item(), loss.v[1].tolist()) == untouched


def test_sop_takes_no_larger_step_than_to_one():
    loss = sop(lr_u=1e9, lr_v=1e9)
    loss.u[:], loss.v[:] = 0.5, 0.5
    loss(LOGITS, LABELS, INDEX)
    assert loss.u.abs().max() == loss.v.abs().max() == 1


def test_in_sop_the_network_learns_from_the_corrected_loss_alone():
    """The gradient for p of q_y = (p_y + 0.25) / (1 + 0.25): softmax times -1 / (p_y + 0.25)."""
    loss = sop()
    loss.u[:], loss.v[:] = 0.5, 0.0
    logits = LOGITS.clone().requires_grad_()
    loss(logits, LABELS, INDEX).sum().backward()
    expected = [-0.6 * 0.4 / 0.85, -0.1 * 0.9 / 0.35]
    assert logits.grad[:, 0].tolist() == pytest.approx(expected)
    assert loss.u.grad is loss.v.grad is None
    assert list(loss.parameters()) == []  # nothing for a weight-decayed optimiser
    assert set(loss.state_dict()) == {"u", "v"}


def test_sop_takes_up_the_blame_for_a_label_that_the_network_contradicts():
    """A frozen prediction: the wrong label's loss falls as u and v grow, the right one's stays."""
    loss = sop(lr_u=10, lr_v=10)
    before = loss(LOGITS, LABELS, INDEX)
    for _ in range(300):
        after = loss(LOGITS, LABELS, INDEX)
    assert after[1] < 0.2 < before[1] == pytest.approx(2.302585)
    assert loss.u[0].abs() > 0.9
    assert loss.v[0, 1].abs() > 0.9


def test_a_larger_start_of_sop_takes_fewer_visits():
    late, early = sop(lr_u=10, lr_v=10), sop(lr_u=10, lr_v=10, start=0.01)
    torch.testing.assert_close(early.u, 1e6 * late.u)
    torch.testing.assert_close(early.v, 1e6 * late.v)
    for _ in range(2):
        slow, fast = (loss(LOGITS, LABELS, INDEX)[1] for loss in (late, early))
    assert fast < 1 < slow == pytest.approx(2.302585)
    assert sop(start=1.0).u.abs().max() <= 1
