from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from elrcli.config import TrainConfig
from elrcli.methods.base import StepResult
from elrcli.methods.build import build_method
from elrcli.methods.elr import ELRLoss
from elrcli.methods.halves import TwoHalves, draw_halves
from tests.methods.pair import CLASSES, Pair, network

OWNER = torch.tensor([0, 1, 0, 1, 0, 1])
INDEX, LABELS = torch.tensor([4, 1, 0, 5, 2]), torch.tensor([0, 1, 2, 1, 0])
FIRST, SECOND = torch.tensor([0, 2, 4]), torch.tensor([1, 3])  # places in the batch, by owner


def method(lam: float = 3.0) -> TwoHalves:
    pair = Pair()
    return TwoHalves(pair, list(pair.networks), ELRLoss(6, CLASSES, lam=lam), OWNER)


def step(of: TwoHalves, images: Tensor, places: Tensor | None = None) -> StepResult:
    """Make one step on the images at `places` of the batch, on all without."""
    if places is None:
        places = torch.arange(5)
    return of.training_step(images[places], LABELS[places], INDEX[places], torch.Generator())


@pytest.fixture
def images() -> Tensor:
    return torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(1))


# --- the step ---


def test_the_loss_is_the_sum_of_the_public_loss_on_each_half(images):
    one = method()
    result = step(one, images)
    reference = ELRLoss(6, CLASSES)
    logits = network(0)(images[FIRST]), network(1)(images[SECOND])
    expected = reference(logits[0], LABELS[FIRST], INDEX[FIRST])
    expected = expected + reference(logits[1], LABELS[SECOND], INDEX[SECOND])
    torch.testing.assert_close(result.loss, expected)
    # moved by the owner's prediction
    torch.testing.assert_close(one.loss.targets, reference.targets)
    assert not one.loss.targets[3].any()  # the one sample that the batch leaves out


def test_the_reported_losses_are_means_over_the_images(images):
    """Three images of five belong to the first network, two to the second."""
    result = step(method(), images)
    cross_entropy = term = torch.tensor(0.0)
    for number, places, share in ((0, FIRST, 0.6), (1, SECOND, 0.4)):
        logits = network(number)(images[places]).detach()
        entropy = functional.cross_entropy(logits, LABELS[places])
        loss = ELRLoss(6, CLASSES)(logits, LABELS[places], INDEX[places])
        cross_entropy = cross_entropy + share * entropy
        term = term + share * (loss - entropy)
    torch.testing.assert_close(result.cross_entropy, cross_entropy)
    torch.testing.assert_close(result.elr_term, term)
    assert not result.cross_entropy.requires_grad
    assert not result.elr_term.requires_grad


def test_each_network_learns_from_its_own_half_alone(images):
    one = method()
    step(one, images).loss.backward()
    for number, places in ((0, FIRST), (1, SECOND)):
        alone = network(number)
        ELRLoss(6, CLASSES)(alone(images[places]), LABELS[places], INDEX[places]).backward()
        pairs = zip(one.parts[number].parameters(), alone.parameters(), strict=True)
        for parameter, expected in pairs:
            torch.testing.assert_close(parameter.grad, expected.grad)


def test_the_owner_predicts_in_train_mode_the_other_network_judges_in_eval_mode(images):
    result = step(method(), images)
    first, second = network(0), network(1)
    judged = [second.eval()(images[FIRST]).detach().softmax(dim=1)]  # before its own half
    own = [net.train()(images[p]) for net, p in ((first, FIRST), (second, SECOND))]
    judged.append(first.eval()(images[SECOND]).detach().softmax(dim=1))  # after its own half
    for number, places in enumerate((FIRST, SECOND)):
        torch.testing.assert_close(result.probs[places], own[number].detach().softmax(dim=1))
        torch.testing.assert_close(result.held_out[places], judged[number])
    assert not result.probs.requires_grad
    assert not result.held_out.requires_grad


def test_each_batch_norm_sees_its_own_half(images):
    one = method()
    step(one, images)
    for number, places in ((0, FIRST), (1, SECOND)):
        alone = network(number)
        alone(images[places])
        norm = one.parts[number][1]
        torch.testing.assert_close(norm.running_mean, alone[1].running_mean)
        assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("number", [0, 1])
def test_a_batch_of_one_half_only_judges_with_the_other_network(images, number):
    one = method()
    places = (FIRST, SECOND)[number]
    result = step(one, images, places)
    result.loss.backward()
    own, other = one.parts[number], one.parts[1 - number]
    assert all(parameter.grad is not None for parameter in own.parameters())
    assert all(parameter.grad is None for parameter in other.parameters())
    assert other.training
    for name, tensor in network(1 - number).state_dict().items():
        assert tensor.equal(other.state_dict()[name]), name
    torch.testing.assert_close(result.loss.detach(), result.cross_entropy + result.elr_term)


def test_a_half_of_a_single_image_uses_running_statistics(images):
    one = method()
    result = step(one, images, torch.tensor([0, 1, 2, 4]))  # place 1 belongs to the second network
    result.loss.backward()
    expected = network(1).eval()(images[1:2]).softmax(dim=1)
    torch.testing.assert_close(result.probs[1:2], expected.detach())
    first, second = one.parts
    assert (first[1].num_batches_tracked, second[1].num_batches_tracked) == (1, 0)
    assert all(module.training for module in second.modules())
    assert all(parameter.grad is not None for parameter in second.parameters())


