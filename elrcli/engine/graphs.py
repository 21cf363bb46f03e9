"""Networks whose forward and backward pass the GPU replays as CUDA graphs.

A small network on small images leaves the GPU idle: the host cannot start its hundreds of kernels
fast enough. Replaying starts them all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from elrcli.engine.device import Runtime, blank_images
from elrcli.models import Preprocessing

Forward = Callable[[Tensor], Tensor]  # images [B, 3, S, S] -> logits [B, K]


class ReplayedForward:
    """A network's forward, replayed for the shapes of images that were captured.

    What it returns is overwritten by the next replay, so there is none before backward came
    through; the network itself computes then, and for other shapes, in eval mode and without
    gradient.
    """

    def __init__(self, network: nn.Module, replays: dict[torch.Size, Forward]) -> None:
        self._network = network
        self._forward = network.forward
        self._replays = replays
        self._is_between = False  # forward was replayed, backward not yet

    def __call__(self, images: Tensor) -> Tensor:
        """Return logits [B, K] for images [B, 3, S, S]."""
        replay = self._replays.get(images.shape)
        if replay is None or not self._can_replay():
            return self._forward(images)  # type: ignore[no-any-return]
        logits = replay(images)
        self._is_between = True
        logits.register_hook(self._backward_comes)
        return logits

    def _can_replay(self) -> bool:
        return self._network.training and torch.is_grad_enabled() and not self._is_between

    def _backward_comes(self, gradient: Tensor) -> None:
        self._is_between = False


def replay_on_gpu(
    networks: Sequence[nn.Module],
    batch_sizes: Iterable[int],
    runtime: Runtime,
    prepared: Preprocessing,
) -> str | None:
    """Let networks in train mode replay their passes for batches of these sizes.

    Returns why not, with the networks as they were, if the GPU cannot capture them. Nothing else
    may use it meanwhile.
    """
    captured: list[ReplayedForward] = []
    try:
        for network in networks:
            captured.append(
                ReplayedForward(network, _capture(network, batch_sizes, runtime, prepared))
            )
    except (RuntimeError, AssertionError) as error:  # these torch raises, out of memory too
        return str(error).strip().split("\n")[0]
    finally:
        torch.cuda.empty_cache()  # of the passes before capturing
    for network, forward in zip(networks, captured, strict=True):
        network.forward = forward
    return None


def _capture(
    network: nn.Module, batch_sizes: Iterable[int], runtime: Runtime, prepared: Preprocessing
) -> dict[torch.Size, Forward]:
    """Return for every shape what replays the passes; statistics of BatchNorm stay as they are."""
    before = [buffer.clone() for buffer in network.buffers()]
    pool = torch.cuda.graph_pool_handle()  # of one pass after the other, never of two at once
    replays: dict[torch.Size, Forward] = {}
    try:
        for size in batch_sizes:
            images = blank_images(size, runtime, prepared)
            with runtime.autocast(cached=False):
                made: Any = torch.cuda.make_graphed_callables(
                    network, (images,), allow_unused_input=True, pool=pool
                )
            replays[images.shape] = made.forward
            del network.forward  # the class's own again
    finally:
        network.__dict__.pop("forward", None)
        for buffer, saved in zip(network.buffers(), before, strict=True):
            buffer.copy_(saved)
    return replays
