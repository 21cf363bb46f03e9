"""One network trained with a loss of the labels and, with a weight above zero, the ELR term."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from elrcli.methods.averages import WeightAverage
from elrcli.methods.base import OneTable, StepResult
from elrcli.methods.elr import ELRLoss, clamped, clamped_softmax, elr_term
from elrcli.methods.label_losses import LabelLoss, cross_entropy
from elrcli.methods.mixup import Mixup


class SingleNetwork(OneTable):
    """One network, one target table; optionally a weight average and mixup.

    The prediction that moves the target is the training prediction itself. With a weight
    average it is the average's, with mixup the one for the unmixed images (section 4.3 of the
    paper). `weigh_labels` weighs mixed labels by the targets.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: ELRLoss,
        *,
        label_loss: LabelLoss = cross_entropy,
        lam_ramp: int = 0,
        average: WeightAverage | None = None,
        mixup_alpha: float | None = None,
        weigh_labels: bool = False,
    ) -> None:
        super().__init__(loss, lam_ramp)
        self.network = network
        self.label_loss = label_loss
        self.average = average
        self.mixup_alpha = mixup_alpha
        self.weigh_labels = weigh_labels

    def training_step(
        self,
        images: Tensor,
        labels: Tensor,
        index: Tensor,
        generator: torch.Generator,
        reference: Tensor | None = None,
    ) -> StepResult:
        """Return the loss of one batch, see `Method`.

        `reference` are logits [B, K] of another network for the unmixed images: then they move
        the targets.
        """
        mixup = None
        if self.mixup_alpha is not None:
            mixup = Mixup.draw(len(images), self.mixup_alpha, generator, images.device)
        if reference is None and (mixup is not None or self.average is not None):
            reference = self.predict(images)
        logits = self.network(images if mixup is None else mixup.mix(images))
        if reference is None:
            probs = logits.detach().float().softmax(dim=1)
            targets = self.loss.update_targets(clamped(probs), index)
        else:  # ELR+ moves the targets by the whole prediction
            probs = reference.float().softmax(dim=1)
            targets = self.loss.update_targets(probs, index)
        if mixup is None:
            label_loss = self.label_loss(logits, labels, index).mean()
        else:
            targets = mixup.mix(targets)
            share = mixup.label_share(labels, targets) if self.weigh_labels else mixup.share
            losses = share * self.label_loss(logits, labels, index)
            losses += (1 - share) * self.label_loss(logits, labels[mixup.partner], index)
            label_loss = losses.mean()
        loss = label_loss
        weighted = torch.zeros_like(label_loss)
        if self.loss.lam > 0:
            weighted = self.lam * elr_term(clamped_softmax(logits), targets)
            loss = label_loss + weighted
        return StepResult(loss, label_loss.detach(), weighted.detach(), probs)

    def after_step(self) -> None:
        """Count the step and move the weight average, if there is one."""
        super().after_step()
        if self.average is not None:
            self.average.update(self.network)

    def prediction_network(self) -> nn.Module:
        """Return the weight average, or the network where there is none."""
        return self.network if self.average is None else self.average.network
