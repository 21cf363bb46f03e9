"""From settings to a method."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from elrcli.config import TrainConfig
from elrcli.methods.elr import ELRLoss
from elrcli.methods.halves import TwoHalves, draw_halves
from elrcli.methods.single import Method, SingleNetwork


def build_method(
    config: TrainConfig,
    network: nn.Module,
    parts: Sequence[nn.Module],
    labels: np.ndarray,
    trained: np.ndarray,
    num_classes: int,
) -> Method:
    """Return the method that `config.method` names.

    `network` predicts; its `parts` are the networks that it is an ensemble of, or itself.
    labels [N] as given, trained [T] the rows to train on.

    Cross-entropy is ELR without its term: it keeps targets too, so both can be compared.
    """
    lam = 0.0 if config.method == "ce" else config.lam
    loss = ELRLoss(len(labels), num_classes, lam=lam, beta=config.beta)
    if config.method == "elr-halves":
        owner = np.zeros(len(labels), dtype=np.int64)
        owner[trained] = draw_halves(labels[trained], config.seed)
        return TwoHalves(network, parts, loss, torch.from_numpy(owner))
    return SingleNetwork(
        network,
        loss,
        ema_decay=config.ema_decay if config.ema else None,
        mixup_alpha=config.mixup_alpha if config.mixup else None,
    )
