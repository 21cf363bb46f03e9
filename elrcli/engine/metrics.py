"""The figures of one epoch. Everything is summed on the device and read once at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor

from elrcli.errors import TrainingError
from elrcli.methods.base import StepResult

METRIC_COLUMNS = (
    "epoch",
    "lr",
    "loss",
    "loss_ce",
    "loss_elr",
    "train_agreement",
    "target_agreement",
    "changed",
    "val_loss",
    "val_agreement",
    "clean_right",
    "clean_other",
    "wrong_right",
    "wrong_memorised",
    "wrong_other",
    "val_accuracy_true",
    "test_agreement",
    "test_accuracy_true",
    "images_per_second",
    "wait_share",
    "seconds",
)

Item = TypeVar("Item")


class EpochTotals:
    """Sums of the losses over the images of one epoch, and the time its loop spent."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, device=device)  # cross-entropy, ELR term
        self.images = 0
        self.seconds = 0.0
        self.seconds_waiting = 0.0

    def add(self, step: StepResult, images: int) -> None:
        """Add the losses of one batch."""
        losses = torch.stack((step.cross_entropy, step.elr_term))
        self._sums += losses * images
        self.images += images

    def time_waiting(self, items: Iterator[Item]) -> Iterator[Item]:
        """Pass items on and measure how long each had to be waited for."""
        started = asked = time.monotonic()
        for item in items:
            self.seconds_waiting += time.monotonic() - asked
            yield item
            asked = time.monotonic()
        self.seconds = time.monotonic() - started

    def losses(self) -> tuple[float, float, float]:
        """Return the means per image: loss, cross-entropy, ELR term."""
        cross_entropy, elr_term = (self._sums / max(self.images, 1)).tolist()
        return cross_entropy + elr_term, cross_entropy, elr_term


def loss_metrics(totals: EpochTotals) -> dict[str, float]:
    """Return losses and speed; raises TrainingError if the loss is not a finite number."""
    loss, cross_entropy, elr_term = totals.losses()
    if not math.isfinite(loss):
        raise diverged(f"the loss became {loss}")
    return {
        "loss": loss,
        "loss_ce": cross_entropy,
        "loss_elr": elr_term,
        "images_per_second": totals.images / max(totals.seconds, 1e-9),
        "wait_share": totals.seconds_waiting / max(totals.seconds, 1e-9),
    }


def diverged(what: str) -> TrainingError:
    """Return the error for numbers that training cannot go on from."""
    return TrainingError(
        f"{what}. Lower --lr, or add --clip-grad 1; the state before this epoch is saved."
    )


def agreement_metrics(
    predicted: Tensor, before: Tensor, targets: Tensor, labels: Tensor
) -> dict[str, float]:
    """Return what shows memorisation without true labels, over training rows.

    predicted, before [n] classes now and an epoch ago, -1 unknown; targets [n, K]; labels [n].
    """
    seen = predicted >= 0
    both = seen & (before >= 0)
    return {
        "train_agreement": _share(predicted == labels, seen),
        "target_agreement": _share(targets.argmax(dim=1) == labels, seen),
        **({"changed": _share(predicted != before, both)} if bool(both.any()) else {}),
    }


def memorisation_metrics(predicted: Tensor, labels: Tensor, truth: Tensor) -> dict[str, float]:
    """Return the shares of Figure 1 of the paper over training rows, each in [0, 1].

    predicted [n] classes, -1 unknown; labels [n] as given; truth [n].
    """
    seen = predicted >= 0
    clean = seen & (labels == truth)
    wrong = seen & (labels != truth)
    shares: dict[str, float] = {}
    if bool(clean.any()):
        right = _share(predicted == truth, clean)
        shares |= {"clean_right": right, "clean_other": 1 - right}
    if bool(wrong.any()):
        right, memorised = _share(predicted == truth, wrong), _share(predicted == labels, wrong)
        shares |= {
            "wrong_right": right,
            "wrong_memorised": memorised,
            "wrong_other": 1 - right - memorised,
        }
    return shares


def held_out_metrics(
    split: str, predicted: Tensor, given_prob: Tensor, labels: Tensor, truth: Tensor | None
) -> dict[str, float]:
    """Return agreement with the given labels, and accuracy where the true ones are known.

    predicted [n] classes, -1 unknown; given_prob [n] probability of the given label, NaN unknown.
    """
    seen = (predicted >= 0) & ~given_prob.isnan()
    if not bool(seen.any()):
        return {}
    metrics = {f"{split}_agreement": _share(predicted == labels, seen)}
    if split == "val":
        metrics["val_loss"] = float(-given_prob[seen].float().clamp_min(1e-7).log().mean())
    if truth is not None:
        metrics[f"{split}_accuracy_true"] = _share(predicted == truth, seen)
    return metrics


def _share(hits: Tensor, among: Tensor) -> float:
    return float((hits & among).sum() / among.sum().clamp_min(1))
