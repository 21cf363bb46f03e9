"""What the training loop knows of a method."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from elrcli.methods.averages import ramp
from elrcli.methods.elr import ELRLoss

ROWS_AT_ONCE = 4096


class StepResult(NamedTuple):
    """What one training step gives back."""

    loss: Tensor  # scalar with gradient
    cross_entropy: Tensor  # scalar, detached: the loss of the labels
    elr_term: Tensor  # scalar, detached, weighted by lambda
    probs: Tensor  # [B, K] prediction for the unmixed images, detached: the evidence
    held_out: Tensor | None = None  # [B, K] prediction without training on the images, detached


class Method(nn.Module):
    """One loss, a target for every sample, and who predicts."""

    judges_held_out = False  # whether `StepResult.held_out` is there
    takes_whole_batches = True  # every network learns from all images of a batch at once

    def target_rows(self, index: Tensor) -> Tensor:
        """Return the targets of samples, index [B] -> [B, K]."""
        raise NotImplementedError

    def target_classes(self, index: Tensor) -> Tensor:
        """Return the classes of the largest targets, index [n] of any length -> [n]."""
        parts = index.split(ROWS_AT_ONCE)
        return torch.cat([self.target_rows(part).argmax(dim=1) for part in parts])

    def training_step(
        self, images: Tensor, labels: Tensor, index: Tensor, generator: torch.Generator
    ) -> StepResult:
        """Return the loss of one batch; images [B, 3, S, S] normalised, labels and index [B]."""
        raise NotImplementedError

    def images_per_network(self, index: Tensor) -> Tensor:
        """Return how many of the rows [B] each network learns from: [networks], or [1] for all."""
        return torch.full((1,), len(index), device=index.device)

    def after_step(self) -> None:
        """Follow an optimiser step."""
        raise NotImplementedError

    def observe(self, probs: Tensor, index: Tensor) -> None:
        """Move the targets of rows that training does not touch by predictions [B, K]."""
        raise NotImplementedError

    def prediction_network(self) -> nn.Module:
        """Return the module that predicts, whose weights `model.safetensors` holds."""
        raise NotImplementedError

    def predict(self, images: Tensor) -> Tensor:
        """Return logits [B, K] of the network that predicts, in eval mode without gradient."""
        return judge(self.prediction_network(), images)


class OneTable(Method):
    """A method with one target table, whose lambda may ramp up over the first steps."""

    def __init__(self, loss: ELRLoss, lam_ramp: int = 0) -> None:
        super().__init__()
        self.loss = loss
        self.lam_ramp = lam_ramp
        self.steps_done = 0

    def get_extra_state(self) -> Tensor:
        """Return the number of optimiser steps, for `state_dict`."""
        return torch.tensor(self.steps_done)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the number of optimiser steps from `state_dict`."""
        self.steps_done = int(state)

    def target_rows(self, index: Tensor) -> Tensor:
        """Return the targets of samples, index [B] -> [B, K]."""
        return self.loss.read("targets", index)

    @property
    def lam(self) -> float:
        """The weight of the ELR term in this step."""
        return self.loss.lam * ramp(self.steps_done, self.lam_ramp)

    def after_step(self) -> None:
        """Count the optimiser step."""
        self.steps_done += 1

    def observe(self, probs: Tensor, index: Tensor) -> None:
        """Move the targets of rows that training does not touch by predictions [B, K]."""
        self.loss.update_targets(probs, index)


@torch.no_grad()
def judge(network: nn.Module, images: Tensor) -> Tensor:
    """Return logits [B, K] in eval mode without gradient; every part keeps its own mode."""
    with modes_kept(network):
        network.eval()
        logits: Tensor = network(images)
    return logits


@contextmanager
def modes_kept(network: nn.Module) -> Iterator[None]:
    """Give every part of a network its own mode back, train or eval, whatever happens."""
    was_training = {module: module.training for module in network.modules()}
    try:
        yield
    finally:
        for module, training in was_training.items():
            module.training = training
