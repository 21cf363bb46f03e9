"""Where and in which arithmetic a network runs."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from elrcli.engine.launch import launch
from elrcli.engine.memory import is_out_of_memory, keep_freed_memory, memory_explained
from elrcli.errors import ModelError, first_line
from elrcli.methods.sending import sent
from elrcli.models import Preprocessing

PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Runtime:
    """A device and the precision of the network's arithmetic on it."""

    device: torch.device
    precision: str  # fp32, bf16 or fp16

    def autocast(self, *, cached: bool = True) -> AbstractContextManager[object]:
        """Return the context in which the network computes.

        `cached` converts every weight once per context, not once per use.
        """
        if self.precision == "fp32":
            return nullcontext()
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype=dtype, cache_enabled=cached)

    def normalise(self, images: Tensor, preprocessing: Preprocessing) -> Tensor:
        """Move uint8 images [B, 3, S, S] to the device and normalise them there, channels_last."""
        batch, channels, height, width = images.shape
        mean, std = _pixel_statistics(preprocessing, width, self.device)
        pixels = sent(images, self.device).permute(0, 2, 3, 1)
        # In lines of all channels the arithmetic has long rows to work on: twice as fast on CPUs.
        lines = pixels.reshape(batch, height, width * channels).float().sub_(mean).div_(std)
        return lines.view(batch, height, width, channels).permute(0, 3, 1, 2)


def blank_images(count: int, runtime: Runtime, preprocessing: Preprocessing) -> Tensor:
    """Return normalised images [count, 3, S, S] without a picture, made as those of a loader."""
    side = preprocessing.image_size
    blank = torch.zeros(count, side, side, 3, dtype=torch.uint8)
    return runtime.normalise(blank.permute(0, 3, 1, 2), preprocessing)


@lru_cache(maxsize=8)  # a copy to the device in every step would make it wait for the host
def _pixel_statistics(
    preprocessing: Preprocessing, width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of pixels in 0..255, each [S * 3] for one line, on the device."""
    with torch.inference_mode(False):  # training uses them too
        mean = torch.tensor(preprocessing.mean, device=device).repeat(width) * 255
        std = torch.tensor(preprocessing.std, device=device).repeat(width) * 255
    return mean, std


def choose_runtime(device: str = "auto", precision: str = "auto") -> Runtime:
    """Resolve `auto` and refuse what this machine does not have.

    Several processes on one machine have a GPU each, by their local rank.
    """
    if precision not in ("auto", *PRECISIONS):
        known = ", ".join(("auto", *PRECISIONS))
        raise ModelError(f"--precision {precision}: choose one of {known}.")
    chosen = _choose_device(device)
    if chosen.type == "cuda":
        with memory_explained(chosen, "Choose another --device."), _failure_explained(chosen):
            torch.cuda.set_device(chosen)  # seeds, precision, NCCL and captures go by it
            _let_backward_begin(chosen)
    elif chosen.type == "cpu":
        keep_freed_memory()
    if precision == "auto":
        precision = _best_precision(chosen)
    if precision == "fp16" and chosen.type == "cpu":
        raise ModelError("--precision fp16: needs a GPU. Use fp32 or bf16 on the CPU.")
    return Runtime(chosen, precision)


@contextmanager
def _failure_explained(device: torch.device) -> Iterator[None]:
    """Turn what a GPU that is too old or does not work says into `ModelError`."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error, device):
            raise
        raise ModelError(
            f"{device}: does not work ({first_line(error)}). `elr doctor` says more;"
            " or take --device cpu."
        ) from error


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed torch's generators of the host and of a device, without asking all other kinds."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def _let_backward_begin(device: torch.device) -> None:
    """Take a first backward step: torch remarks there that its thread is new to the GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight = torch.ones(1, 1, device=device, requires_grad=True)
        (weight @ weight).sum().backward()


def worker_count(requested: int | None) -> int:
    """Return the number of loading processes: as asked, or by the cores this process may use.

    Processes that train together on one machine share its cores.
    """
    if requested is not None:
        return requested
    return max(1, min(8, usable_cores() // launch().local_processes))


def usable_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _choose_device(name: str) -> torch.device:
    place = launch()
    if place.processes > 1:
        return _choose_own_device(name, place.local_rank)
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(f"--device {name}: unknown. Use auto, cpu, cuda, cuda:1 or mps.") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ModelError(f"--device {name}: this machine has {count} CUDA devices. Use auto.")
        device = torch.device("cuda", device.index or 0)
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise ModelError("--device mps: not available on this machine. Use auto.")
    elif device.type != "cpu":
        raise ModelError(f"--device {name}: not supported. Use auto, cpu, cuda, cuda:1 or mps.")
    return device


def _choose_own_device(name: str, local_rank: int) -> torch.device:
    """Return the device of one of several processes on this machine."""
    if name not in ("auto", "cuda", "cpu"):
        raise ModelError(f"--device {name}: several processes need one each. Use cuda or cpu.")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ModelError(
            f"--device {name}: this machine has {count} CUDA devices. Lower --nproc-per-node, "
            "or add --device cpu."
        )
    return torch.device("cuda", local_rank)


def _best_precision(device: torch.device) -> str:
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
