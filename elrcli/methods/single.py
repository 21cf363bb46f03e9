"""One network trained with ELR or, with a weight of zero, plain cross-entropy."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from elrcli.methods.elr import ELRLoss, clamped_softmax, elr_term


class StepResult(NamedTuple):
    """What one training step gives back."""

    loss: Tensor  # scalar with gradient
    cross_entropy: Tensor  # scalar, detached
    elr_term: Tensor  # scalar, detached, weighted by lambda
    probs: Tensor  # [B, K] prediction for the unmixed images, detached: the evidence
    held_out: Tensor | None = None  # [B, K] prediction without training on the images, detached


class Method(nn.Module):
    """What the training loop knows of a method: one loss, and who predicts."""

    def __init__(self, loss: ELRLoss) -> None:
        super().__init__()
        self.loss = loss

    @property
    def targets(self) -> Tensor:
        """The target table [N, K], one running estimate per manifest row."""
        return self.loss.targets

    def training_step(
        self, images: Tensor, labels: Tensor, index: Tensor, generator: torch.Generator
    ) -> StepResult:
        """Return the loss of one batch; images [B, 3, S, S] normalised, labels and index [B]."""
        raise NotImplementedError

    def prediction_network(self) -> nn.Module:
        """Return the module that predicts, whose weights `model.safetensors` holds."""
        raise NotImplementedError

    def after_step(self) -> None:
        """Follow an optimiser step, for weight averages."""

    def observe(self, probs: Tensor, index: Tensor) -> None:
        """Move the targets of rows that training does not touch by predictions [B, K]."""
        self.loss.update_targets(probs, index)

    def predict(self, images: Tensor) -> Tensor:
        """Return logits [B, K] of the network that predicts, in eval mode without gradient."""
        return judge(self.prediction_network(), images)


class SingleNetwork(Method):
    """One network, one target table; optionally a weight average and mixup.

    The prediction that moves the target is the training prediction itself. With a weight
    average it is the average's, with mixup the one for the unmixed images (section 4.3 of the
    paper).
    """

    def __init__(
        self,
        network: nn.Module,
        loss: ELRLoss,
        *,
        ema_decay: float | None = None,
        mixup_alpha: float | None = None,
    ) -> None:
        super().__init__(loss)
        self.network = network
        self.average = None if ema_decay is None else WeightAverage(network, ema_decay)
        self.mixup_alpha = mixup_alpha

    def training_step(
        self, images: Tensor, labels: Tensor, index: Tensor, generator: torch.Generator
    ) -> StepResult:
        """Return the loss of one batch, see `Method`."""
        if self.mixup_alpha is None:
            logits = self.network(images)
            reference = logits if self.average is None else self.predict(images)
            targets = self.loss.update_targets(clamped_softmax(reference), index)
            cross_entropy = functional.cross_entropy(logits.float(), labels)
        else:
            share, partner = draw_mixup(len(images), self.mixup_alpha, generator)
            if images.is_cuda:
                partner = partner.pin_memory()  # the copy must not wait for the device
            partner = partner.to(images.device, non_blocking=True)
            reference = self.predict(images)
            logits = self.network(share * images + (1 - share) * images[partner])
            targets = self.loss.update_targets(clamped_softmax(reference), index)
            targets = share * targets + (1 - share) * targets[partner]
            cross_entropy = share * functional.cross_entropy(logits.float(), labels)
            cross_entropy += (1 - share) * functional.cross_entropy(logits.float(), labels[partner])
        loss = cross_entropy
        weighted = torch.zeros_like(cross_entropy)
        if self.loss.lam > 0:
            weighted = self.loss.lam * elr_term(clamped_softmax(logits), targets)
            loss = cross_entropy + weighted
        return StepResult(
            loss,
            cross_entropy.detach(),
            weighted.detach(),
            reference.detach().float().softmax(dim=1),
        )

    def after_step(self) -> None:
        """Move the weight average, if there is one."""
        if self.average is not None:
            self.average.update(self.network)

    def prediction_network(self) -> nn.Module:
        """Return the weight average, or the network where there is none."""
        return self.network if self.average is None else self.average.network


@torch.no_grad()
def judge(network: nn.Module, images: Tensor) -> Tensor:
    """Return logits [B, K] in eval mode without gradient; every part keeps its own mode."""
    was_training = {module: module.training for module in network.modules()}
    network.eval()
    logits: Tensor = network(images)
    for module, training in was_training.items():
        module.training = training
    return logits


class WeightAverage(nn.Module):
    """Exponential moving average of a network's weights and BatchNorm statistics.

    The decay grows as `1 - 1 / (step + 1)` up to `decay`, so early averages are not held
    back by the starting weights.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
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
        decay = min(1 - 1 / (self.steps_done + 1), self.decay)
        self.steps_done += 1
        pairs = zip(self.network.state_dict().values(), network.state_dict().values(), strict=True)
        for average, current in pairs:
            if average.dtype.is_floating_point:
                average.lerp_(current, 1 - decay)
            else:
                average.copy_(current)


def draw_mixup(size: int, alpha: float, generator: torch.Generator) -> tuple[float, Tensor]:
    """Return the share in [0.5, 1] of the first image and its partners, a permutation [B]."""
    concentration = torch.tensor([alpha, alpha], dtype=torch.float64)
    gamma = torch._standard_gamma(concentration, generator=generator)
    share = float(gamma[0] / gamma.sum())
    return max(share, 1 - share), torch.randperm(size, generator=generator)
