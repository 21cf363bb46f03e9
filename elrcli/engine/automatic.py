"""What a training chooses where its settings leave the choice."""

from __future__ import annotations

import math

import torch

from elrcli.config import AUTO, TrainConfig
from elrcli.data.loader import images_per_epoch
from elrcli.data.manifest import Manifest
from elrcli.engine.device import Runtime, worker_count
from elrcli.engine.distributed import Group
from elrcli.engine.memory import free_memory
from elrcli.methods.table import TableChoice, choose_tables, row_bytes
from elrcli.models import Preprocessing, has_batch_norm


def resolve(
    config: TrainConfig,
    manifest: Manifest,
    network: torch.nn.Module,
    prepared: Preprocessing,
    processes: int = 1,
) -> TrainConfig:
    """Return `config` with every automatic choice made."""
    images = images_per_epoch(manifest.labels[manifest.rows("train")], config.balanced)
    batch_size = config.batch_size
    if not isinstance(batch_size, int):
        batch_size = automatic_batch_size(images // processes)
    steps = config.epochs * math.ceil(images / (batch_size * config.accumulate * processes))
    choices = {
        "lr": automatic_lr(config.optimizer, has_batch_norm(network)),
        "weight_decay": 0.001 if config.optimizer == "sgd" else 0.05,
        "ema_decay": automatic_ema_decay(steps),
        "mixup_alpha": automatic_mixup_alpha(config.epochs),
        "sop_start": automatic_sop_start(config.epochs),
    }
    left = {name: choices[name] for name in open_settings(config) if name in choices}
    return config.replace(
        data=config.data.absolute(),
        mixup=config.mixes,
        ema=config.averages,
        batch_size=batch_size,
        image_size=prepared.image_size,
        workers=worker_count(config.workers),
        **left,
    )


def open_settings(config: TrainConfig) -> list[str]:
    """Return the names of the settings that are left to be chosen, of those that take part."""
    names = ["batch_size", "lr", "weight_decay", "workers"]
    names += ["ema_decay"] if config.averages else []
    names += ["mixup_alpha"] if config.mixes else []
    names += ["sop_start"] if config.method == "sop" else []
    return [name for name in names if getattr(config, name) in (None, AUTO)]


def table_choice(
    config: TrainConfig, manifest: Manifest, runtime: Runtime, group: Group
) -> TableChoice:
    """Return how the tables of all samples are kept: the same in every process."""
    rows = -(-len(manifest) // group.processes)
    free = group.gather((free_memory(runtime.device), free_memory(torch.device("cpu"))))
    near, host = (min(sizes) for sizes in zip(*free, strict=True))
    # What has no other form or place: the record of each epoch, and what sop learns of each image.
    near -= rows * torch.float16.itemsize * config.epochs
    if config.method == "sop":
        near -= rows * row_bytes("fp32", manifest.num_classes)
    return choose_tables(
        config.table,
        config.table_device,
        rows=rows,
        classes=manifest.num_classes,
        tables=1 + config.networks,  # targets, predictions and, of two halves, the held-out ones
        device=str(runtime.device),
        free=(max(0, near), host),
    )


def automatic_lr(optimizer: str, batch_norm: bool) -> float:
    """Return the peak learning rate for an optimiser and kind of network.

    Networks without BatchNorm, such as transformers, want smaller steps of AdamW.
    """
    if optimizer == "sgd":
        return 0.02
    return 0.001 if batch_norm else 0.0002


def automatic_ema_decay(steps: int) -> float:
    """Return 0.997, or less where the average would remember more than a twentieth of the steps."""
    return max(0.5, min(0.997, 1 - 20 / max(steps, 1)))


def automatic_mixup_alpha(epochs: int) -> float:
    """Return 1 from the 200 epochs of the paper on and less below, at least 0.1.

    What is mixed takes more epochs to learn.
    """
    return min(1.0, max(0.1, epochs / 200))


def automatic_sop_start(epochs: int) -> float:
    """Return the 1e-8 of the paper from 40 epochs on and more below, near 0.01 in 5.

    What grows by a factor per visit must start from more where there are few visits; in long
    trainings a large start lays blame on labels before the network knows anything.
    """
    return math.pow(10, -1 - 7 * min(1.0, epochs / 40))


def automatic_batch_size(images: int) -> int:
    """Return 64, or less where an epoch would have fewer than about 20 steps; at least 16."""
    return max(16, min(64, 1 << int(math.log2(max(images / 20, 1)))))
