"""From settings to a method."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import nn

from elrcli.config import TrainConfig
from elrcli.methods.averages import WeightAverage
from elrcli.methods.base import Method
from elrcli.methods.elr import ELRLoss
from elrcli.methods.halves import TwoHalves, draw_halves
from elrcli.methods.label_losses import (
    LabelLoss,
    OverParameterisation,
    cross_entropy,
    generalised_cross_entropy,
    symmetric_cross_entropy,
)
from elrcli.methods.plus import ELRPlus
from elrcli.methods.single import SingleNetwork
from elrcli.methods.table import TableChoice


def build_method(
    config: TrainConfig,
    network: nn.Module,
    parts: Sequence[nn.Module],
    labels: np.ndarray,
    trained: np.ndarray,
    num_classes: int,
    rows: np.ndarray | None = None,
    tables: TableChoice | None = None,
) -> Method:
    """Return the method that `config.method` names.

    `network` predicts; its `parts` are the networks that it is an ensemble of, or itself.
    labels [N] as given, trained [T] the rows to train on; `rows` [n] are those to keep state of,
    by default all, in the form and place that `tables` says. Methods without the ELR term keep
    targets too, so that all can be compared.
    """
    assert config.mixup_alpha is not None or not config.mixes, "resolve() fills what is automatic"
    rows = np.arange(len(labels)) if rows is None else rows
    tables = tables or TableChoice()

    def table() -> ELRLoss:
        lam = config.lam if config.has_elr_term else 0.0
        return ELRLoss(
            len(rows),
            num_classes,
            lam=lam,
            beta=config.beta,
            table=tables.form,
            on_host=tables.on_host,
        )

    def single(part: nn.Module) -> SingleNetwork:
        average = None
        if config.averages:
            assert config.ema_decay is not None, "resolve() fills what is automatic"
            average = WeightAverage(part, config.ema_decay, config.ema_ramp)
        return SingleNetwork(
            part,
            table(),
            label_loss=label_loss(config, len(rows), num_classes),
            lam_ramp=config.lam_ramp,
            average=average,
            mixup_alpha=config.mixup_alpha,
            weigh_labels=config.weigh_labels,
        )

    if config.method == "elr-halves":
        owner = np.zeros(len(labels), dtype=np.int64)
        owner[trained] = draw_halves(labels[trained], config.seed)
        return TwoHalves(network, parts, table(), torch.from_numpy(owner[rows]), config.lam_ramp)
    if config.method == "elr-plus":
        first, second = map(single, parts)
        return ELRPlus(network, first, second)
    return single(network)


def label_loss(config: TrainConfig, num_samples: int, num_classes: int) -> LabelLoss:
    """Return the loss of the given labels that belongs to `config.method`."""
    if config.method == "gce":
        return generalised_cross_entropy
    if config.method == "sl":
        return partial(symmetric_cross_entropy, alpha=config.sl_alpha, beta=config.sl_beta)
    if config.method == "sop":
        assert config.sop_start is not None, "resolve() fills what is automatic"
        return OverParameterisation(
            num_samples,
            num_classes,
            lr_u=config.sop_lr_u,
            lr_v=config.sop_lr_v,
            start=config.sop_start,
            generator=torch.Generator().manual_seed(config.seed),
        )
    return cross_entropy
