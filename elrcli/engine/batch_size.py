"""How many images a training step can take: found by trying on the device."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from elrcli.config import TrainConfig
from elrcli.data.manifest import Manifest
from elrcli.data.shares import deal_rows
from elrcli.engine.device import Runtime, blank_images
from elrcli.engine.distributed import Group
from elrcli.engine.memory import largest_fitting
from elrcli.engine.observer import Observer
from elrcli.engine.optimizers import build_optimizer
from elrcli.errors import OutOfMemory
from elrcli.methods.build import build_method
from elrcli.methods.record import SampleRecord
from elrcli.methods.table import TableChoice
from elrcli.models import Preprocessing, create_network, freeze, members, training_mode

SMALLER = "Lower --image-size, or choose a smaller --backbone."


@dataclass(frozen=True, eq=False)
class BatchTrial:
    """Training steps on blank images, with all that a training has on the device, of its own.

    So they leave nothing behind: not in weights, statistics, tables or random state. Processes
    send each other nothing, so that one of them can try alone.
    """

    config: TrainConfig  # resolved
    manifest: Manifest
    rows: np.ndarray  # [n] that this process trains on or keeps a record of
    runtime: Runtime
    preprocessing: Preprocessing
    processes: int
    tables: TableChoice = field(default_factory=TableChoice)

    @property
    def batch_size(self) -> int:
        """The batch size of the settings."""
        assert isinstance(self.config.batch_size, int), "resolve() fills the automatic settings"
        return self.config.batch_size

    def largest(self, at_most: int) -> int | None:
        """Return how many images fit: `at_most`, or that halved some times; None if not one."""
        devices = [self.runtime.device] if self.runtime.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            return largest_fitting(at_most, self._take_steps, self.runtime.device)

    def accumulate(self, images: int) -> int:
        """Return the batches of so many images that make an optimiser step of the settings."""
        return self.config.accumulate * -(-self.batch_size // images)

    def after_failure(self) -> str:
        """Return the problem and the remedy after a training that is no longer in memory."""
        failed, problem = self.batch_size, f"{self.runtime.device}: out of memory with"
        if failed == 1:
            return f"{problem} 1 image per step. {SMALLER}"
        problem += f" {failed} images per step."
        fitting = self.largest(-(-failed // 2))
        if fitting is None:
            return f"{problem} Not even one image fits. {SMALLER}"
        return (
            f"{problem} {fitting} fit{'s' if fitting == 1 else ''}: add --batch-size {fitting}"
            f" --accumulate {self.accumulate(fitting)}, or --batch-size auto."
        )

    def _take_steps(self, images: int) -> None:
        """Take two steps, of which the second needs as much memory as any of the training.

        The optimiser has its state then, and gradients lie beside the activations where several
        batches make a step.
        """
        config, manifest, device = self.config, self.manifest, self.runtime.device
        train = torch.from_numpy(np.flatnonzero(manifest.splits[self.rows] == 0))
        if len(train) == 0:
            return
        network = create_network(
            config.backbone,
            manifest.num_classes,
            small_input=config.small_input,
            image_size=config.image_size,
            copies=config.networks,
        )
        freeze(network, config.freeze)
        network.to(device).to(memory_format=torch.channels_last)
        labels, classes = manifest.labels, manifest.num_classes
        method = build_method(
            config,
            network,
            members(network),
            labels,
            manifest.rows("train"),
            classes,
            self.rows,
            self.tables,
        ).to(device)
        record = SampleRecord(
            len(self.rows),
            classes,
            config.epochs,
            held_out=method.judges_held_out,
            table=self.tables.form,
            on_host=self.tables.on_host,
        ).to(device)
        optimizer = build_optimizer(config, network, device)
        learning = [p for p in network.parameters() if p.requires_grad]
        # What processes send each other are copies of the gradients.
        copies = [torch.empty_like(p) for p in learning if self.processes > 1]

        def add_gradient(places: Tensor) -> None:
            training_mode(network, "norm" if len(places) == 1 else config.freeze)
            index = places.to(device)
            given = torch.from_numpy(labels[self.rows[places.numpy()]].astype(np.int64)).to(device)
            pixels = blank_images(len(places), self.runtime, self.preprocessing)
            with self.runtime.autocast():
                step = method.training_step(pixels, given, index, torch.Generator().manual_seed(0))
            step.loss.backward()
            record.update(step.probs, given, index, 0, step.held_out)

        def take_step() -> None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            method.after_step()

        add_gradient(train[:2])
        take_step()
        for _ in range(min(self.accumulate(images), 2)):
            add_gradient(train[:images])
        take_step()
        del copies


def with_fitting_batch(
    config: TrainConfig,
    manifest: Manifest,
    runtime: Runtime,
    preprocessing: Preprocessing,
    group: Group,
    observer: Observer,
    tables: TableChoice,
) -> TrainConfig:
    """Return resolved settings with a batch size that fits on the devices of all processes.

    It is halved as often as needed and `accumulate` raised, so that an optimiser step takes as
    many images as before. Raises OutOfMemory where not even one image fits.
    """
    rows = np.arange(len(manifest))
    if group.processes > 1:
        owner = deal_rows(manifest.labels, manifest.splits, group.processes, config.seed)
        rows = np.flatnonzero(owner == group.rank)
    trial = BatchTrial(config, manifest, rows, runtime, preprocessing, group.processes, tables)
    own = trial.largest(trial.batch_size) or 0
    fitting, device = min(group.gather((own, str(runtime.device))))
    if fitting == 0:
        raise OutOfMemory(f"{device}: out of memory. Not even one image fits. {SMALLER}")
    accumulate = trial.accumulate(fitting)
    batches = f", {accumulate} batches per optimiser step" if accumulate > 1 else ""
    observer.note(f"--batch-size auto: {fitting} images fit on {device}{batches}")
    return config.replace(batch_size=fitting, accumulate=accumulate)
