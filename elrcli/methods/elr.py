"""Early-Learning Regularization (Liu et al., NeurIPS 2020), the loss and its target table."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from elrcli.methods.table import SampleTables

PROBABILITY_FLOOR = 1e-4


class ELRLoss(SampleTables):
    """Cross-entropy plus the early-learning regulariser; keeps one target row per sample.

    `targets` [N, K] is a buffer: it is part of `state_dict` and follows `.to(device)`.
    A row starts at zero ("never seen") and sums to `1 - beta ** visits` afterwards. For many
    samples or classes `table` can be fp16 or top-k and `on_host` keeps it off the device, see
    `SampleTables`. Raises ValueError for a value out of range.
    """

    per_sample = ("targets", "targets_classes")  # buffers with one row per sample
    targets: Tensor

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        *,
        lam: float = 3.0,
        beta: float = 0.7,
        table: str = "fp32",
        on_host: bool = False,
    ) -> None:
        if not (lam >= 0 and 0 <= beta < 1):
            raise ValueError(f"lam={lam}, beta={beta}: expected lam >= 0 and 0 <= beta < 1")
        super().__init__(num_classes, table, on_host)
        self.lam = lam
        self.beta = beta
        self.add_table("targets", num_samples)

    def forward(self, logits: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        """Return the ELR loss of one batch and move its target rows.

        logits [B, K], labels [B] int64, index [B] int64 sample rows without repeats -> scalar,
        negative values are normal. Liu et al. 2020, eq. 6. Raises ValueError for logits of another
        number of classes.
        """
        if logits.shape[1:] != (self.num_classes,):
            raise ValueError(f"logits {tuple(logits.shape)}: expected [B, {self.num_classes}]")
        probs = clamped_softmax(logits)
        targets = self.update_targets(probs, index)
        cross_entropy = functional.cross_entropy(_at_least_fp32(logits), labels)
        return cross_entropy + self.lam * elr_term(probs, targets)

    @torch.no_grad()
    def update_targets(self, probs: Tensor, index: Tensor) -> Tensor:
        """Move the target rows of a batch towards `probs` and return them.

        probs [B, K] in [0, 1], index [B] -> targets [B, K] without gradient. Eq. 9.
        """
        normalised = probs / probs.sum(dim=1, keepdim=True)
        rows = self.read("targets", index).to(probs.dtype)
        rows.lerp_(normalised, 1 - self.beta)  # beta * rows + (1 - beta) * normalised
        self.write("targets", index, rows)
        return rows

    def extra_repr(self) -> str:
        """Describe the loss in `print(loss_fn)`."""
        size = f"{len(self.targets)} samples, {self.num_classes} classes"
        return f"{size}, lam={self.lam}, beta={self.beta}"


def clamped_softmax(logits: Tensor) -> Tensor:
    """Return softmax(logits) within [1e-4, 1 - 1e-4], logits [B, K] -> [B, K].

    Computed in fp32 at least, also under autocast: half precision rounds 1 - 1e-4 to 1.
    """
    return clamped(_at_least_fp32(logits).softmax(dim=1))


def clamped(probs: Tensor) -> Tensor:
    """Return probabilities within [1e-4, 1 - 1e-4], any shape."""
    return probs.clamp(PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)


def elr_term(probs: Tensor, targets: Tensor) -> Tensor:
    """Return mean_i log(1 - <p_i, t_i>), probs and targets [B, K] -> scalar <= 0."""
    return torch.log(1 - (probs * targets).sum(dim=1)).mean()


def _at_least_fp32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
