"""The optimiser of a training, and how it takes up a saved state."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from elrcli.config import TrainConfig
from elrcli.models import parameter_groups

FUSED = ("cuda", "cpu")  # devices whose fused steps can be told to leave themselves out


def build_optimizer(
    config: TrainConfig, network: nn.Module, device: torch.device
) -> torch.optim.Optimizer:
    """Return the optimiser that `config` names, for a network on the device."""
    assert config.weight_decay is not None
    groups = parameter_groups(
        network,
        weight_decay=config.weight_decay,
        layer_decay=config.layer_decay,
        head_lr_scale=config.head_lr_scale,
    )
    fused = device.type in FUSED
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=fused)
    sgd = torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=fused)
    for group in sgd.param_groups:
        for parameter in group["params"]:
            # A fused first step that leaves itself out would leave this memory as it found it.
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[int, Any]) -> None:
    """Give the optimiser its saved state; the groups' settings are those of the run."""
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
    for parameter, entries in optimizer.state.items():
        for name, value in entries.items():
            if value.shape == parameter.shape:
                # Fused steps walk through memory in order: the state must lie as its weight.
                entries[name] = torch.empty_like(parameter).copy_(value)
            elif value.dim() > 0:
                raise ValueError(f"optimiser state {name} has shape {tuple(value.shape)}")
