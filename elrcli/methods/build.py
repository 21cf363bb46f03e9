"""From settings to a method."""

from __future__ import annotations

from torch import nn

from elrcli.config import TrainConfig
from elrcli.methods.elr import ELRLoss
from elrcli.methods.single import SingleNetwork


def build_method(
    config: TrainConfig, network: nn.Module, num_samples: int, num_classes: int
) -> SingleNetwork:
    """Return the method that `config.method` names, around `network`.

    Cross-entropy is ELR without its term: it keeps targets too, so both can be compared.
    """
    lam = config.lam if config.method == "elr" else 0.0
    return SingleNetwork(
        network,
        ELRLoss(num_samples, num_classes, lam=lam, beta=config.beta),
        ema_decay=config.ema_decay if config.ema else None,
        mixup_alpha=config.mixup_alpha if config.mixup else None,
    )
