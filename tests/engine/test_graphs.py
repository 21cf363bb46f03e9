from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elrcli.data.loader import RowLoader
from elrcli.engine import graphs
from elrcli.engine import training as module
from elrcli.engine.device import Runtime, choose_runtime
from elrcli.engine.graphs import ReplayedForward, compute_again, replay_on_gpu
from elrcli.engine.observer import Observer
from elrcli.engine.training import Training
from elrcli.models import Preprocessing, create_network
from elrcli.run import RunFolder

PREPARED = Preprocessing(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Notes(Observer):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


class Doubles(nn.Module):
    """Its replays are told from itself by their factors."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: Tensor) -> Tensor:
        return self.weight * images


@pytest.fixture
def doubles() -> Doubles:
    network = Doubles()
    shape = torch.Size([3])
    network.forward = ReplayedForward(
        network,
        {shape: lambda images: 10 * network.weight * images},
        {shape: lambda images: torch.full_like(images, 7)},
    )
    return network


def test_known_shapes_are_replayed_and_others_computed(doubles):
    assert doubles(torch.ones(3)).tolist() == [20, 20, 20]
    assert doubles(torch.ones(2)).tolist() == [2, 2]


def test_eval_mode_has_replays_of_its_own(doubles):
    doubles.eval()
    with torch.no_grad():
        assert doubles(torch.ones(3)).tolist() == [7, 7, 7]
        assert doubles(torch.ones(2)).tolist() == [2, 2]


def test_nothing_is_replayed_in_other_modes(doubles):
    with torch.no_grad():
        assert doubles(torch.ones(3)).tolist() == [2, 2, 2]
    doubles.eval()
    assert doubles(torch.ones(3)).tolist() == [2, 2, 2]


def test_nothing_is_replayed_before_backward_came_through(doubles):
    first = doubles(torch.ones(3))
    assert doubles(torch.ones(3)).tolist() == [2, 2, 2]
    first.sum().backward()
    assert doubles(torch.ones(3)).tolist() == [20, 20, 20]


def test_the_network_computes_again(doubles):
    changed = Doubles()
    changed.forward = torch.zeros_like  # somebody else's
    compute_again([doubles, Doubles(), changed])
    assert doubles(torch.ones(3)).tolist() == [2, 2, 2]
    assert changed(torch.ones(3)).tolist() == [0, 0, 0]


def test_batch_sizes_are_those_of_the_batches(train, monkeypatch):
    """22 training images in batches of at most 4 or 11."""
    seen: list[tuple[list[int], set[int]]] = []
    epoch = RowLoader.epoch

    def noted(self: RowLoader, number: int, start_batch: int = 0) -> Any:
        batches = list(epoch(self, number, start_batch))
        seen.append((self.batch_sizes, {len(batch.index) for batch in batches}))
        return iter(batches)

    monkeypatch.setattr(RowLoader, "epoch", noted)
    for batch_size in (4, 11):
        train(f"of {batch_size}", batch_size=batch_size, epochs=1)
    assert len(seen) > 2
    for said, found in seen:
        assert found == (set(said) if found else set())


@pytest.fixture
def asked(train, monkeypatch) -> Callable[..., list[dict[str, Any]]]:
    """Return what a training on a GPU asks to be replayed; told that it cannot be."""

    def call(**settings: object) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def refuse(**arguments: Any) -> str:
            calls.append(arguments)
            return "a stand-in"

        def keep(training: Training, observer: Observer, *, for_audit: bool) -> RunFolder:
            held_out = {split: training.loaders.held_out(split) for split in ("val", "test")}
            loader = training.loaders.train()
            training.runtime = Runtime(torch.device("cuda"), "bf16")
            notes = Notes()
            training._replay_steps(loader, held_out, notes)
            told = ["without CUDA graphs, somewhat slower: a stand-in"]
            assert notes.notes == (told if calls else [])
            return training.run

        monkeypatch.setattr(module, "replay_on_gpu", refuse)
        monkeypatch.setattr(nn.Module, "compile", lambda network: None)
        monkeypatch.setattr(Training, "run_to_end", keep)
        train(**settings)
        return calls

    return call


@pytest.mark.parametrize(
    "settings",
    [
        {"cuda_graphs": False},
        {"accumulate": 2},
        {"method": "elr-halves"},
        {"compile": True},
    ],
    ids=str,
)
def test_nothing_is_replayed_where_a_batch_is_not_one_pass_and_one_step(asked, settings):
    assert asked(**settings) == []


@pytest.mark.parametrize(
    ("settings", "learning", "judging", "sizes"),
    [
        ({}, 1, 1, {2}),
        ({"freeze": "norm"}, 1, 1, {2}),
        ({"ema": True}, 1, 2, {2, 7, 8}),
        ({"mixup": True}, 1, 1, {2, 7, 8}),
        ({"method": "elr-plus"}, 2, 4, {2, 7, 8}),
    ],
    ids=str,
)
def test_what_is_replayed(asked, settings, learning, judging, sizes):
    """22 training images in batches of 7 or 8, 2 for validation, none to test."""
    (call,) = asked(**settings)
    assert len(call["learning"]) == learning
    assert len(call["judging"]) == judging
    assert call["learning_sizes"] == {7, 8}
    assert call["judging_sizes"] == sizes
    frozen = settings.get("freeze") == "norm"
    for network in call["learning"]:
        assert network.training
        assert all(m.training != frozen for m in network.modules() if "Norm" in type(m).__name__)


def test_a_network_that_cannot_be_captured_stays_as_it_was(monkeypatch):
    network = create_network("test_resnet", 3, pretrained=False, image_size=32).train()
    before = copy.deepcopy(network.state_dict())

    def fail(part: nn.Module, images: Tensor, *_: object) -> None:
        part(images)  # moves the statistics of BatchNorm
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(graphs, "_LearningPasses", fail)
    runtime = Runtime(torch.device("cpu"), "fp32")
    problem = replay_on_gpu([network], [network], [4], [4], runtime, PREPARED)
    assert problem == "operation not permitted when stream is capturing"
    assert "forward" not in network.__dict__
    assert network.training
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


@pytest.fixture
def twins() -> Callable[..., tuple[nn.Module, nn.Module]]:
    """Return a network that is replayed and one that is not, on the GPU."""

    def make(sizes: list[int], precision: str = "fp32") -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        plain = create_network("test_resnet", 3, pretrained=False, image_size=32)
        plain.cuda().to(memory_format=torch.channels_last).train()
        replay = copy.deepcopy(plain)
        runtime = choose_runtime("cuda", precision)
        assert replay_on_gpu([replay], [replay], sizes, [6], runtime, PREPARED) is None
        return replay, plain

    return make


@needs_gpu
def test_replayed_passes_are_those_of_the_network(twins):
    pair = twins([4, 5])
    assert isinstance(pair[0].forward, ReplayedForward)
    torch.testing.assert_close(pair[0].state_dict(), pair[1].state_dict(), rtol=0, atol=0)
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.01) for network in pair]
    for size in (4, 5, 4, 3, 5):
        images = torch.randn(size, 3, 32, 32, device="cuda")
        images = images.to(memory_format=torch.channels_last)
        for network, optimizer in zip(pair, optimizers, strict=True):
            network(images).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    torch.testing.assert_close(pair[0].state_dict(), pair[1].state_dict(), rtol=1e-3, atol=1e-4)


@needs_gpu
def test_replayed_predictions_are_those_of_the_network(twins):
    pair = twins([4])
    for network in pair:
        network.eval()
    for _ in range(2):
        images = torch.randn(6, 3, 32, 32, device="cuda")
        with torch.inference_mode():
            found, expected = (network(images) for network in pair)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@needs_gpu
def test_two_passes_before_one_backward_keep_their_gradients(twins):
    pair = twins([4])
    images = torch.randn(2, 4, 3, 32, 32, device="cuda")
    for network in pair:
        (network(images[0]).square().sum() + network(images[1]).sum()).backward()
    for replay, plain in zip(pair[0].parameters(), pair[1].parameters(), strict=True):
        torch.testing.assert_close(replay.grad, plain.grad, rtol=1e-3, atol=1e-3)


@needs_gpu
def test_a_network_that_waits_for_the_gpu_is_not_captured(twins):
    class Waits(nn.Linear):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images.flatten(1)) * float(images.mean() + 1)

    network = Waits(3 * 32 * 32, 3).cuda()
    runtime = choose_runtime("cuda", "bf16")
    problem = replay_on_gpu([network], [network], [4], [4], runtime, PREPARED)
    assert problem is not None
    assert network(torch.ones(4, 3, 32, 32, device="cuda")).shape == (4, 3)


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("method", ["ce", "elr", "elr-plus", "sop"])
def test_training_is_the_same_with_and_without(train, method, precision):
    notes = Notes()
    settings = {"device": "cuda", "precision": precision, "method": method, "batch_size": 8}
    replay, plain = (
        train(f"{replays}", observer=notes, cuda_graphs=replays, **settings)
        for replays in (True, False)
    )
    assert not any("CUDA graphs" in note for note in notes.notes)
    for one, other in zip(replay.metrics(), plain.metrics(), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.02, abs=0.02)
