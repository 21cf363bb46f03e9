"""Two networks that each train on one half of the data and judge the other half."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from elrcli.methods.base import OneTable, StepResult, judge, modes_kept
from elrcli.methods.elr import ELRLoss, clamped_softmax, elr_term


class TwoHalves(OneTable):
    """ELR on each half by a network of its own; every sample is also judged by the other one.

    Costs one training plus one prediction per image: each image passes one network forward and
    backward, the other one forward. In return every label has a judge that never saw it.
    """

    judges_held_out = True
    takes_whole_batches = False
    per_sample = ("owner",)
    owner: Tensor  # [N] int64, 0 or 1: the network that trains on the sample

    def __init__(
        self,
        network: nn.Module,
        parts: Sequence[nn.Module],
        loss: ELRLoss,
        owner: Tensor,
        lam_ramp: int = 0,
    ) -> None:
        super().__init__(loss, lam_ramp)
        self.network = network  # an ensemble of the two `parts`
        self.parts = tuple(parts)  # not as modules: their weights would be saved twice
        self.register_buffer("owner", owner)

    def training_step(
        self, images: Tensor, labels: Tensor, index: Tensor, generator: torch.Generator
    ) -> StepResult:
        """Return the loss of one batch, see `Method`. Each network has the mean of its own half."""
        owner = self.owner[index]
        loss, cross_entropy, term = torch.zeros(3, device=labels.device).unbind()
        probs = torch.zeros(len(index), self.loss.num_classes, device=labels.device)
        held_out = torch.zeros_like(probs)
        first, second = self.parts
        for number, own, other in ((0, first, second), (1, second, first)):
            part = (owner == number).nonzero()[:, 0]
            if len(part) == 0:
                continue
            logits = _forward(own, images[part])
            predicted = clamped_softmax(logits)
            targets = self.loss.update_targets(predicted.detach(), index[part])
            part_entropy = functional.cross_entropy(logits.float(), labels[part])
            part_term = self.lam * elr_term(predicted, targets)
            loss = loss + part_entropy + part_term
            share = len(part) / len(index)
            cross_entropy = cross_entropy + share * part_entropy.detach()
            term = term + share * part_term.detach()
            probs[part] = logits.detach().float().softmax(dim=1)
            held_out[part] = judge(other, images[part]).float().softmax(dim=1)
        return StepResult(loss, cross_entropy, term, probs, held_out)

    def images_per_network(self, index: Tensor) -> Tensor:
        """Return how many of the rows [B] each of the two networks trains on, [2]."""
        return torch.stack([(self.owner[index] == number).sum() for number in (0, 1)])

    def prediction_network(self) -> nn.Module:
        """Return both networks as one."""
        return self.network


def draw_halves(labels: np.ndarray, seed: int) -> np.ndarray:
    """Return 0 or 1 for every label [N]: two random halves, equal in every class up to one."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    order = shuffled[np.argsort(labels[shuffled], kind="stable")]
    half = np.empty(len(labels), dtype=np.int64)
    half[order] = np.arange(len(labels)) % 2
    return half


def _forward(network: nn.Module, images: Tensor) -> Tensor:
    """Return logits with gradient; BatchNorm of a single image uses its running statistics."""
    with modes_kept(network):
        if len(images) == 1:
            network.eval()
        logits: Tensor = network(images)
    return logits
