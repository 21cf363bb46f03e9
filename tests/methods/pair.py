"""Two small networks as one, for tests of methods that train two."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CLASSES = 3


class Pair(nn.Module):
    """Two networks with BatchNorm, different in train and eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.networks = nn.ModuleList([network(0), network(1)])

    def forward(self, images: Tensor) -> Tensor:
        return (self.networks[0](images) + self.networks[1](images)) / 2


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, CLASSES)
    )
