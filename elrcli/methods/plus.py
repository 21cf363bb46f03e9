"""ELR+ (Liu et al., NeurIPS 2020, section 4.3): two networks that make each other's targets."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from elrcli.methods.base import Method, StepResult
from elrcli.methods.single import SingleNetwork


class ELRPlus(Method):
    """Two networks, each with its own weight average, draw of mixup and target table.

    The targets of one follow the weight average of the other. Both learn from the same batch in
    one step, so the activations of both are in memory at once.
    """

    def __init__(self, network: nn.Module, first: SingleNetwork, second: SingleNetwork) -> None:
        super().__init__()
        self.first = first
        self.second = second
        self.ensemble = (network,)  # not as a module: its weights are those of the two

    def target_rows(self, index: Tensor) -> Tensor:
        """Return the mean of both networks' targets, index [B] -> [B, K]."""
        return (self.first.target_rows(index) + self.second.target_rows(index)) / 2

    def training_step(
        self, images: Tensor, labels: Tensor, index: Tensor, generator: torch.Generator
    ) -> StepResult:
        """Return the sum of both losses, see `Method`. The evidence is that of the averages."""
        judged = self.first.predict(images), self.second.predict(images)
        one = self.first.training_step(images, labels, index, generator, judged[1])
        other = self.second.training_step(images, labels, index, generator, judged[0])
        return StepResult(
            one.loss + other.loss,
            (one.cross_entropy + other.cross_entropy) / 2,
            (one.elr_term + other.elr_term) / 2,
            torch.stack(judged).float().mean(dim=0).softmax(dim=1),
        )

    def after_step(self) -> None:
        """Move both weight averages."""
        self.first.after_step()
        self.second.after_step()

    def observe(self, probs: Tensor, index: Tensor) -> None:
        """Move both targets of rows that training does not touch by predictions [B, K]."""
        self.first.observe(probs, index)
        self.second.observe(probs, index)

    def prediction_network(self) -> nn.Module:
        """Return both networks as one: the mean of their logits, not of their averages'."""
        return self.ensemble[0]
