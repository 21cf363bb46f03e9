"""A device with little memory, on any machine."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from elrcli.engine.device import Runtime
from elrcli.models import Preprocessing


def memory_for(monkeypatch: pytest.MonkeyPatch, images: int) -> list[int]:
    """Let no more than so many images be on the device at once.

    Returns a list that grows by the size of every batch that is to be moved there.
    """
    asked: list[int] = []
    normalise = Runtime.normalise

    def limited(self: Runtime, batch: Tensor, preprocessing: Preprocessing) -> Tensor:
        asked.append(len(batch))
        if len(batch) > images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return normalise(self, batch, preprocessing)

    monkeypatch.setattr(Runtime, "normalise", limited)
    return asked
