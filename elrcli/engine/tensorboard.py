"""Epoch metrics as TensorBoard events; needs the extra `tensorboard`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elrcli.engine.observer import Observer, TrainingPlan
from elrcli.errors import ConfigError


def writer_class() -> Any:
    """Return torch's SummaryWriter; raises ConfigError where the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "--tensorboard: the package is missing. Install it: pip install 'elr[tensorboard]'"
        ) from None
    return SummaryWriter


class TensorBoardObserver(Observer):
    """Writes every metric of an epoch and passes everything on to another observer."""

    def __init__(self, folder: Path, inner: Observer) -> None:
        self._writer = writer_class()(str(folder))
        self._inner = inner

    def note(self, message: str) -> None:
        self._inner.note(message)

    def training_started(self, plan: TrainingPlan) -> None:
        self._inner.training_started(plan)

    def progress(self, stage: str, done: int, total: int | None) -> None:
        self._inner.progress(stage, done, total)

    def epoch_finished(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, int(metrics["epoch"]))
        self._writer.flush()
        self._inner.epoch_finished(metrics)
