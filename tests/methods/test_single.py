from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from elrcli.config import TrainConfig
from elrcli.methods.build import build_method
from elrcli.methods.elr import ELRLoss, clamped_softmax
from elrcli.methods.single import SingleNetwork, StepResult, WeightAverage, draw_mixup, judge

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


def method(lam: float = 3.0, **options: float) -> SingleNetwork:
    return SingleNetwork(network(), ELRLoss(6, CLASSES, lam=lam), **options)


def build(**settings: object) -> SingleNetwork:
    model = network()
    config = TrainConfig(data="d", **settings)
    labels = np.zeros(6, dtype=np.int32)
    return build_method(config, model, [model], labels, np.arange(6), CLASSES)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def step(of: SingleNetwork, images: Tensor) -> StepResult:
    return of.training_step(images, LABELS, INDEX, generator())


# --- plain ELR ---


def test_a_step_is_the_public_loss_on_the_networks_logits(images):
    one = method()
    result = step(one, images)
    reference, logits = ELRLoss(6, CLASSES), network()(images)
    expected = reference(logits, LABELS, INDEX)
    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(one.targets, reference.targets)
    torch.testing.assert_close(result.probs, logits.detach().softmax(dim=1))
    torch.testing.assert_close(result.cross_entropy + result.elr_term, result.loss.detach())
    assert not result.probs.requires_grad
    assert result.held_out is None  # the one network has trained on every image


def test_lambda_zero_is_cross_entropy_that_keeps_targets(images):
    one = method(lam=0.0)
    result = step(one, images)
    assert result.loss.equal(functional.cross_entropy(network()(images), LABELS))
    assert result.elr_term == 0
    assert one.targets[INDEX].sum(dim=1) == pytest.approx([0.3] * 4)


def test_cross_entropy_equals_elr_of_weight_zero(images):
    one, other = build(method="ce"), build(method="elr", lam=0.0)
    assert step(one, images).loss.equal(step(other, images).loss)


def test_build_reads_the_settings():
    built = build(lam=5, beta=0.9, ema=True, ema_decay=0.5, mixup=True)
    assert (built.loss.lam, built.loss.beta, built.mixup_alpha) == (5.0, 0.9, 1.0)
    assert built.average.decay == 0.5
    assert built.targets.shape == (6, CLASSES)
    plain = build()
    assert plain.average is plain.mixup_alpha is None


def test_held_out_predictions_move_targets():
    one = method()
    one.observe(torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([4]))
    torch.testing.assert_close(one.targets[4], 0.3 * torch.tensor([0.5, 0.25, 0.25]))


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


def test_a_judge_keeps_no_gradient_and_goes_back_to_its_mode(images):
    model = network()
    logits = judge(model, images)
    assert not logits.requires_grad
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(judge(model.eval(), images), logits)
    assert not any(module.training for module in model.modules())


# --- mixup ---


def test_the_share_lies_between_one_half_and_one():
    draws = torch.Generator().manual_seed(0)
    shares = torch.tensor([draw_mixup(2, 1.0, draws)[0] for _ in range(2000)])
    assert 0.5 <= shares.min() < 0.51
    assert 0.99 < shares.max() <= 1.0
    assert shares.mean().item() == pytest.approx(0.75, abs=0.01)  # uniform on [0.5, 1]


def test_the_same_generator_draws_the_same():
    share, partner = draw_mixup(5, 0.4, generator())
    again, same = draw_mixup(5, 0.4, generator())
    assert share == again
    assert partner.equal(same)
    assert sorted(partner.tolist()) == [0, 1, 2, 3, 4]


def test_mixup_by_the_formulas(images):
    """METHOD: inputs, labels and targets are mixed alike; targets see the unmixed images."""
    one = method(mixup_alpha=1.0)
    one.network.train()
    share, partner = draw_mixup(4, 1.0, generator())
    result = step(one, images)

    reference = network().eval()(images).detach()
    moved = 0.3 * clamped_softmax(reference) / clamped_softmax(reference).sum(1, keepdim=True)
    torch.testing.assert_close(one.targets[INDEX], moved)
    torch.testing.assert_close(result.probs, reference.softmax(dim=1))

    logits = network().train()(share * images + (1 - share) * images[partner])
    one_hot = functional.one_hot(LABELS, CLASSES).float()
    soft = share * one_hot + (1 - share) * one_hot[partner]
    cross_entropy = -(soft * logits.log_softmax(dim=1)).sum(dim=1).mean()
    mixed = share * moved + (1 - share) * moved[partner]
    term = 3.0 * (1 - (clamped_softmax(logits) * mixed).sum(dim=1)).log().mean()
    torch.testing.assert_close(result.cross_entropy, cross_entropy.detach())
    torch.testing.assert_close(result.loss, cross_entropy + term)


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


def test_the_average_starts_as_the_network_and_its_decay_ramps_up():
    """Decay 0, 1/2, 2/3: the plain mean of the visited weights, until `decay` holds it."""
    model = nn.Linear(1, 1, bias=False)
    average = WeightAverage(model, decay=0.6)
    for value in (3.0, 6.0, 12.0):
        nn.init.constant_(model.weight, value)
        average.update(model)
    # 3; (3 + 6) / 2 = 4.5; 0.6 * 4.5 + 0.4 * 12 = 7.5
    assert average.network.weight.item() == pytest.approx(7.5)
    assert average.steps_done == 3


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
    one = method(ema_decay=0.9)
    one.train()
    assert not any(module.training for module in one.average.modules())
    assert not any(parameter.requires_grad for parameter in one.average.parameters())
    assert one.network.training


def test_targets_and_predictions_come_from_the_average(images):
    one = method(ema_decay=0.9)
    with torch.no_grad():
        one.network[3].bias += torch.tensor([5.0, 0.0, 0.0])  # the average stays behind
    expected = network().eval()(images).detach()
    result = step(one, images)
    torch.testing.assert_close(one.predict(images), expected)
    torch.testing.assert_close(result.probs, expected.softmax(dim=1))
    torch.testing.assert_close(one.targets[INDEX].argmax(dim=1), expected.argmax(dim=1))
    assert one.prediction_network() is one.average.network
    assert method().prediction_network() is not None


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
