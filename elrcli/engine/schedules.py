"""The learning rate as a pure function of the step, so a resumed run needs no scheduler state."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Schedule:
    """Shape of the learning rate over a run, as a factor of its peak. Times are in epochs."""

    kind: str
    epochs: int
    warmup: float
    min_factor: float
    milestones: tuple[float, ...]
    step_factor: float
    restart_epochs: float

    def factor(self, epoch: float) -> float:
        """Return the factor in [0, 1] of the step that ends at `epoch`, a time such as 2.5."""
        warmup = min(self.warmup, self.epochs / 4)  # short runs must still learn at full rate
        if epoch < warmup:
            return self.min_factor + (1 - self.min_factor) * epoch / warmup
        if self.kind == "constant":
            return 1.0
        if self.kind == "step":
            times = sorted(m if m >= 1 else m * self.epochs for m in self.milestones)
            return self.step_factor ** bisect.bisect_left(times, epoch)
        elapsed, length = epoch - warmup, self.epochs - warmup
        if self.kind == "restarts":
            length = self.restart_epochs
            elapsed -= length * max(math.ceil(elapsed / length) - 1, 0)  # a cycle has its end
        cosine = 0.5 * (1 + math.cos(math.pi * min(elapsed / length, 1.0)))
        return self.min_factor + (1 - self.min_factor) * cosine


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group its share of `rate`: its `lr_scale`, 1 where it has none."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
