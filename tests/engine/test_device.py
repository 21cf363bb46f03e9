from __future__ import annotations

import pytest
import torch

from elrcli.engine.device import Runtime, choose_runtime, worker_count
from elrcli.errors import ModelError
from elrcli.models import Preprocessing

CPU = torch.device("cpu")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
no_mps = pytest.mark.skipif(torch.backends.mps.is_available(), reason="needs a machine without MPS")


@no_gpu
@no_mps
def test_auto_without_a_gpu():
    assert choose_runtime() == Runtime(CPU, "fp32")


def test_bf16_works_on_the_cpu():
    runtime = choose_runtime("cpu", "bf16")
    with runtime.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_fp32_has_no_autocast():
    with choose_runtime("cpu", "fp32").autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_fp16_on_the_cpu_is_refused():
    with pytest.raises(ModelError, match="--precision fp16: needs a GPU"):
        choose_runtime("cpu", "fp16")


def test_an_unknown_precision_is_refused():
    message = r"^--precision fp7: choose one of auto, fp32, bf16, fp16\.$"
    with pytest.raises(ModelError, match=message):
        choose_runtime("cpu", "fp7")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", "cuda:-1", "cuda:99999999999999999999"])
def test_an_unknown_device_is_named(name):
    with pytest.raises(ModelError, match=f"--device {name}: "):
        choose_runtime(name)


@pytest.mark.parametrize("name", ["meta", "xpu"])
def test_a_device_that_is_not_supported_is_named(name):
    with pytest.raises(ModelError, match=r"not supported\. Use auto, cpu, cuda, cuda:1 or mps"):
        choose_runtime(name)


@no_gpu
def test_a_missing_gpu_is_named():
    with pytest.raises(ModelError, match="--device cuda: this machine has 0 CUDA devices"):
        choose_runtime("cuda")


@pytest.fixture
def two_gpus(monkeypatch) -> list[torch.device]:
    """Let torch find two GPUs; collects which one is made the current one."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: chosen[-1].index == 1)
    monkeypatch.setattr("elrcli.engine.device._let_backward_begin", lambda device: None)
    return chosen


@pytest.mark.parametrize(
    ("name", "index", "precision"),
    [("auto", 0, "fp16"), ("cuda", 0, "fp16"), ("cuda:0", 0, "fp16"), ("cuda:1", 1, "bf16")],
)
def test_the_chosen_gpu_is_the_current_one(two_gpus, name, index, precision):
    device = torch.device("cuda", index)
    assert choose_runtime(name) == Runtime(device, precision)
    assert two_gpus == [device]


def test_a_gpu_that_does_not_work_is_named(two_gpus, monkeypatch):
    def fail(device: torch.device) -> None:
        raise torch.AcceleratorError("CUDA error: no kernel image is available\nCompile with")

    monkeypatch.setattr(torch.cuda, "set_device", fail)
    with pytest.raises(ModelError) as caught:
        choose_runtime("cuda:1")
    assert str(caught.value) == (
        "cuda:1: does not work (CUDA error: no kernel image is available). `elr doctor` says more;"
        " or take --device cpu."
    )


def test_normalise_by_hand():
    """(pixel / 255 - mean) / std: 255 with mean 0.5, deviation 0.25 is 2; 0 is -2."""
    images = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    prepared = Preprocessing(2, (0.5, 0.5, 0.0), (0.25, 0.5, 1.0))
    found = Runtime(CPU, "fp32").normalise(images, prepared)
    expected = torch.tensor([[-2.0, 2.0], [-1.0, 1.0], [0.0, 1.0]]).view(1, 3, 1, 2)
    torch.testing.assert_close(found, expected)


def test_normalise_keeps_channels_last_and_the_input():
    images = torch.full((2, 3, 4, 4), 7, dtype=torch.uint8).to(memory_format=torch.channels_last)
    runtime, prepared = Runtime(CPU, "fp32"), Preprocessing(4, (0.5,) * 3, (0.5,) * 3)
    assert runtime.normalise(images, prepared).is_contiguous(memory_format=torch.channels_last)
    assert (images == 7).all()


def test_statistics_made_for_predictions_serve_training_too():
    prepared = Preprocessing(4, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    runtime, images = Runtime(CPU, "fp32"), torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    with torch.inference_mode():
        runtime.normalise(images, prepared)
    weight = torch.ones(1, requires_grad=True)
    (runtime.normalise(images, prepared) * weight).sum().backward()
    assert weight.grad is not None


def test_worker_count():
    assert worker_count(0) == 0
    assert worker_count(20) == 20
    assert 1 <= worker_count(None) <= 8
