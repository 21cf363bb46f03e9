"""The numbers in `elr_loss_trace.json` come from the official loss, run in float64: three
consecutive steps of two settings, with losses, logit gradients and target rows after each."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from elrcli.methods.elr import ELRLoss, clamped_softmax, elr_term

TRACES: dict[str, Any] = json.loads(Path(__file__).with_name("elr_loss_trace.json").read_text())


def official(name: str, dtype: torch.dtype) -> tuple[ELRLoss, list[dict[str, Any]]]:
    trace = TRACES[name]
    loss_fn = ELRLoss(
        trace["num_samples"], trace["num_classes"], lam=trace["lam"], beta=trace["beta"]
    )
    return loss_fn.to(dtype), trace["steps"]


@pytest.mark.parametrize("name", TRACES)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 0.0), (torch.float32, 2e-3)])
def test_equals_the_official_loss(name, dtype, rtol):
    loss_fn, steps = official(name, dtype)
    for step in steps:
        logits = torch.tensor(step["logits"], dtype=dtype, requires_grad=True)
        index = torch.tensor(step["index"])
        loss = loss_fn(logits, torch.tensor(step["labels"]), index)
        loss.backward()
        expected = [torch.tensor(step[k], dtype=dtype) for k in ("loss", "grad", "target_rows")]
        for found, wanted in zip(
            (loss.detach(), logits.grad, loss_fn.targets[index]), expected, strict=True
        ):
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=rtol)


@pytest.mark.parametrize("wrong", [{"lam": -1.0}, {"beta": 1.0}, {"beta": -0.1}, {"lam": math.nan}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="expected lam >= 0 and 0 <= beta < 1"):
        ELRLoss(num_samples=3, num_classes=2, **wrong)


def test_logits_of_other_classes_are_refused():
    loss_fn = ELRLoss(num_samples=3, num_classes=3)
    with pytest.raises(ValueError, match=r"logits \(2, 1\): expected \[B, 3\]"):
        loss_fn(torch.zeros(2, 1), torch.tensor([0, 0]), torch.tensor([0, 1]))
    assert not loss_fn.targets.any()


def test_first_visit_fills_only_the_visited_row():
    loss_fn = ELRLoss(num_samples=3, num_classes=2, beta=0.7)
    loss_fn(torch.tensor([[0.0, 0.0]]), torch.tensor([1]), index=torch.tensor([2]))
    expected = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.15, 0.15]])  # (1 - beta) * uniform
    torch.testing.assert_close(loss_fn.targets, expected)


def test_a_loss_by_hand():
    """Uniform prediction of 2 classes, first visit: t = (.15, .15), <p, t> = .15."""
    loss_fn = ELRLoss(1, 2, lam=3.0, beta=0.7)
    loss = loss_fn(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([0]))
    assert loss.item() == pytest.approx(math.log(2) + 3 * math.log(0.85))


def test_rows_sum_to_one_minus_beta_to_the_visits():
    loss_fn = ELRLoss(2, 3, beta=0.7).double()
    for visit in range(1, 6):
        logits = torch.randn(1, 3, generator=torch.Generator().manual_seed(visit)).double()
        loss_fn(logits, torch.tensor([0]), torch.tensor([1]))
        assert loss_fn.targets[1].sum().item() == pytest.approx(1 - 0.7**visit)
    assert not loss_fn.targets[0].any()


def test_the_gradient_is_the_formula_of_the_paper():
    """p - y + lambda * g with g_c = p_c / (1 - <p, t>) * sum_k (t_k - t_c) p_k."""
    lam = 2.5
    loss_fn = ELRLoss(1, 4, lam=lam, beta=0.6).double()
    loss_fn.targets[0] = torch.tensor([0.5, 0.1, 0.2, 0.1])
    logits = torch.tensor([[0.3, -0.2, 0.5, 0.1]], dtype=torch.float64, requires_grad=True)
    loss_fn(logits, torch.tensor([1]), torch.tensor([0])).backward()
    p, t = logits.detach()[0].softmax(0), loss_fn.targets[0]
    y = torch.tensor([0.0, 1.0, 0.0, 0.0])
    g = torch.stack([p[c] / (1 - p @ t) * ((t - t[c]) @ p) for c in range(4)])
    torch.testing.assert_close(logits.grad[0], p - y + lam * g)


def test_no_gradient_flows_through_the_target():
    probs = torch.tensor([[0.2, 0.8]], requires_grad=True)
    targets = ELRLoss(1, 2).update_targets(probs, torch.tensor([0]))
    assert not targets.requires_grad


def test_probabilities_are_clamped():
    probs = clamped_softmax(torch.tensor([[1000.0, 0.0, -1000.0]]))
    torch.testing.assert_close(probs, torch.tensor([[1 - 1e-4, 1e-4, 1e-4]]), rtol=0, atol=1e-9)


def test_the_term_is_bounded_by_the_clamp():
    """Ten classes, target and prediction at the bound: log(1 - <p, t>) is about -6.9."""
    loss_fn = ELRLoss(1, 10, lam=1.0, beta=0.0)
    logits = torch.zeros(1, 10)
    logits[0, 3] = 1e4
    probs = clamped_softmax(logits)
    term = elr_term(probs, loss_fn.update_targets(probs, torch.tensor([0])))
    assert term.item() == pytest.approx(-6.9, abs=0.1)


def test_a_negative_loss_is_normal():
    loss_fn = ELRLoss(1, 2)
    logits = torch.tensor([[9.0, 0.0]])
    losses = [loss_fn(logits, torch.tensor([0]), torch.tensor([0])).item() for _ in range(8)]
    assert losses[-1] < 0
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 100.0, 6e4])
def test_extreme_logits_give_a_finite_loss(dtype, scale):
    loss_fn = ELRLoss(2, 3)
    logits = torch.tensor([[1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) * scale
    logits = logits.to(dtype).requires_grad_()
    for _ in range(20):
        loss = loss_fn(logits, torch.tensor([2, 1]), torch.tensor([0, 1]))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    assert loss_fn.targets.dtype == torch.float32


def test_autocast_does_not_lower_the_precision():
    logits, labels, index = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.arange(4)
    expected = ELRLoss(4, 3)(logits, labels, index)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ELRLoss(4, 3)(logits, labels, index)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_lambda_zero_is_exactly_cross_entropy():
    logits, labels = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 0])
    loss = ELRLoss(4, 3, lam=0.0)(logits, labels, torch.arange(4))
    reference = functional.cross_entropy(logits, labels)
    assert loss.equal(reference)
    (found,) = torch.autograd.grad(loss, logits)
    (expected,) = torch.autograd.grad(reference, logits)
    assert found.equal(expected)


def test_state_dict_holds_the_targets():
    loss_fn = ELRLoss(3, 2)
    loss_fn(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), torch.tensor([1]))
    assert set(loss_fn.state_dict()) == {"targets"}
    other = ELRLoss(3, 2)
    other.load_state_dict(loss_fn.state_dict())
    assert other.targets.equal(loss_fn.targets)
    # one row a sample: what processes share out
    assert ELRLoss.per_sample == ("targets", "targets_classes")


def test_print_shows_the_settings():
    assert repr(ELRLoss(3, 2)) == "ELRLoss(3 samples, 2 classes, lam=3.0, beta=0.7)"


def run_plain_loop(lam: float) -> float:
    """Train a linear model on two separable classes with 30% flips; accuracy on the truth.

    With 50 inputs for 100 samples it can learn every wrong label by heart.
    """
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(100) % 2
    inputs = torch.randn(100, 50, generator=generator)
    inputs[:, 0] += 8.0 * truth - 4.0
    labels = torch.where(torch.arange(100) % 10 < 3, 1 - truth, truth)
    model = nn.Linear(50, 2)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loss_fn = ELRLoss(100, 2, lam=lam)
    for _ in range(60):
        for index in torch.randperm(100, generator=generator).split(20):
            optimizer.zero_grad()
            loss_fn(model(inputs[index]), labels[index], index).backward()
            optimizer.step()
    predicted: Tensor = model(inputs).argmax(dim=1)
    return (predicted == truth).float().mean().item()


def test_in_a_plain_loop_the_term_keeps_wrong_labels_from_being_memorised():
    assert run_plain_loop(lam=0.0) == pytest.approx(0.7, abs=0.02)
    assert run_plain_loop(lam=3.0) > 0.95
