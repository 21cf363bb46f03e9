from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from elrcli.config import TrainConfig
from elrcli.methods.averages import WeightAverage
from elrcli.methods.base import StepResult
from elrcli.methods.build import build_method
from elrcli.methods.elr import clamped_softmax
from elrcli.methods.mixup import Mixup
from elrcli.methods.plus import ELRPlus
from tests.methods.pair import CLASSES, Pair, network

LABELS, INDEX = torch.tensor([0, 1, 2, 1]), torch.tensor([5, 0, 3, 2])
EVERYONE = torch.arange(6)


def method(**settings: object) -> ELRPlus:
    pair = Pair()
    defaults = {"ema_decay": 0.997} if settings.get("ema", True) else {}
    defaults |= {"mixup_alpha": 1.0} if settings.get("mixup", True) else {}
    config = TrainConfig(data="d", method="elr-plus", **(defaults | settings))
    return build_method(
        config, pair, list(pair.networks), np.zeros(6, dtype=np.int32), np.arange(6), CLASSES
    )


def step(of: ELRPlus, images: Tensor) -> StepResult:
    return of.training_step(images, LABELS, INDEX, torch.Generator().manual_seed(9))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def test_two_steps_by_the_formulas(images):
    """The whole method, written out, with plain SGD of rate 0.1."""
    lam, beta, gamma, rate, steps = 3.0, 0.7, 0.997, 0.1, 2
    one = method(lam=lam, beta=beta, ema_decay=gamma)
    one.train()
    optimizer = torch.optim.SGD(one.prediction_network().parameters(), lr=rate)

    weights = [network(0), network(1)]
    averages = [copy.deepcopy(weight).eval() for weight in weights]
    tables = [torch.zeros(6, CLASSES), torch.zeros(6, CLASSES)]
    one_hot = functional.one_hot(LABELS, CLASSES).float()
    for number in range(steps):
        result = step(one, images)
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        one.after_step()

        generator = torch.Generator().manual_seed(9)
        total = torch.tensor(0.0)
        judged = [average(images).detach() for average in averages]
        for k, other in ((0, 1), (1, 0)):
            drawn = Mixup.draw(4, 1.0, generator, torch.device("cpu"))
            share, partner = drawn.share, drawn.partner
            logits = weights[k](share * images + (1 - share) * images[partner])
            moved = beta * tables[k][INDEX] + (1 - beta) * judged[other].softmax(dim=1)
            tables[k][INDEX] = moved
            q = share * moved + (1 - share) * moved[partner]
            soft = share * one_hot + (1 - share) * one_hot[partner]
            entropy = -(soft * logits.log_softmax(dim=1)).sum(dim=1).mean()
            inner = (clamped_softmax(logits) * q).sum(dim=1)
            loss = entropy + lam * torch.log(1 - inner).mean()
            gradients = torch.autograd.grad(loss, list(weights[k].parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(weights[k].parameters(), gradients, strict=True):
                    parameter -= rate * gradient
            total = total + loss.detach()
        torch.testing.assert_close(result.loss.detach(), total)
        torch.testing.assert_close(2 * (result.cross_entropy + result.elr_term), total)
        torch.testing.assert_close(result.probs, ((judged[0] + judged[1]) / 2).softmax(dim=1))
        momentum = min(1 - 1 / (number + 1), gamma)
        for average, weight in zip(averages, weights, strict=True):
            for name, tensor in average.state_dict().items():
                now = weight.state_dict()[name]
                mixed = momentum * tensor + (1 - momentum) * now
                tensor.copy_(mixed if tensor.is_floating_point() else now)

    torch.testing.assert_close(one.first.loss.targets, tables[0])
    torch.testing.assert_close(one.second.loss.targets, tables[1])
    assert not one.first.loss.targets.allclose(one.second.loss.targets)
    torch.testing.assert_close(one.target_rows(EVERYONE), (tables[0] + tables[1]) / 2)
    for student, weight, average in zip((one.first, one.second), weights, averages, strict=True):
        for name, tensor in weight.state_dict().items():
            torch.testing.assert_close(student.network.state_dict()[name], tensor)
        for name, tensor in average.state_dict().items():
            torch.testing.assert_close(student.average.network.state_dict()[name], tensor)


def test_both_networks_predict_as_one_without_their_averages(images):
    one = method()
    with torch.no_grad():
        one.first.network[3].bias += 1.0  # the average stays behind
    expected = (one.first.network.eval()(images) + network(1).eval()(images)) / 2
    torch.testing.assert_close(one.predict(images), expected.detach())


def test_held_out_predictions_move_both_tables():
    one = method()
    probs = torch.tensor([[0.5, 0.25, 0.25]])
    one.observe(probs, torch.tensor([4]))
    for table in (one.first.loss.targets, one.second.loss.targets, one.target_rows(EVERYONE)):
        torch.testing.assert_close(table[4:5], 0.3 * probs)


def test_a_step_is_counted_by_both():
    one = method(lam_ramp=5)
    one.after_step()
    assert one.first.steps_done == one.second.steps_done == 1
    assert one.first.average.steps_done == one.second.average.steps_done == 1


def test_the_state_holds_every_weight_once():
    one = method()
    names = {f"network.{name}" for name in network(0).state_dict()}
    average = WeightAverage(network(0), 0.9).state_dict()
    names |= {f"average.{name}" for name in average} | {"loss.targets", "_extra_state"}
    assert set(one.state_dict()) == {f"{k}.{name}" for k in ("first", "second") for name in names}


def test_a_loaded_state_is_the_same_method(images):
    one, other = method(lam_ramp=5), method(lam_ramp=5)
    with torch.no_grad():
        one.first.network[3].bias += 1.0
    step(one, images)
    one.after_step()
    other.load_state_dict(one.state_dict())
    assert step(other, images).loss.equal(step(one, images).loss)
    assert other.predict(images).equal(one.predict(images))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_every_weight_gets_a_gradient(images, dtype):
    one = method()
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        result = step(one, images)
    result.loss.backward()
    for name, parameter in one.prediction_network().named_parameters():
        assert parameter.grad is not None, name
    assert result.loss.dtype == result.probs.dtype == torch.float32
    assert result.held_out is None  # both have trained on every image


def test_mixup_and_averages_can_be_left_out(images):
    """Then each network learns from the plain images, by targets that the other one makes."""
    one = method(mixup=False, ema=False)
    assert one.first.average is one.first.mixup_alpha is None
    step(one, images)
    for student, teacher in ((one.first, 1), (one.second, 0)):
        moved = 0.3 * network(teacher).eval()(images).softmax(dim=1)
        torch.testing.assert_close(student.loss.targets[INDEX], moved.detach())


def test_build_gives_both_the_same_settings():
    averages = {"ema_decay": 0.5, "ema_ramp": 4}
    one = method(lam=5, beta=0.9, lam_ramp=8, mixup_alpha=0.4, weigh_labels=True, **averages)
    for student in (one.first, one.second):
        assert (student.loss.lam, student.loss.beta, student.lam_ramp) == (5.0, 0.9, 8)
        assert (student.mixup_alpha, student.weigh_labels) == (0.4, True)
        assert (student.average.decay, student.average.ramp_steps) == (0.5, 4)
        assert student.loss.targets.shape == (6, CLASSES)
