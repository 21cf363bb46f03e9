"""What long work tells whoever watches it. The library itself never prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingPlan:
    """What a training run is about to do, with every automatic choice made."""

    run: str
    backbone: str
    parameters: int
    method: str
    device: str
    precision: str
    classes: int
    train_images: int
    val_images: int
    test_images: int
    image_size: int
    epochs: int
    first_epoch: int
    batches: int
    batch_size: int
    optimizer: str
    lr: float
    workers: int
    processes: int = 1  # with a batch each


class Observer:
    """Base of all observers: it ignores everything. Override what you want to see."""

    def note(self, message: str) -> None:
        """One line worth knowing."""

    def training_started(self, plan: TrainingPlan) -> None:
        """Called once, before the first step."""

    def progress(self, stage: str, done: int, total: int | None) -> None:
        """`done` of `total` images of `stage` are through; `total` is None when unknown."""

    def epoch_finished(self, metrics: Mapping[str, float]) -> None:
        """One row of `metrics.csv`."""
