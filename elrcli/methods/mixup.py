"""Mixup: training on weighted means of pairs (Zhang et al., ICLR 2018)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from elrcli.methods.sending import sent_pinned


@dataclass(frozen=True, eq=False)
class Mixup:
    """How the rows of one batch are mixed: the share of a row itself, and its partner."""

    share: float  # in [0.5, 1]
    partner: Tensor  # [B] int64, a permutation

    @classmethod
    def draw(
        cls, size: int, alpha: float, generator: torch.Generator, device: torch.device
    ) -> Mixup:
        """Draw a share from Beta(alpha, alpha), folded to at least one half, and partners."""
        concentration = torch.tensor([alpha, alpha], dtype=torch.float64)
        gamma = torch._standard_gamma(concentration, generator=generator)
        share = float(gamma[0] / gamma.sum())
        partner = torch.randperm(size, generator=generator)
        return cls(max(share, 1 - share), sent_pinned(partner, device))

    def mix(self, rows: Tensor) -> Tensor:
        """Return every row mixed with its partner, [B, ...] -> [B, ...]."""
        return self.share * rows + (1 - self.share) * rows[self.partner]

    def label_share(self, labels: Tensor, targets: Tensor) -> Tensor:
        """Return the shares [B] of the first labels when both are weighed by the targets.

        labels [B], mixed targets [B, K]. With mixed labels y this is y q / sum(y q), the labels
        of ELR+ for CIFAR-100.
        """
        first = self.share * targets.gather(1, labels[:, None])[:, 0]
        second = (1 - self.share) * targets.gather(1, labels[self.partner][:, None])[:, 0]
        return first / (first + second)
