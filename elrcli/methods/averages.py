"""Averages of weights, and ramps over steps."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn


def ramp(step: int, steps: int) -> float:
    """Return exp(-5 (1 - step / steps)^2): from 0.007 at step 0 to 1 at `steps` and after.

    1 at every step where `steps` is 0.
    """
    return math.exp(-5 * (1 - min(step, steps) / steps) ** 2) if steps > 0 else 1.0


class WeightAverage(nn.Module):
    """Exponential moving average of a network's weights and BatchNorm statistics.

    At step s the decay is `min(1 - 1 / (s + 1), decay)`, so early averages are not held back by
    the starting weights; with `ramp_steps` it is `decay * ramp(s + 1, ramp_steps)`.
    """

    def __init__(self, network: nn.Module, decay: float, ramp_steps: int = 0) -> None:
        super().__init__()
        self.decay = decay
        self.ramp_steps = ramp_steps
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        self.steps_done = 0

    def train(self, mode: bool = True) -> WeightAverage:
        """Stay in eval mode: the average never learns by itself."""
        return super().train(False)

    def get_extra_state(self) -> Tensor:
        """Return the number of updates, for `state_dict`."""
        return torch.tensor(self.steps_done)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the number of updates from `state_dict`."""
        self.steps_done = int(state)

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Move every tensor towards its twin in `network`."""
        if self.ramp_steps > 0:
            decay = self.decay * ramp(self.steps_done + 1, self.ramp_steps)
        else:
            decay = min(1 - 1 / (self.steps_done + 1), self.decay)
        self.steps_done += 1
        averages, news = self.network.state_dict().values(), network.state_dict().values()
        pairs = list(zip(averages, news, strict=True))
        moving = [pair for pair in pairs if pair[0].dtype.is_floating_point]
        torch._foreach_lerp_([old for old, _ in moving], [new for _, new in moving], 1 - decay)
        for average, current in pairs:
            if not average.dtype.is_floating_point:
                average.copy_(current)
