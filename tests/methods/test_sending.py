from __future__ import annotations

import pytest
import torch

from elrcli.methods.sending import sent, sent_pinned


class Sent:
    """Stands for a tensor and says how it was copied."""

    def __init__(self, pinned: bool = False) -> None:
        self.pinned = pinned

    def pin_memory(self) -> Sent:
        return Sent(pinned=True)

    def to(self, device: torch.device, *, non_blocking: bool) -> tuple[str, bool, bool]:
        return device.type, non_blocking, self.pinned


@pytest.mark.parametrize("device", ["cpu", "mps", "cuda:1"])
def test_only_a_cuda_gpu_is_not_waited_for(device):
    place = torch.device(device)
    is_gpu = place.type == "cuda"
    assert sent(Sent(), place) == (place.type, is_gpu, False)
    assert sent_pinned(Sent(), place) == (place.type, is_gpu, is_gpu)
