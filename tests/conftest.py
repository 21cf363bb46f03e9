from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.shapes import write_shapes


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _interrupts_arrive() -> None:
    """A shell lets background jobs ignore Ctrl-C, and so would the programs that tests start."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def shapes_folder() -> Callable[..., tuple[Path, dict[str, str]]]:
    """Make `folder/<class>/*.png`: returns the folder and the true class of every path."""

    def make(
        tmp_path: Path,
        per_class: int = 8,
        classes: tuple[str, ...] = ("circle", "square", "triangle"),
        size: int = 32,
        flip_share: float = 0.0,
        seed: int = 0,
    ) -> tuple[Path, dict[str, str]]:
        folder = tmp_path / "shapes"
        return folder, write_shapes(folder, per_class, classes, size, flip_share, seed)

    return make