def test_frozen_batch_norm_stays_frozen(images):
    one = method()
    for part in one.parts:
        part[1].eval()
    step(one, images)
    assert [part[1].num_batches_tracked for part in one.parts] == [0, 0]
    assert not any(part[1].training for part in one.parts)


def test_lambda_zero_is_cross_entropy_on_each_half(images):
    result = step(method(lam=0.0), images)
    expected = functional.cross_entropy(network(0)(images[FIRST]), LABELS[FIRST])
    expected = expected + functional.cross_entropy(network(1)(images[SECOND]), LABELS[SECOND])
    torch.testing.assert_close(result.loss, expected)
    assert result.elr_term == 0


def test_under_autocast_every_weight_gets_a_gradient(images):
    """The second network judges before it trains: autocast must not reuse its weights."""
    one = method()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = step(one, images)
    result.loss.backward()
    for name, parameter in one.network.named_parameters():
        assert parameter.grad is not None, name
    assert result.probs.dtype == result.held_out.dtype == torch.float32


# --- what a training asks of it ---


def test_both_networks_predict_as_one(images):
    one = method()
    expected = (network(0).eval()(images) + network(1).eval()(images)) / 2
    torch.testing.assert_close(one.predict(images), expected.detach())
    assert one.prediction_network() is one.network
    assert one.network.training


def test_after_a_step_only_the_count_changes():
    one = method()
    before = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    one.after_step()
    after = one.state_dict()
    assert {name for name in after if not after[name].equal(before[name])} == {"_extra_state"}


def test_lambda_ramps_up_with_the_steps(images):
    pair = Pair()
    one = TwoHalves(pair, list(pair.networks), ELRLoss(6, CLASSES), OWNER, lam_ramp=2)
    one.after_step()
    share = math.exp(-1.25)  # of lambda, after one of two steps
    torch.testing.assert_close(step(one, images).elr_term, share * step(method(), images).elr_term)


def test_the_state_holds_every_weight_once_and_the_halves():
    one = method()
    weights = {f"network.{name}" for name in Pair().state_dict()}
    assert set(one.state_dict()) == weights | {"loss.targets", "owner", "_extra_state"}
    parameters = list(one.parameters())
    assert len(parameters) == 2 * len(list(network(0).parameters()))


def test_a_loaded_state_reaches_the_networks_that_train(images):
    one, other = method(), method()
    with torch.no_grad():
        one.parts[0][3].bias += 1.0
    other.owner.zero_()
    other.load_state_dict(one.state_dict())
    assert other.owner.tolist() == OWNER.tolist()
    assert step(other, images).loss.equal(step(one, images).loss)


def test_build_draws_the_halves_by_labels_and_seed():
    pair, labels = Pair(), np.arange(30) % CLASSES
    config = TrainConfig(data="d", method="elr-halves", lam=5, beta=0.9, seed=3, lam_ramp=9)
    trained = np.arange(0, 30, 2)
    built = build_method(config, pair, list(pair.networks), labels, trained, CLASSES)
    assert isinstance(built, TwoHalves)
    assert built.owner[trained].tolist() == draw_halves(labels[trained], 3).tolist()
    assert (built.loss.lam, built.loss.beta) == (5.0, 0.9)
    assert built.loss.targets.shape == (30, CLASSES)
    assert built.prediction_network() is pair
    assert built.lam_ramp == 9


# --- the halves ---


@pytest.mark.parametrize("seed", range(5))
def test_halves_are_equal_in_every_class_up_to_one(seed):
    labels = np.random.default_rng(seed).permutation(np.repeat([0, 1, 2, 3], [1, 4, 5, 7]))
    half = draw_halves(labels, seed)
    in_second = np.bincount(labels, weights=half)
    assert in_second[0] in (0, 1)
    assert in_second[1] == 2
    assert in_second[2] in (2, 3)
    assert in_second[3] in (3, 4)
    assert half.sum() == 8  # of 17


def test_the_same_seed_draws_the_same_halves():
    labels = np.zeros(40, dtype=np.int32)
    assert draw_halves(labels, 5).tolist() == draw_halves(labels, 5).tolist()
    assert draw_halves(labels, 5).tolist() != draw_halves(labels, 6).tolist()


def test_every_sample_can_come_into_both_halves():
    labels = np.zeros(4, dtype=np.int32)
    drawn = np.array([draw_halves(labels, seed) for seed in range(20)])
    assert (drawn.min(axis=0) == 0).all()
    assert (drawn.max(axis=0) == 1).all()


def test_classes_of_one_sample_are_shared_out():
    half = draw_halves(np.array([3, 0, 2, 1, 4]), seed=0)
    assert sorted(half.tolist()) == [0, 0, 0, 1, 1]


@pytest.mark.parametrize(("labels", "expected"), [([], []), ([7], [0])])
def test_halves_of_almost_nothing(labels, expected):
    assert draw_halves(np.array(labels, dtype=np.int32), seed=0).tolist() == expected
