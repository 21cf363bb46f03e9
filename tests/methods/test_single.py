from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from elrcli.config import TrainConfig
from elrcli.methods.averages import WeightAverage
from elrcli.methods.base import StepResult
from elrcli.methods.build import build_method
from elrcli.methods.elr import ELRLoss, clamped_softmax
from elrcli.methods.mixup import Mixup
from elrcli.methods.single import SingleNetwork

CLASSES = 3
LABELS, INDEX = torch.tensor([0, 1, 2, 1]), torch.tensor([5, 0, 3, 2])


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def network() -> nn.Module:
    """A network with BatchNorm, different in train and eval mode."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, CLASSES)
    )


def method(lam: float = 3.0, ema_decay: float | None = None, **options: Any) -> SingleNetwork:
    model = network()
    if ema_decay is not None:
        options["average"] = WeightAverage(model, ema_decay)
    return SingleNetwork(model, ELRLoss(6, CLASSES, lam=lam), **options)


def build(**settings: object) -> SingleNetwork:
    model = network()
    config = TrainConfig(data="d", **settings)
    labels = np.zeros(6, dtype=np.int32)
    return build_method(config, model, [model], labels, np.arange(6), CLASSES)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(9)


def draw() -> Mixup:
    """The draw of a step."""
    return Mixup.draw(4, 1.0, generator(), torch.device("cpu"))


def step(of: SingleNetwork, images: Tensor) -> StepResult:
    return of.training_step(images, LABELS, INDEX, generator())


# --- plain ELR ---


def test_a_step_is_the_public_loss_on_the_networks_logits(images):
    one = method()
    result = step(one, images)
    reference, logits = ELRLoss(6, CLASSES), network()(images)
    expected = reference(logits, LABELS, INDEX)
    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(one.loss.targets, reference.targets)
    torch.testing.assert_close(result.probs, logits.detach().softmax(dim=1))
    torch.testing.assert_close(result.cross_entropy + result.elr_term, result.loss.detach())
    assert not result.probs.requires_grad
    assert result.held_out is None  # the one network has trained on every image


def test_another_networks_sure_prediction_moves_the_targets_unclamped(images):
    sure = torch.tensor([50.0, -50.0, -50.0])
    own, judged = method(), method(ema_decay=0.9)
    for network in (own.network, judged.network, judged.average.network):
        with torch.no_grad():
            network[3].weight.zero_()
            network[3].bias.copy_(sure)
    step(own, images)
    step(judged, images)
    row = torch.tensor([1 - 1e-4, 1e-4, 1e-4])
    torch.testing.assert_close(own.loss.targets[5], 0.3 * row / row.sum())
    torch.testing.assert_close(judged.loss.targets[5], torch.tensor([0.3, 0.0, 0.0]))


def test_lambda_zero_is_cross_entropy_that_keeps_targets(images):
    one = method(lam=0.0)
    result = step(one, images)
    torch.testing.assert_close(
        result.loss, functional.cross_entropy(network()(images), LABELS), rtol=1e-6, atol=0
    )
    assert result.elr_term == 0
    assert one.target_rows(INDEX).sum(dim=1) == pytest.approx([0.3] * 4)


def test_cross_entropy_equals_elr_of_weight_zero(images):
    one, other = build(method="ce"), build(method="elr", lam=0.0)
    assert step(one, images).loss.equal(step(other, images).loss)


def test_build_reads_the_settings():
    averages = {"ema": True, "ema_decay": 0.5, "ema_ramp": 4}
    built = build(
        lam=5, beta=0.9, lam_ramp=8, mixup=True, mixup_alpha=0.5, weigh_labels=True, **averages
    )
    assert (built.loss.lam, built.loss.beta, built.mixup_alpha) == (5.0, 0.9, 0.5)
    assert (built.lam_ramp, built.weigh_labels) == (8, True)
    assert (built.average.decay, built.average.ramp_steps) == (0.5, 4)
    assert built.loss.targets.shape == (6, CLASSES)
    plain = build()
    assert plain.average is plain.mixup_alpha is None


def test_lambda_ramps_up_with_the_steps(images):
    """exp(-5), exp(-5 / 4) and 1 times lambda in steps 0, 1 and 2 of a ramp of 2."""
    one = method(lam_ramp=2)
    for factor in (math.exp(-5), math.exp(-1.25), 1.0, 1.0):
        assert one.lam == pytest.approx(3 * factor)
        one.loss.targets.zero_()
        term = step(one, images).elr_term
        torch.testing.assert_close(term, factor * step(method(), images).elr_term)
        one.after_step()
    other = method(lam_ramp=2)
    other.load_state_dict(one.state_dict())
    assert other.steps_done == 4


@pytest.mark.parametrize("mixup_alpha", [None, 1.0])
def test_the_loss_of_the_labels_may_be_another(images, mixup_alpha):
    """Its mean over the samples; with mixup that of both labels by their shares."""

    def spread(logits: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        assert index.equal(INDEX)
        return (logits.amax(dim=1) - logits.gather(1, labels[:, None])[:, 0]) * labels

    one = method(lam=0.0, label_loss=spread, mixup_alpha=mixup_alpha)
    result = step(one, images)
    if mixup_alpha is None:
        expected = spread(network()(images), LABELS, INDEX).mean()
    else:
        mixed = draw()
        logits = network()(mixed.mix(images))
        first, second = (spread(logits, y, INDEX).mean() for y in (LABELS, LABELS[mixed.partner]))
        expected = mixed.share * first + (1 - mixed.share) * second
    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(result.cross_entropy, expected.detach())


def test_build_gives_every_method_its_loss(images):
    logits, probs = network()(images).detach(), network()(images).detach().softmax(dim=1)
    given = probs.gather(1, LABELS[:, None])[:, 0]
    cross = -given.log()
    for settings, expected in (
        ({"method": "elr"}, cross),
        ({"method": "ce"}, cross),
        ({"method": "gce"}, (1 - given**0.7) / 0.7),
        ({"method": "sl"}, 0.1 * cross + 4 * (1 - given)),
        ({"method": "sl", "sl_alpha": 6, "sl_beta": 0.5}, 6 * cross + 2 * (1 - given)),
        ({"method": "sop", "sop_start": 1e-8}, cross),  # before it has learned anything
    ):
        built = build(**settings)
        torch.testing.assert_close(built.label_loss(logits, LABELS, INDEX), expected)
        assert built.loss.lam == (3.0 if settings["method"] == "elr" else 0.0)
    sop = {"method": "sop", "sop_start": 1e-3}
    built = build(**sop, sop_lr_u=2, sop_lr_v=3)
    assert (built.label_loss.lr_u, built.label_loss.lr_v) == (2.0, 3.0)
    assert {"label_loss.u", "label_loss.v"} <= set(built.state_dict())
    assert built.label_loss.u.equal(build(**sop).label_loss.u)
    assert not built.label_loss.u.equal(build(**sop, seed=1).label_loss.u)
    torch.testing.assert_close(
        build(**sop | {"sop_start": 2e-3}).label_loss.u, 2 * built.label_loss.u
    )


def test_held_out_predictions_move_targets():
    one = method()
    one.observe(torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([4]))
    torch.testing.assert_close(one.loss.targets[4], 0.3 * torch.tensor([0.5, 0.25, 0.25]))


def test_predict_uses_eval_mode_and_leaves_every_mode_as_it_was(images):
    one = method()
    norm = one.network[1]
    one.network.train()
    norm.eval()
    expected = network().eval()(images)
    torch.testing.assert_close(one.predict(images), expected.detach())
    assert one.network.training
    assert not norm.training
    assert norm.num_batches_tracked == 0


# --- mixup ---


def test_mixup_by_the_formulas(images):
    """METHOD: inputs, labels and targets are mixed alike; targets see the unmixed images."""
    one = method(mixup_alpha=1.0)
    one.network.train()
    drawn = draw()
    share, partner = drawn.share, drawn.partner
    result = step(one, images)

    reference = network().eval()(images).detach()
    moved = 0.3 * clamped_softmax(reference) / clamped_softmax(reference).sum(1, keepdim=True)
    torch.testing.assert_close(one.target_rows(INDEX), moved)
    torch.testing.assert_close(result.probs, reference.softmax(dim=1))

    logits = network().train()(share * images + (1 - share) * images[partner])
    one_hot = functional.one_hot(LABELS, CLASSES).float()
    soft = share * one_hot + (1 - share) * one_hot[partner]
    cross_entropy = -(soft * logits.log_softmax(dim=1)).sum(dim=1).mean()
    mixed = share * moved + (1 - share) * moved[partner]
    term = 3.0 * (1 - (clamped_softmax(logits) * mixed).sum(dim=1)).log().mean()
    torch.testing.assert_close(result.cross_entropy, cross_entropy.detach())
    torch.testing.assert_close(result.loss, cross_entropy + term)


def test_mixed_labels_may_be_weighed_by_the_targets(images):
    """METHOD: y q / sum(y q), where y are the mixed labels and q the mixed targets."""
    one = method(mixup_alpha=1.0, weigh_labels=True, lam=0.0)
    mixed = draw()
    result = step(one, images)
    one_hot = functional.one_hot(LABELS, CLASSES).float()
    soft = mixed.mix(one_hot) * mixed.mix(one.target_rows(INDEX))
    soft /= soft.sum(dim=1, keepdim=True)
    logits = network()(mixed.mix(images))
    torch.testing.assert_close(result.loss, -(soft * logits.log_softmax(dim=1)).sum(dim=1).mean())
    assert not result.loss.isclose(step(method(mixup_alpha=1.0, lam=0.0), images).loss)


def test_logits_of_another_network_may_move_the_targets(images):
    reference = torch.randn(4, CLASSES)
    for options in ({}, {"mixup_alpha": 1.0}, {"ema_decay": 0.9}):
        one = method(**options)
        result = one.training_step(images, LABELS, INDEX, generator(), reference)
        torch.testing.assert_close(result.probs, reference.softmax(dim=1))
        torch.testing.assert_close(one.target_rows(INDEX), 0.3 * reference.softmax(dim=1))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_with_mixup_every_weight_gets_a_gradient(images, dtype):
    """The prediction without gradient comes first: autocast must not reuse its weights."""
    one = method(mixup_alpha=1.0)
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        loss = step(one, images).loss
    loss.backward()
    for name, parameter in one.network.named_parameters():
        assert parameter.grad is not None, name


# --- weight average ---


def test_targets_and_predictions_come_from_the_average(images):
    one = method(ema_decay=0.9)
    with torch.no_grad():
        one.network[3].bias += torch.tensor([5.0, 0.0, 0.0])  # the average stays behind
    expected = network().eval()(images).detach()
    result = step(one, images)
    torch.testing.assert_close(one.predict(images), expected)
    torch.testing.assert_close(result.probs, expected.softmax(dim=1))
    torch.testing.assert_close(one.target_rows(INDEX).argmax(dim=1), expected.argmax(dim=1))
    assert one.prediction_network() is one.average.network
    plain = method()
    assert plain.prediction_network() is plain.network


def test_state_dict_holds_the_average_and_its_step_count(images):
    one = method(ema_decay=0.9)
    for _ in range(3):
        one.after_step()
    other = method(ema_decay=0.9)
    other.load_state_dict(one.state_dict())
    assert other.average.steps_done == 3
    for name, tensor in one.state_dict().items():
        assert tensor.equal(other.state_dict()[name]), name


def test_after_step_without_an_average_does_nothing():
    before = network().state_dict()
    one = method()
    one.after_step()
    assert all(tensor.equal(before[name]) for name, tensor in one.network.state_dict().items())
    assert one.steps_done == 1
