"""A step must never make the host wait for the device: nothing is read back, no shape depends
on values. On a CPU this is seen by watching what is asked of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from elrcli.data.loader import Batch
from elrcli.data.shares import Share
from elrcli.engine.interrupts import StopSignals
from elrcli.engine.observer import Observer
from elrcli.engine.training import Training
from elrcli.methods.mixup import Mixup
from elrcli.run import RunFolder

READS = ("item", "tolist", "numpy", "cpu", "__array__")
aten = torch.ops.aten
WAITS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.unique_dim, aten.equal)


class Watch(TorchDispatchMode):
    """Notes the operations that would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.is_looking = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        masks = packet in (aten.index, aten.index_put, aten.index_put_) and any(
            mask is not None and mask.dtype in (torch.bool, torch.uint8) for mask in args[1]
        )
        if self.is_looking and (masks or packet in WAITS):
            self.found.append(str(packet))
        return func(*args, **(kwargs or {}))


class Batches:
    """A loader of batches that are there already."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.images = 4 * steps

    def __len__(self) -> int:
        return self.steps

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        for step in range(self.steps):
            images = torch.full((4, 3, 32, 32), step, dtype=torch.uint8)
            yield Batch(images, torch.tensor([0, 1, 2, 0]), torch.arange(4) + step, ())


@pytest.fixture
def training_of(train, monkeypatch) -> Callable[..., Training]:
    """Return the training that settings describe, before its first step."""

    def call(**settings: object) -> Training:
        built: list[Training] = []

        def keep(training: Training, observer: Observer, *, for_audit: bool) -> RunFolder:
            built.append(training)
            return training.run

        with monkeypatch.context() as patch:
            patch.setattr(Training, "run_to_end", keep)
            train(overwrite=True, **settings)
        return built[0]

    return call


def steps_taken(training: Training, steps: int) -> None:
    training.part = None  # as at the beginning of an epoch
    with StopSignals() as stop:
        training._train_epoch(Batches(steps), Observer(), stop)  # type: ignore[arg-type]


def waits_per_step(training: Training, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what three more steps ask beyond one; the end of an epoch may look at the weights."""
    watch = Watch()
    # The numbers of these two come from the host and have never left it.
    for owner, name in ((Mixup, "draw"), (Share, "places")):
        original = getattr(owner, name)

        def on_the_host(*args: Any, original: Any = original) -> Any:
            watch.is_looking = False
            try:
                return original(*args)
            finally:
                watch.is_looking = True

        monkeypatch.setattr(owner, name, on_the_host)
    for name in READS:
        read = getattr(Tensor, name)

        def noted(tensor: Tensor, *args: Any, name: str = name, read: Any = read) -> Any:
            if watch.is_looking:
                watch.found.append(name)
            return read(tensor, *args)

        monkeypatch.setattr(Tensor, name, noted)
    steps_taken(training, 1)  # what is made once, such as the state of the optimiser
    found = []
    for steps in (1, 4):
        watch.found = []
        with watch:
            steps_taken(training, steps)
        found.append(watch.found)
    once, more = found
    for name in once:
        more.remove(name)
    return more


SETTINGS = [
    {"method": "elr"},
    {"method": "ce"},
    {"method": "elr", "ema": True, "mixup": True},
    {"method": "elr-plus"},
    {"method": "elr", "optimizer": "adamw", "clip_grad": 1.0, "accumulate": 2},
    {"method": "elr", "table": "fp16", "table_device": "host"},
    {"method": "elr-plus", "table": "top-k", "table_device": "host"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_step_never_waits_for_the_device(training_of, monkeypatch, settings):
    assert waits_per_step(training_of(**settings), monkeypatch) == []


def test_two_halves_look_which_images_belong_to_whom(training_of, monkeypatch):
    """Documented: the sizes of the two parts of a batch are known only to the device."""
    found = waits_per_step(training_of(method="elr-halves"), monkeypatch)
    assert set(found) == {"aten.nonzero"}
    assert len(found) == 3 * 2


def test_the_watch_sees_what_it_should(monkeypatch):
    tensor = torch.tensor([1.0, 2.0])
    for ask, name in [
        (lambda: float(tensor[0]), "aten._local_scalar_dense"),
        (lambda: bool(tensor.any()), "aten._local_scalar_dense"),
        (lambda: tensor[0].item(), "aten._local_scalar_dense"),
        (lambda: tensor.nonzero(), "aten.nonzero"),
        (lambda: tensor[tensor > 1], "aten.index"),
        (lambda: tensor.masked_select(tensor > 1), "aten.masked_select"),
    ]:
        with Watch() as watch:
            ask()
        assert name in watch.found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_step_never_waits_for_the_gpu(training_of, monkeypatch, settings):
    training = training_of(device="cuda", precision="bf16", **settings)
    steps_taken(training, 2)
    method = training.learner.method
    step, end = method.training_step, method.after_step

    def strict(*args: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        return step(*args)

    def relaxed() -> None:
        end()
        torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(method, "training_step", strict)
    monkeypatch.setattr(method, "after_step", relaxed)
    try:
        steps_taken(training, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
