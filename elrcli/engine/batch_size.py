"""How many images a training step can take: found by trying on the device."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from elrcli.config import TrainConfig
from elrcli.data.manifest import Manifest
from elrcli.engine.device import Runtime, blank_images
from elrcli.engine.distributed import Group
from elrcli.engine.learner import Learner
from elrcli.engine.memory import largest_fitting
from elrcli.engine.observer import Observer
from elrcli.engine.samples import OwnSamples
from elrcli.errors import OutOfMemory
from elrcli.methods.table import TableChoice
from elrcli.models import Preprocessing, network_of, training_mode

SMALLER = "Lower --image-size, or choose a smaller --backbone."


@dataclass(frozen=True, eq=False)
class BatchTrial:
    """Training steps on blank images, with all that a training has on the device, of its own.

    So they leave nothing behind: not in weights, statistics, tables or random state. Processes
    send each other nothing, so that one of them can try alone.
    """

    config: TrainConfig  # resolved
    manifest: Manifest
    samples: OwnSamples
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
        train = self.samples.places["train"].cpu()
        if len(train) == 0:
            return
        network = network_of(config, manifest.num_classes)
        rows = self.samples.share.rows
        learner = Learner(config, network, manifest, rows, self.runtime, self.tables)
        training_mode(network, config.freeze)
        learning = [p for p in network.parameters() if p.requires_grad]
        # What processes send each other are copies of the gradients.
        copies = [torch.empty_like(p) for p in learning if self.processes > 1]

        def add_gradient(places: Tensor) -> None:
            index = learner.expect(places)
            labels = self.samples.labels.cpu()[places].to(device)
            images = blank_images(len(places), self.runtime, self.preprocessing)
            learner.add_gradient(images, labels, index, 0, torch.Generator().manual_seed(0))

        add_gradient(train[:2])
        learner.step(0.0, 0)
        for _ in range(min(self.accumulate(images), 2)):
            add_gradient(train[:images])
        learner.step(0.0, 1)
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
    samples = OwnSamples(manifest, group, config.seed)
    trial = BatchTrial(config, manifest, samples, runtime, preprocessing, group.processes, tables)
    own = trial.largest(trial.batch_size) or 0
    fitting, device = min(group.gather((own, str(runtime.device))))
    if fitting == 0:
        raise OutOfMemory(f"{device}: out of memory. Not even one image fits. {SMALLER}")
    accumulate = trial.accumulate(fitting)
    batches = f", {accumulate} batches per optimiser step" if accumulate > 1 else ""
    observer.note(f"--batch-size auto: {fitting} images fit on {device}{batches}")
    return config.replace(batch_size=fitting, accumulate=accumulate)
