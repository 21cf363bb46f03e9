"""Networks whose passes a GPU replays as CUDA graphs.

A small network on small images leaves the GPU idle: the host cannot start its hundreds of kernels
fast enough. Replaying starts them all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from elrcli.engine.device import Runtime, blank_images
from elrcli.errors import first_line
from elrcli.methods.base import modes_kept
from elrcli.models import Preprocessing

WARM_UP = 3  # passes before a capture: libraries choose their kernels and allocate what they keep
Forward = Callable[[Tensor], Tensor]  # images [B, 3, S, S] -> logits [B, K]


class ReplayedForward:
    """A network's forward, replayed for batches whose passes were captured.

    In train mode with gradient, `learning` answers, in eval mode without, `judging`; for other
    shapes and in other modes the network itself. The gradients of one replay lie where those of
    the next will: no second forward is replayed before backward came through.
    """

    def __init__(
        self,
        network: nn.Module,
        learning: dict[torch.Size, Forward],
        judging: dict[torch.Size, Forward],
    ) -> None:
        self._network = network
        self._forward = network.forward
        self._learning = learning
        self._judging = judging
        self._is_between = False  # forward was replayed, backward not yet

    def __call__(self, images: Tensor) -> Tensor:
        """Return logits [B, K] for images [B, 3, S, S]."""
        learns = self._network.training
        replay = (self._learning if learns else self._judging).get(images.shape)
        if replay is None or learns != torch.is_grad_enabled() or (learns and self._is_between):
            return self._forward(images)  # type: ignore[no-any-return]
        logits = replay(images)
        if learns:
            self._is_between = True
            logits.register_hook(self._backward_comes)
        return logits

    def _backward_comes(self, gradient: Tensor) -> None:
        self._is_between = False


class _Memory(NamedTuple):
    """Where captured passes work: the first arguments of `torch.cuda.graph` after the graph."""

    pool: Any
    stream: torch.cuda.Stream


class _LearningPasses:
    """Forward and backward for one shape of images; backward sets the gradients of the weights.

    They stay where they are until the next replay: an optimiser step must come between.
    """

    def __init__(
        self, network: nn.Module, images: Tensor, runtime: Runtime, memory: _Memory
    ) -> None:
        self._learned = [p for p in network.parameters() if p.requires_grad]
        self._images = images
        self._start = torch.ones((), device=images.device, requires_grad=True)

        def forward() -> Tensor:
            with runtime.autocast(cached=False):  # a cached copy of a weight would not follow it
                return network(images)  # type: ignore[no-any-return]

        def backward(logits: Tensor) -> list[Tensor | None]:
            found = torch.autograd.grad(logits, self._learned, self._gradient, allow_unused=True)
            return [_as_its_weight(g, p) for g, p in zip(found, self._learned, strict=True)]

        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with _beside(memory.stream):
            for _ in range(WARM_UP):
                logits = forward()
                self._gradient = torch.zeros_like(logits)
                backward(logits)
                del logits
            with torch.cuda.graph(self._forward, *memory):
                logits = forward()
            with torch.cuda.graph(self._backward, *memory):
                self._gradients = backward(logits)
        self._logits = logits.detach()  # without what led to it, which would stay in memory

    def __call__(self, images: Tensor) -> Tensor:
        logits: Tensor = _Learning.apply(self, images, self._start)
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Replay forward."""
        self._images.copy_(images)
        self._forward.replay()
        return self._logits.detach()

    def backward(self, gradient: Tensor) -> None:
        """Replay backward for the gradient of the logits [B, K]."""
        self._gradient.copy_(gradient)
        self._backward.replay()
        for parameter, found in zip(self._learned, self._gradients, strict=True):
            if parameter.grad is None:
                parameter.grad = found
            elif found is not None:  # what another pass found
                parameter.grad += found


class _Learning(torch.autograd.Function):
    """Gives backward its place in the graph of the loss; `start` makes the logits need gradient."""

    @staticmethod
    def forward(ctx: Any, passes: _LearningPasses, images: Tensor, start: Tensor) -> Tensor:
        ctx.passes = passes
        return passes.forward(images)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.passes.backward(gradient)
        return None, None, None


class _JudgingPass:
    """Forward without gradient for one shape of images."""

    def __init__(
        self, network: nn.Module, images: Tensor, runtime: Runtime, memory: _Memory
    ) -> None:
        self._images = images

        def forward() -> Tensor:
            with torch.no_grad(), runtime.autocast(cached=False):
                return network(images)  # type: ignore[no-any-return]

        self._graph = torch.cuda.CUDAGraph()
        with _beside(memory.stream):
            for _ in range(WARM_UP):
                forward()
            with torch.cuda.graph(self._graph, *memory):
                self._logits = forward()

    def __call__(self, images: Tensor) -> Tensor:
        self._images.copy_(images)
        self._graph.replay()
        return self._logits.clone()


def _as_its_weight(gradient: Tensor | None, weight: Tensor) -> Tensor | None:
    """Return the gradient in the memory layout that fused optimisers ask for."""
    if gradient is None or gradient.stride() == weight.stride():
        return gradient
    return torch.empty_like(weight).copy_(gradient)


@contextmanager
def _beside(stream: torch.cuda.Stream) -> Iterator[None]:
    """Work in another stream, after what was there before and before what follows."""
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


def replay_on_gpu(
    learning: Sequence[nn.Module],
    judging: Sequence[nn.Module],
    learning_sizes: Collection[int],
    judging_sizes: Collection[int],
    runtime: Runtime,
    prepared: Preprocessing,
) -> str | None:
    """Let networks replay their passes for batches of these sizes.

    `learning` networks are in train mode, as their steps will be; `judging` ones predict in eval
    mode. Returns why not, with the networks as they were, if the GPU cannot capture them. Nothing
    else may use it meanwhile.
    """
    stream = torch.cuda.Stream(runtime.device)  # memory of a pool is shared within one alone
    judging_memory = _Memory(torch.cuda.graph_pool_handle(), stream)  # these come one at a time
    captured: dict[nn.Module, ReplayedForward] = {}
    try:
        for network in dict.fromkeys([*learning, *judging]):
            # Between forward and backward of one network another's may come: a memory for each.
            memory = _Memory(torch.cuda.graph_pool_handle(), stream)
            before = [buffer.clone() for buffer in network.buffers()]
            passes: tuple[dict[torch.Size, Forward], ...] = {}, {}
            try:
                with modes_kept(network):
                    if network in learning:
                        for size in learning_sizes:
                            images = blank_images(size, runtime, prepared)
                            passes[0][images.shape] = _LearningPasses(
                                network, images, runtime, memory
                            )
                    network.eval()
                    if network in judging:
                        for size in judging_sizes:
                            images = blank_images(size, runtime, prepared)
                            passes[1][images.shape] = _JudgingPass(
                                network, images, runtime, judging_memory
                            )
            finally:
                for buffer, saved in zip(network.buffers(), before, strict=True):
                    buffer.copy_(saved)
            captured[network] = ReplayedForward(network, *passes)
    except RuntimeError as error:  # of whatever cannot be captured, and out of memory
        return first_line(error)
    finally:
        torch.cuda.empty_cache()  # of the passes before capturing
    for network, forward in captured.items():
        network.forward = forward
    return None


def compute_again(networks: Iterable[nn.Module]) -> None:
    """End the replays, whose memory is free again: forward hooks are called only without."""
    for network in networks:
        if isinstance(network.forward, ReplayedForward):
            del network.forward
