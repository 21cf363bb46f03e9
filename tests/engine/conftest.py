from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elrcli.config import TrainConfig
from elrcli.engine.fit import fit
from elrcli.engine.observer import Observer
from elrcli.run import RunFolder
from tests.shapes import write_shapes

TINY: dict[str, Any] = {
    "backbone": "test_resnet",
    "pretrained": False,
    "image_size": 32,
    "epochs": 2,
    "batch_size": 8,
    "optimizer": "sgd",
    "workers": 0,
    "device": "cpu",
}


@pytest.fixture(autouse=True)
def _quick_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than training here. Only `shared_run` has its curves drawn."""
    monkeypatch.setattr("elrcli.plots.curves_svg", lambda rows: f"{len(rows)} epochs")


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of 3 classes. Shared: leave as it is."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(folder)
    return folder


@pytest.fixture
def train(shapes: Path, tmp_path: Path) -> Callable[..., RunFolder]:
    """Train a tiny network for two epochs; keywords change the settings."""

    def call(
        name: str = "run",
        *,
        overwrite: bool = False,
        observer: Observer | None = None,
        **settings: object,
    ) -> RunFolder:
        config = TrainConfig(**{"data": shapes, **TINY, **settings})
        return fit(config, tmp_path / name, overwrite=overwrite, observer=observer)

    return call


@pytest.fixture(scope="session")
def shared_run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run with the settings of `train`. Shared: leave as it is."""
    out = tmp_path_factory.mktemp("shared") / "run"
    return fit(TrainConfig(**{"data": shapes, **TINY}), out)


@pytest.fixture
def run_copy(shared_run: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of the finished run to damage."""
    shutil.copytree(shared_run.path, tmp_path / "copy")
    return RunFolder(tmp_path / "copy")
