"""A network that learns: forward, backward and the optimiser's step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from elrcli.config import TrainConfig
from elrcli.data.manifest import Manifest
from elrcli.engine.device import Runtime
from elrcli.engine.distributed import GradientMean, Group
from elrcli.engine.finite import FiniteWatch
from elrcli.engine.optimizers import build_optimizer
from elrcli.engine.schedules import Schedule, set_learning_rate
from elrcli.methods.base import StepResult
from elrcli.methods.build import build_method
from elrcli.methods.record import SampleRecord
from elrcli.methods.sending import sent
from elrcli.methods.table import SampleTables, TableChoice
from elrcli.models import freeze, lay_out, members, synchronise_batch_norm, training_mode


class Learner:
    """A network with the method that trains it, the record of its samples and the optimiser.

    `rows` [n] are the manifest rows that this process keeps tables of; `config` is resolved.
    """

    def __init__(
        self,
        config: TrainConfig,
        network: nn.Module,
        manifest: Manifest,
        rows: np.ndarray,
        runtime: Runtime,
        tables: TableChoice,
        group: Group | None = None,
    ) -> None:
        group, device = group or Group(), runtime.device
        self.network = network
        self.runtime = runtime
        self.halvings = 0  # of the learning rate
        self._config = config
        freeze(network, config.freeze)
        self._is_joint = group.processes > 1
        self._has_gradient = False
        if self.waits_for_others:
            synchronise_batch_norm(network)
        lay_out(network, device)
        group.copy_from_first(list(network.state_dict().values()))
        parts = members(network)
        self.method = build_method(
            config,
            network,
            parts,
            manifest.labels,
            manifest.rows("train"),
            manifest.num_classes,
            rows,
            tables,
        ).to(device)
        self.record = SampleRecord(
            len(rows),
            manifest.num_classes,
            config.epochs,
            held_out=self.method.judges_held_out,
            table=tables.form,
            on_host=tables.on_host,
        ).to(device)
        modules = (*self.method.modules(), self.record)
        self._keepers = [module for module in modules if isinstance(module, SampleTables)]
        self._gradients = GradientMean(group, parts)
        self._parts = [list(part.parameters()) for part in parts]
        self.finite = FiniteWatch(device)
        self.optimizer = build_optimizer(config, network, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=runtime.precision == "fp16")
        self.scaler.scale(torch.zeros((), device=device))  # it has no scale before its first use
        self._schedule = Schedule(
            kind=config.schedule,
            epochs=config.epochs,
            warmup=config.warmup,
            min_factor=config.min_lr,
            milestones=config.milestones,
            step_factor=config.step_factor,
            restart_epochs=config.restart_epochs,
        )
        if config.compile:
            for part in parts:
                part.compile()

    @property
    def waits_for_others(self) -> bool:
        """Whether BatchNorm waits for the other processes in every forward pass."""
        return self._config.sync_bn and self._is_joint

    @property
    def peak_lr(self) -> float:
        """The learning rate at its peak."""
        assert self._config.lr is not None, "resolve() fills the automatic settings"
        return self._config.lr * 0.5**self.halvings

    def lr(self, epoch: float) -> float:
        """Return the learning rate of the step that ends at `epoch`, a time such as 2.5."""
        return self.peak_lr * self._schedule.factor(epoch)

    def expect(self, places: Tensor) -> Tensor:
        """Return places [B] of samples on the device, and prepare the tables for them."""
        index = sent(places, self.runtime.device)
        for module in self._keepers:
            module.expect(places, index)
        return index

    def add_gradient(
        self,
        images: Tensor,
        labels: Tensor,
        index: Tensor,
        epoch: int,
        generator: torch.Generator,
        *,
        share: float = 1.0,
        is_last: bool = True,
    ) -> StepResult:
        """Add the gradient of a batch, which is a `share` of a step and perhaps its last.

        images [B, 3, S, S] normalised, labels [B] ids, index [B] places, all on the device.
        """
        with self._batch_norm_for(len(index)), self.runtime.autocast():
            step = self.method.training_step(images, labels, index, generator)
        self._gradients.expect(self.method, index, is_last=is_last)
        self.scaler.scale(step.loss * share).backward()
        self._has_gradient = True
        self.record.update(step.probs, labels, index, epoch, step.held_out)
        return step

    def step(self, lr: float, number: int) -> None:
        """Step, after batch `number`, unless the gradient is not finite: the device decides.

        A process that is alone and has no gradient, as no image could be read, takes no step.
        """
        if not (self._has_gradient or self._is_joint):
            return
        self._gradients.finish()
        set_learning_rate(self.optimizer, lr)
        clip_grad = self._config.clip_grad
        if self.scaler.is_enabled():  # looks for itself, and too large a scale is no bad sign
            if clip_grad is not None:
                self.scaler.unscale_(self.optimizer)
                for parameters in self._parts:
                    torch.nn.utils.clip_grad_norm_(parameters, clip_grad)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            norms = []
            for parameters in self._parts:  # two networks do not share what they are clipped to
                gradients = [p.grad for p in parameters if p.grad is not None]
                norms.append(torch.nn.utils.get_total_norm(gradients))
                if clip_grad is not None:
                    torch.nn.utils.clip_grads_with_norm_(parameters, clip_grad, norms[-1])
            is_bad = self.finite.gradient(sum(norms[1:], norms[0]), number)
            if self.optimizer.defaults["fused"]:  # leaves out the step by it, as for a GradScaler
                self.optimizer.found_inf = is_bad  # type: ignore[attr-defined]
                self.optimizer.step()
            elif not is_bad:  # waits for the device
                self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._has_gradient = False
        self.method.after_step()

    def forget_step(self) -> None:
        """Let go of the gradients of a step that is given up, and of what was bad in it."""
        self.optimizer.zero_grad(set_to_none=True)
        self._gradients.forget()
        self._has_gradient = False
        self.finite = FiniteWatch(self.runtime.device)

    def is_finite(self) -> bool:
        """Tell whether every weight is a finite number; waits for the device."""
        return bool(torch.stack([p.isfinite().all() for part in self._parts for p in part]).all())

    def free(self) -> None:
        """Give up all memory on the device; nothing can be learned or predicted any more."""
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()
        for module in (self.network, self.method, self.record):
            module.to("meta")  # without memory

    @contextmanager
    def _batch_norm_for(self, images: int) -> Iterator[None]:
        """Let BatchNorm use its running statistics for a single image, which has none."""
        is_alone = images == 1 and not self.waits_for_others
        if is_alone:
            training_mode(self.network, "norm")
        yield
        if is_alone:
            training_mode(self.network, self._config.freeze)
