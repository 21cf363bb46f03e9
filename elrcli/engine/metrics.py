"""The figures of one epoch. Everything is summed on the device and read once at the end.

Each process counts its own samples; the figures are those of all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from elrcli.engine.distributed import Group
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
ALONE = Group()


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
        asked = time.monotonic()
        for item in items:
            self.seconds_waiting += time.monotonic() - asked
            yield item
            self.seconds += time.monotonic() - asked
            asked = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """Return the sums of this process, for a checkpoint in the middle of an epoch."""
        return {
            "sums": self._sums.cpu(),
            "images": self.images,
            "seconds": self.seconds,
            "seconds_waiting": self.seconds_waiting,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._sums.copy_(state["sums"])
        self.images = int(state["images"])
        self.seconds = float(state["seconds"])
        self.seconds_waiting = float(state["seconds_waiting"])

    def of_all(self, group: Group) -> EpochTotals:
        """Return the sums over all processes and their mean times."""
        own = (*self._sums.tolist(), self.images, self.seconds, self.seconds_waiting)
        *sums, images, seconds, waiting = group.sum(torch.tensor(own, dtype=torch.float64)).tolist()
        totals = EpochTotals(torch.device("cpu"))
        totals._sums = torch.tensor(sums, dtype=torch.float64)
        totals.images = int(images)
        totals.seconds = seconds / group.processes
        totals.seconds_waiting = waiting / group.processes
        return totals

    def losses(self) -> tuple[float, float, float]:
        """Return the means per image: loss, cross-entropy, ELR term."""
        cross_entropy, elr_term = (self._sums / max(self.images, 1)).tolist()
        return cross_entropy + elr_term, cross_entropy, elr_term


def loss_metrics(totals: EpochTotals) -> dict[str, float]:
    """Return losses and speed; raises Diverged if the loss is not a finite number."""
    loss, cross_entropy, elr_term = totals.losses()
    if not math.isfinite(loss):
        raise Diverged(f"the loss became {loss}")
    return {
        "loss": loss,
        "loss_ce": cross_entropy,
        "loss_elr": elr_term,
        "images_per_second": totals.images / max(totals.seconds, 1e-9),
        "wait_share": totals.seconds_waiting / max(totals.seconds, 1e-9),
    }


class Diverged(TrainingError):
    """Numbers that training cannot go on from; the message says which, without advice."""


def agreement_metrics(
    predicted: Tensor, before: Tensor, target: Tensor, labels: Tensor, group: Group = ALONE
) -> dict[str, float]:
    """Return what shows memorisation without true labels, over training rows.

    predicted, before [n] classes now and an epoch ago, -1 unknown; target [n] classes of the
    largest targets; labels [n].
    """
    seen = predicted >= 0
    both = seen & (before >= 0)
    return _shares(
        {
            "train_agreement": (predicted == labels, seen),
            "target_agreement": (target == labels, seen),
            "changed": (predicted != before, both),
        },
        group,
    )


def memorisation_metrics(
    predicted: Tensor, labels: Tensor, truth: Tensor, group: Group = ALONE
) -> dict[str, float]:
    """Return the shares of Figure 1 of the paper over training rows, each in [0, 1].

    predicted [n] classes, -1 unknown; labels [n] as given; truth [n].
    """
    seen = predicted >= 0
    clean = seen & (labels == truth)
    wrong = seen & (labels != truth)
    right, memorised = predicted == truth, predicted == labels
    return _shares(
        {
            "clean_right": (right, clean),
            "clean_other": (~right, clean),
            "wrong_right": (right, wrong),
            "wrong_memorised": (memorised, wrong),
            "wrong_other": (~right & ~memorised, wrong),
        },
        group,
    )


def held_out_metrics(
    split: str,
    predicted: Tensor,
    given_prob: Tensor,
    labels: Tensor,
    truth: Tensor | None,
    group: Group = ALONE,
) -> dict[str, float]:
    """Return agreement with the given labels, and accuracy where the true ones are known.

    predicted [n] classes, -1 unknown; given_prob [n] probability of the given label, NaN unknown.
    """
    seen = (predicted >= 0) & ~given_prob.isnan()
    parts = {f"{split}_agreement": (predicted == labels, seen)}
    if split == "val":
        parts["val_loss"] = (-given_prob.float().clamp_min(1e-7).log(), seen)
    if truth is not None:
        parts[f"{split}_accuracy_true"] = (predicted == truth, seen)
    return _shares(parts, group)


def _shares(parts: Mapping[str, tuple[Tensor, Tensor]], group: Group) -> dict[str, float]:
    """Return for each (values [n], among [n] bool) the mean over all processes, if of anything."""
    own = [torch.stack((values[among].sum(), among.sum())) for values, among in parts.values()]
    sums = group.sum(torch.stack(own)).tolist()
    return {name: total / count for name, (total, count) in zip(parts, sums, strict=True) if count}
