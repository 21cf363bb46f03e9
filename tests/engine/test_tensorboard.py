from __future__ import annotations

import builtins
from collections.abc import Mapping
from typing import Any

import pytest

from elrcli.engine.observer import Observer, TrainingPlan
from elrcli.errors import ConfigError

STAGES = ("val", "epoch 1/2", "epoch 2/2", "features")


class Listener(Observer):
    def __init__(self) -> None:
        self.heard: list[object] = []

    def note(self, message: str) -> None:
        self.heard.append(message)

    def training_started(self, plan: TrainingPlan) -> None:
        self.heard.append(plan.epochs)

    def progress(self, stage: str, done: int, total: int | None) -> None:
        self.heard.append(stage)

    def epoch_finished(self, metrics: Mapping[str, float]) -> None:
        self.heard.append(metrics["epoch"])


def test_every_metric_becomes_an_event(train):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    listener = Listener()
    run = train(tensorboard=True, observer=listener)
    events = EventAccumulator(str(run.tensorboard_folder))
    events.Reload()
    first, last = run.metrics()
    assert set(events.Tags()["scalars"]) == {
        name for name, value in last.items() if value is not None
    }
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    found = [event.value for event in events.Scalars("val_agreement")]
    assert found == pytest.approx([first["val_agreement"], last["val_agreement"]], rel=1e-5)
    assert [item for item in listener.heard if item not in STAGES] == [
        2,
        1,
        2,
    ]


def test_a_missing_package_is_named_before_training(train, monkeypatch, tmp_path):
    original = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("torch.utils.tensorboard"):
            raise ModuleNotFoundError("No module named 'tensorboard'")
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"pip install 'elr\[tensorboard\]'"):
        train(tensorboard=True)
    assert not (tmp_path / "run").exists()
