"""How tensors of the host come to the device."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on the device; a CUDA GPU is not waited for.

    Others are: they may still read memory of the host that is somebody else's by then.
    """
    return tensor.to(device, non_blocking=device.type == "cuda")


def sent_pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Do as `sent` with a tensor in memory from which a copy to a CUDA GPU would wait."""
    return sent(tensor.pin_memory() if device.type == "cuda" else tensor, device)
