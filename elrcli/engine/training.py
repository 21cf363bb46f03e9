"""A training in progress: the loop over epochs and batches, and its state."""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elrcli.config import TrainConfig
from elrcli.data.cache import ImageCache
from elrcli.data.loader import Batch, RowLoader, images_per_epoch
from elrcli.data.manifest import SPLITS, Manifest, manifest_text
from elrcli.data.shares import Share, deal_rows
from elrcli.data.transforms import Transform, eval_transform, train_transform
from elrcli.engine.automatic import table_choice
from elrcli.engine.batch_size import BatchTrial
from elrcli.engine.checkpoints import (
    BackgroundWriter,
    load_checkpoint,
    save_checkpoint,
    take_snapshot,
    write_tensors,
)
from elrcli.engine.device import Runtime, seed_generators
from elrcli.engine.distributed import (
    SAVE,
    GradientMean,
    Group,
    SharedSignal,
    batch_statistics,
    is_lost,
    own_state,
    whole_state,
)
from elrcli.engine.features import Features, look_at_images
from elrcli.engine.finite import STEPS_BETWEEN_LOOKS, WHAT, FiniteWatch
from elrcli.engine.graphs import compute_again, replay_on_gpu
from elrcli.engine.inference import predict_batches
from elrcli.engine.interrupts import StopSignals
from elrcli.engine.memory import is_out_of_memory, release_memory
from elrcli.engine.metrics import (
    METRIC_COLUMNS,
    Diverged,
    EpochTotals,
    agreement_metrics,
    held_out_metrics,
    loss_metrics,
    memorisation_metrics,
)
from elrcli.engine.observer import Observer, TrainingPlan
from elrcli.engine.optimizers import build_optimizer, restore_optimizer
from elrcli.engine.schedules import Schedule, set_learning_rate
from elrcli.errors import DataError, NotWritten, OutOfMemory, TrainingError, legible
from elrcli.methods.averages import WeightAverage
from elrcli.methods.build import build_method
from elrcli.methods.record import SampleRecord
from elrcli.methods.table import SampleTables
from elrcli.models import Preprocessing, freeze, members, synchronise_batch_norm, training_mode
from elrcli.run import RunFolder, csv_text, write_text

SECONDS_BETWEEN_CURVES = 30.0
MOST_HALVINGS = 3  # of the learning rate, with --on-nan retry
NAMED = 4  # images of a bad batch


def too_many_unreadable(unreadable: int, images: int, share: float) -> bool:
    """Tell whether more than a `share` of the images cannot be read; one alone is never too many.

    A share of 0 allows none at all.
    """
    return unreadable > share * images and (unreadable > 1 or share == 0.0)


@dataclass
class PartOfEpoch:
    """How far the epoch in progress has come."""

    before: Tensor  # [n] predicted classes an epoch ago, -1 unknown
    totals: EpochTotals
    started: float  # by the monotonic clock, as if nothing had come between
    batches: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))  # done
    unreadable: int = 0  # images of this process
    is_between_steps: bool = False  # all that is saved belongs to these batches

    def has_done(self, split: str, batches: int) -> None:
        """Note that so many batches of a split are through, in everything that is saved."""
        self.batches[split] = batches
        self.is_between_steps = True


@dataclass
class Training:
    """One run in progress: what the loop works on and what a checkpoint holds.

    Each of several processes keeps the rows of its own share: labels, targets, records. Places in
    these are not manifest rows.
    """

    config: TrainConfig
    manifest: Manifest
    run: RunFolder
    network: torch.nn.Module
    runtime: Runtime
    preprocessing: Preprocessing
    group: Group = field(default_factory=Group)
    epoch: int = 0  # the one in progress or the next one
    part: PartOfEpoch | None = None  # None between two epochs
    halvings: int = 0  # of the learning rate
    metrics: list[dict[str, float]] = field(default_factory=list)
    unreadable: dict[int, str] = field(default_factory=dict)
    caches: dict[int, ImageCache] = field(default_factory=dict)  # by load size

    def __post_init__(self) -> None:
        config, manifest, device = self.config, self.manifest, self.runtime.device
        classes, group = manifest.num_classes, self.group
        if group.processes > 1:
            self._check_same(manifest_text(manifest))
        self.owner = deal_rows(manifest.labels, manifest.splits, group.processes, config.seed)
        self.share = Share(np.flatnonzero(self.owner == group.rank), group.processes)
        own = self.share.rows
        freeze(self.network, config.freeze)
        if config.sync_bn and group.processes > 1:
            synchronise_batch_norm(self.network)
        self.network.to(device).to(memory_format=torch.channels_last)
        group.copy_from_first(list(self.network.state_dict().values()))
        parts = members(self.network)
        self.tables = table_choice(config, manifest, self.runtime, group)
        trained = manifest.rows("train")
        self.method = build_method(
            config, self.network, parts, manifest.labels, trained, classes, own, self.tables
        )
        self.method.to(device)
        self.record = SampleRecord(
            len(own),
            classes,
            config.epochs,
            held_out=self.method.judges_held_out,
            table=self.tables.form,
            on_host=self.tables.on_host,
        ).to(device)
        modules = (*self.method.modules(), self.record)
        self.keepers = [module for module in modules if isinstance(module, SampleTables)]
        self.plan = self._plan()
        self.labels = torch.from_numpy(manifest.labels[own].astype(np.int64)).to(device)
        truth = None if manifest.truth is None else manifest.truth[own].astype(np.int64)
        self.truth = None if truth is None else torch.from_numpy(truth).to(device)
        self.places = {
            split: torch.from_numpy(np.flatnonzero(manifest.splits[own] == code)).to(device)
            for code, split in enumerate(SPLITS)
        }
        self.gradients = GradientMean(group, parts)
        self.signal = SharedSignal(group)
        self.processes_before = group.processes
        self.saved_at = time.monotonic()
        self.writer = BackgroundWriter()
        self.finite = FiniteWatch(device)
        self.parameters = list(self.network.parameters())
        self.optimizer = build_optimizer(config, self.network, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.runtime.precision == "fp16")
        self.schedule = Schedule(
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

    def run_to_end(self, observer: Observer, *, for_audit: bool) -> RunFolder:
        """Train the remaining epochs, saving after each, and write the results."""
        self._check_same(f"epoch {self.epoch} {self.part and self.part.batches}")
        if self.config.tensorboard and self.group.is_first:
            from elrcli.engine.tensorboard import TensorBoardObserver

            observer = TensorBoardObserver(self.run.tensorboard_folder, observer)
        size = self.preprocessing.image_size
        augmented = train_transform(self.config.augment, size, self.config.flip)
        loader = self._loader(self.manifest.rows("train"), augmented, shuffle=True)
        held_out = {
            split: self._loader(self.manifest.rows(split), eval_transform(size), shuffle=False)
            for split in ("val", "test")
        }
        observer.training_started(dataclasses.replace(self.plan, first_epoch=self.epoch))
        if self.processes_before != self.group.processes:
            observer.note(
                f"begun by {self.processes_before} processes, goes on with {self.group.processes}: "
                f"{self.plan.batch_size * self.group.processes} images per step instead of "
                f"{self.plan.batch_size * self.processes_before}"
            )
        if self.part is not None:
            done = self.part.batches["train"]
            observer.note(
                f"goes on in epoch {self.epoch + 1} after {done} of {len(loader)} batches"
            )
        if self.tables.note is not None:
            observer.note(self.tables.note)
        self._replay_steps(loader, held_out, observer)
        drawn_at = time.monotonic()
        remedy = f"Continue with: elr train --resume {shlex.quote(str(self.run.path))}"
        with StopSignals() as stop, self._failures_explained(stop, remedy), self.writer:
            while self.epoch < self.config.epochs:
                is_last = self.epoch + 1 == self.config.epochs
                try:
                    row = self._finish_epoch(loader, held_out, observer, stop, remedy)
                except Diverged as error:
                    self._begin_again(error, observer)
                    continue
                self.metrics.append(row)
                self.epoch += 1
                self.part = None
                # The last epoch starts processes that load test images, an audit some more.
                self.save(wait=self.epoch + 1 >= self.config.epochs)
                if not is_last and time.monotonic() - drawn_at > SECONDS_BETWEEN_CURVES:
                    self._draw_curves()
                    drawn_at = time.monotonic()
                observer.epoch_finished(row)
                if not is_last:
                    self._end_if_told(stop, remedy)
            compute_again(self.method.modules())
            self._draw_curves()
            self._save_model()
            no_features = self.group.from_first(lambda: not self.run.features_file.is_file())
            if for_audit and no_features:
                every = self._loader(
                    np.arange(len(self.manifest)),
                    eval_transform(size),
                    shuffle=False,
                    cached=augmented.load_size == size,  # else this one look would fill a cache
                )
                self._look_at_all_images(every, observer, stop, remedy)
        if self.unreadable:
            observer.note(
                f"{len(self.unreadable)} images could not be read and were left out:"
                f" {self.run.unreadable_file}"
            )
        return self.run

    def _replay_steps(
        self, loader: RowLoader, held_out: Mapping[str, RowLoader], observer: Observer
    ) -> None:
        """Let a GPU replay the network's passes where every batch is one pass and one step."""
        config, method = self.config, self.method
        is_whole = method.takes_whole_batches and config.accumulate == 1
        is_alone = self.runtime.device.type == "cuda" and self.group.processes == 1
        is_over = self.epoch == config.epochs
        if not (config.cuda_graphs and is_whole and is_alone) or config.compile or is_over:
            return
        training_mode(self.network, config.freeze)
        averages = [m.network for m in method.modules() if isinstance(m, WeightAverage)]
        learned = {size for size in loader.batch_sizes if size > 1}
        judged = {size for one in held_out.values() for size in one.batch_sizes}
        if averages or config.mixup:  # the targets follow a prediction in eval mode
            judged |= learned
        problem = replay_on_gpu(
            learning=members(self.network),
            judging=[*members(method.prediction_network()), *averages],
            learning_sizes=learned,
            judging_sizes=judged - {0},
            runtime=self.runtime,
            prepared=self.preprocessing,
        )
        if problem is not None:
            observer.note(f"without CUDA graphs, somewhat slower: {problem}")

    def _finish_epoch(
        self,
        loader: RowLoader,
        held_out: Mapping[str, RowLoader],
        observer: Observer,
        stop: StopSignals,
        remedy: str,
    ) -> dict[str, float]:
        """Train what is left of the epoch and return its row of metrics."""
        part = self._part_of_epoch()
        totals = self._train_epoch(loader, observer, stop, remedy)
        if part.batches["val"] == part.batches["test"] == 0:
            self.group.average(batch_statistics(self.method))
        is_last = self.epoch + 1 == self.config.epochs
        for split in ("val", "test") if is_last else ("val",):
            self._observe_held_out(split, held_out[split], observer, stop, remedy)
        return self._epoch_metrics(totals, part.before, time.monotonic() - part.started)

    def _begin_again(self, error: Diverged, observer: Observer) -> None:
        """Go back to the beginning of the epoch with half the learning rate, or give up.

        Not to the last checkpoint: when that was made is chance.
        """
        if self.config.on_nan == "stop" or self.halvings == MOST_HALVINGS:
            also = f", even at {self._peak_lr:g}" if self.halvings else ""
            retry = "" if self.halvings else " or --on-nan retry"
            raise Diverged(
                f"{error}{also}. Lower --lr, or add --clip-grad 1{retry}; the state before this "
                "epoch is saved."
            ) from error
        halvings = self.halvings + 1
        self.writer.finish()
        self.group.wait()  # for the first process to have written
        state = load_checkpoint(
            self.run.checkpoint_folder,
            problem=lambda state: None if state.get("part") is None else "within an epoch",
        )
        self.load_state_dict(state)
        self.halvings = halvings
        self.optimizer.zero_grad(set_to_none=True)
        self.gradients.forget()
        self.finite = FiniteWatch(self.runtime.device)
        self.save()
        observer.note(
            f"{error}. Epoch {self.epoch + 1} begins again with half the learning rate,"
            f" {self._peak_lr:g}"
        )

    @property
    def _peak_lr(self) -> float:
        return self.plan.lr * 0.5**self.halvings

    def _look_for_bad_numbers(self) -> None:
        """Raise Diverged in all processes if any had numbers that are not finite."""
        own = self.finite.look()
        found = None
        if own is not None:
            paths = [self.manifest.paths[row] for row in own.rows]
            named = ", ".join(paths[:NAMED])
            more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
            # A bad gradient is everybody's, a bad loss that of one process.
            found = WHAT.index(own.what), own.number, f"{named}{more}"
        bad = [one for one in self.group.gather(found) if one is not None]
        if bad:
            what, number, images = min(bad)
            raise Diverged(
                f"the {WHAT[what]} is no finite number in epoch {self.epoch + 1},"
                f" batch {number + 1} ({images})"
            )

    def _check_same(self, seen: str) -> None:
        """Raise TrainingError unless all processes have `seen` the same."""
        digest = hashlib.sha256(seen.encode("utf-8", "surrogateescape")).hexdigest()
        if len(set(self.group.gather(digest))) > 1:
            raise TrainingError(
                f"the processes do not see the same files. {self.config.data} and {self.run.path} "
                "must be the same on every machine."
            )

    def _part_of_epoch(self) -> PartOfEpoch:
        """Return the epoch in progress, which begins here if there is none."""
        if self.part is None:
            totals = EpochTotals(self.runtime.device)
            self.part = PartOfEpoch(self.record.prediction.clone(), totals, time.monotonic())
        return self.part

    def _end_if_told(self, stop: StopSignals, remedy: str) -> None:
        """Raise `Interrupted` in all processes at once, whichever received a signal.

        Within an epoch the state is saved before, and whenever the first process's clock says so.
        """
        own = stop.received
        if own is None and self.part is not None and self._is_time_to_save():
            own = SAVE
        told = self.signal.exchange(own)
        if told is not None and self.part is not None:
            self._look_for_bad_numbers()
            self.save()
        if told is not None and told != SAVE:
            stop.received = told
            stop.raise_if_received(remedy)

    def _is_time_to_save(self) -> bool:
        now = time.monotonic()
        is_time = self.group.is_first and now - self.saved_at >= 60 * self.config.checkpoint_minutes
        if is_time:
            self.saved_at = now
        return is_time

    @contextmanager
    def _failures_explained(self, stop: StopSignals, remedy: str) -> Iterator[None]:
        """Turn what a signal caused into `Interrupted`, and known failures into advice."""
        try:
            yield
        except NotWritten as error:
            raise NotWritten(
                f"{error} The last checkpoint is intact. Mend this, then"
                f" {remedy[0].lower()}{remedy[1:]}"
            ) from error
        except (RuntimeError, TrainingError) as error:
            stop.settle()
            is_whole = self.part is not None and self.part.is_between_steps
            if stop.received is not None and is_whole and self.group.processes == 1:
                self.save()
            stop.raise_if_received(remedy)
            if is_out_of_memory(error, self.runtime.device):
                traceback.clear_frames(error.__traceback__)  # they hold activations
                raise OutOfMemory(self._memory_remedy()) from error
            if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                problem = str(error).strip().split("\n")[0]
                raise TrainingError(f"--compile failed ({problem}). Leave it out.") from error
            if is_lost(error):
                raise TrainingError(
                    "another process of this training has ended. Its own message, or that of "
                    f"torchrun, says why. {remedy}"
                ) from error
            raise

    def _memory_remedy(self) -> str:
        """Return which batch fits instead of the one that did not; this training is over."""
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()
        compute_again(self.method.modules())  # what is captured holds memory as well
        for module in (self.network, self.method, self.record):
            module.to("meta")  # without memory
        release_memory(self.runtime.device)
        return BatchTrial(
            self.config,
            self.manifest,
            self.share.rows,
            self.runtime,
            self.preprocessing,
            self.group.processes,
            self.tables,
        ).after_failure()

    def _train_epoch(
        self, loader: RowLoader, observer: Observer, stop: StopSignals, remedy: str
    ) -> EpochTotals:
        config, method, device = self.config, self.method, self.runtime.device
        training_mode(self.network, config.freeze)
        part = self._part_of_epoch()
        totals, first = part.totals, part.batches["train"]
        total = loader.images
        done = total * first // len(loader)
        stage = f"epoch {self.epoch + 1}/{config.epochs}"
        has_gradient = False
        batches = totals.time_waiting(loader.epoch(self.epoch, first))
        for number, batch in enumerate(batches, start=first):
            part.is_between_steps = False
            self.unreadable.update(dict(batch.unreadable))
            part.unreadable += len(batch.unreadable)
            self._check_readable(part.unreadable, total)
            done += self._count(batch)
            is_due = (number + 1) % config.accumulate == 0 or number + 1 == len(loader)
            if len(batch.index) > 0:
                labels = batch.labels.to(device, non_blocking=True)
                index = self._index(batch)
                images = self.runtime.normalise(batch.images, self.preprocessing)
                generator = self._seed_step(self.epoch, number)
                with self._batch_norm_for(len(index)), self.runtime.autocast():
                    step = method.training_step(images, labels, index, generator)
                first_of_step = number - number % config.accumulate
                share = 1 / min(config.accumulate, len(loader) - first_of_step)
                self.gradients.expect(method, index, is_last=is_due)
                self.finite.loss(step.loss, number, batch.index)
                self.scaler.scale(step.loss * share).backward()
                has_gradient = True
                self.record.update(step.probs, labels, index, self.epoch, step.held_out)
                totals.add(step, len(index))
            elif self._is_synchronised:
                raise TrainingError("--sync-bn: no image of a batch can be read. Leave it out.")
            if is_due and (has_gradient or self.group.processes > 1):
                self.gradients.finish()
                factor = self.schedule.factor(self.epoch + (number + 1) / len(loader))
                set_learning_rate(self.optimizer, self._peak_lr * factor)
                self._optimizer_step(number)
                has_gradient = False
            if is_due:
                part.has_done("train", number + 1)
            observer.progress(stage, min(done, total), total)
            if is_due:
                self._end_if_told(stop, remedy)
            if (number + 1 - first) % STEPS_BETWEEN_LOOKS == 0:
                self._look_for_bad_numbers()
        self._look_for_bad_numbers()
        totals = totals.of_all(self.group)
        if totals.images == 0:
            self._share_unreadable()
            raise DataError(self._nothing_readable())
        if self.group.processes > 1:  # so far each has judged by its own images
            self._share_unreadable()
            found = self.group.sum(torch.tensor([part.unreadable]))
            self._check_readable(int(found), total)
        if not bool(torch.stack([p.isfinite().all() for p in self.network.parameters()]).all()):
            raise Diverged("a weight is no longer a finite number")
        return totals

    @contextmanager
    def _batch_norm_for(self, images: int) -> Iterator[None]:
        """Let BatchNorm use its running statistics for a single image, which has none."""
        is_alone = images == 1 and not self._is_synchronised
        if is_alone:
            training_mode(self.network, "norm")
        yield
        if is_alone:
            training_mode(self.network, self.config.freeze)

    @property
    def _is_synchronised(self) -> bool:
        """Whether BatchNorm waits for the other processes in every forward pass."""
        return self.config.sync_bn and self.group.processes > 1

    def _index(self, batch: Batch) -> Tensor:
        """Return the places of a batch in this process's tables, on the device."""
        places = self.share.places(batch.index)
        index = places.to(self.runtime.device, non_blocking=True)
        for module in self.keepers:
            module.expect(places, index)
        return index

    def _count(self, batch: Batch) -> int:
        """Return how many images all processes are through with when this one has a batch."""
        return (len(batch.index) + len(batch.unreadable)) * self.group.processes

    def _share_unreadable(self) -> None:
        found = self.group.gather(self.unreadable)
        self.unreadable = {row: reason for part in found for row, reason in part.items()}

    def _nothing_readable(self) -> str:
        return f"{self.manifest.root}: no training image can be read. {self._first_unreadable()}."

    def _check_readable(self, unreadable: int, images: int) -> None:
        """Raise DataError if that many `unreadable` training images of an epoch are too many."""
        if not too_many_unreadable(unreadable, images, self.config.max_unreadable):
            return
        self.writer.finish()
        self.save_tables()
        raise DataError(
            f"{self.manifest.root}: {unreadable:,} or more of {images:,} training images cannot be"
            f" read; --max-unreadable is {self.config.max_unreadable:g}."
            f" {self._first_unreadable()}. Mend or remove what {self.run.unreadable_file} lists, or"
            " allow more."
        )

    def _first_unreadable(self) -> str:
        row = next(row for row in self.manifest.rows("train").tolist() if row in self.unreadable)
        return f"{legible(self.manifest.paths[row])}: {self.unreadable[row]}"

    def _optimizer_step(self, number: int) -> None:
        """Step, after batch `number`, unless the gradient is not finite: the device decides."""
        if self.scaler.is_enabled():  # looks for itself, and too large a scale is no bad sign
            if self.config.clip_grad is not None:
                self.scaler.unscale_(self.optimizer)
                torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip_grad)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            if self.config.clip_grad is not None:
                torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip_grad, norm)
            # Fused optimisers leave out the step by it, as they do for a GradScaler.
            self.optimizer.found_inf = self.finite.gradient(norm, number)  # type: ignore[attr-defined]
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step()

    def _seed_step(self, epoch: int, number: int) -> torch.Generator:
        """Make all randomness of a step (dropout, mixup) a function of what is named here."""
        words = [self.config.seed, epoch, number, self.group.rank]
        seed = int(np.random.SeedSequence(words).generate_state(1)[0])
        seed_generators(seed, self.runtime.device)
        return torch.Generator().manual_seed(seed)

    def _observe_held_out(
        self, split: str, loader: RowLoader, observer: Observer, stop: StopSignals, remedy: str
    ) -> None:
        """Let targets and record take the predictions for rows that training does not touch."""
        part = self._part_of_epoch()
        first, total = part.batches[split], len(self.manifest.rows(split))
        done = total * first // max(len(loader), 1)
        batches = predict_batches(
            self.method.predict, loader, self.runtime, self.preprocessing, first
        )
        for number, (probs, batch) in enumerate(batches, start=first):
            part.is_between_steps = False
            self.unreadable.update(dict(batch.unreadable))
            done += self._count(batch)
            if len(batch.index) > 0:
                index = self._index(batch)
                self.finite.prediction(probs, number, batch.index)
                self.method.observe(probs, index)
                self.record.update(probs, self.labels[index], index, self.epoch, probs)
            part.has_done(split, number + 1)
            observer.progress(split, min(done, total), total)
            self._end_if_told(stop, remedy)
        self._look_for_bad_numbers()

    def _look_at_all_images(
        self, loader: RowLoader, observer: Observer, stop: StopSignals, remedy: str
    ) -> None:
        """Save features and thumbnails of every image: an audit finds neighbours by them."""
        network = self.method.prediction_network().eval()
        own = Features.empty(len(self.share.rows))
        done, total = 0, len(self.manifest)
        for look in look_at_images(network, loader, self.runtime, self.preprocessing):
            own.keep(look, self.share.places(look.batch.index).numpy())
            done += self._count(look.batch)
            observer.progress("features", min(done, total), total)
            self._end_if_told(stop, remedy)
        vectors, thumbnails = (
            self.group.whole(torch.from_numpy(part), self.owner).numpy()
            for part in (own.vectors, own.thumbnails)
        )
        if self.group.is_first:
            Features(vectors, thumbnails).save(self.run.features_file)

    def _epoch_metrics(
        self, totals: EpochTotals, before: Tensor, seconds: float
    ) -> dict[str, float]:
        train, predicted, group = self.places["train"], self.record.prediction, self.group
        row: dict[str, float] = {
            "epoch": self.epoch + 1,
            "lr": self._peak_lr * self.schedule.factor(self.epoch + 1),
            "seconds": seconds,
            **loss_metrics(totals),
            **agreement_metrics(
                predicted[train],
                before[train],
                self.method.target_classes(train),
                self.labels[train],
                group,
            ),
        }
        if self.truth is not None:
            row |= memorisation_metrics(
                predicted[train], self.labels[train], self.truth[train], group
            )
        for split in ("val", "test"):
            places = self.places[split]
            truth = None if self.truth is None else self.truth[places]
            given_prob = self.record.given_prob[places, self.epoch]
            row |= held_out_metrics(
                split, predicted[places], given_prob, self.labels[places], truth, group
            )
        return row

    def save(self, *, wait: bool = True) -> None:
        """Write the checkpoint, then the text files that follow from it.

        Without `wait` the files are written while training goes on.
        """
        self._share_unreadable()
        state = self.state_dict()
        if not self.group.is_first:
            return
        done = sum(self.part.batches.values()) if self.part is not None else 0
        snapshot, epoch, tables = take_snapshot(state), self.epoch, self._tables()

        def write() -> None:
            save_checkpoint(self.run.checkpoint_folder, epoch, snapshot, done)
            for file, text in tables.items():
                write_text(file, text)

        self.writer.start(write)
        if wait:
            self.writer.finish()
        self.saved_at = time.monotonic()

    def save_tables(self) -> None:
        """Write the text files that follow from the state."""
        for file, text in self._tables().items():
            write_text(file, text)

    def _tables(self) -> dict[Path, str]:
        paths = self.manifest.paths
        unreadable = [
            {"path": paths[row], "reason": self.unreadable[row]} for row in sorted(self.unreadable)
        ]
        return {
            self.run.metrics_file: csv_text(self.metrics, METRIC_COLUMNS),
            self.run.unreadable_file: csv_text(unreadable, ("path", "reason")),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resume needs; the samples of all processes on the first one."""
        return {
            "epoch": self.epoch,
            "processes": self.group.processes,
            "method": whole_state(self.method, self.group, self.owner),
            "record": whole_state(self.record, self.group, self.owner),
            "optimizer": self.optimizer.state_dict()["state"],
            "scaler": self.scaler.state_dict(),
            "halvings": self.halvings,
            "metrics": self.metrics,
            "unreadable": list(self.unreadable.items()),
            "part": None if self.part is None else self._state_of_part(self.part),
        }

    def _state_of_part(self, part: PartOfEpoch) -> dict[str, Any]:
        """Return where an epoch stands; what differs between processes by rank."""
        is_alone = self.group.processes == 1
        own = {
            "totals": part.totals.state_dict(),
            "unreadable": part.unreadable,
            # Averaged at the end of the epoch, until then each process has its own.
            "statistics": [] if is_alone else [t.cpu() for t in batch_statistics(self.method)],
        }
        return {
            "before": self.group.whole(part.before, self.owner),
            "batches": part.batches,
            "seconds": time.monotonic() - part.started,
            "own": self.group.gather(own),
        }

    def _load_part(self, state: Mapping[str, Any]) -> PartOfEpoch:
        own, samples = state["own"][self.group.rank], len(self.manifest)
        if state["before"].shape != (samples,):
            raise ValueError(f"predictions of {len(state['before'])} samples, not {samples}")
        totals = EpochTotals(self.runtime.device)
        totals.load_state_dict(own["totals"])
        if self.group.processes > 1:
            statistics = batch_statistics(self.method)
            for tensor, saved in zip(statistics, own["statistics"], strict=True):
                tensor.copy_(saved)
        return PartOfEpoch(
            before=state["before"][self.share.rows].to(self.runtime.device),
            totals=totals,
            started=time.monotonic() - float(state["seconds"]),
            batches={split: int(state["batches"][split]) for split in SPLITS},
            unreadable=int(own["unreadable"]),
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state that `state_dict` returned; what does not fit raises something."""
        self.epoch = range(self.config.epochs + 1)[state["epoch"]]
        self.halvings = range(MOST_HALVINGS + 1)[state["halvings"]]
        self.processes_before = int(state.get("processes", 1))
        for module, saved in ((self.method, state["method"]), (self.record, state["record"])):
            own = own_state(module, saved, self.share.rows, len(self.manifest))
            module.load_state_dict(own)
        restore_optimizer(self.optimizer, state["optimizer"])
        if state["scaler"]:  # empty if the run began without fp16, on another device
            self.scaler.load_state_dict(state["scaler"])
        self.metrics = [
            {name: float(value) for name, value in row.items()} | {"epoch": int(row["epoch"])}
            for row in state["metrics"]
        ]
        rows = range(len(self.manifest))
        self.unreadable = {rows[row]: str(reason) for row, reason in state["unreadable"]}
        self.part = None if state["part"] is None else self._load_part(state["part"])

    def _draw_curves(self) -> None:
        if self.group.is_first:
            from elrcli.plots import curves_svg  # only here: matplotlib would delay the first step

            write_text(self.run.curves_file, curves_svg(self.metrics))

    def _save_model(self) -> None:
        if not self.group.is_first:
            return
        weights = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in self.method.prediction_network().state_dict().items()
        }
        write_tensors(self.run.model_file, weights)

    def _loader(
        self, rows: np.ndarray, transform: Transform, *, shuffle: bool, cached: bool = True
    ) -> RowLoader:
        config = self.config
        return RowLoader(
            self.manifest,
            rows,
            transform,
            batch_size=self.plan.batch_size,
            workers=self.plan.workers,
            seed=config.seed,
            shuffle=shuffle,
            balanced=shuffle and config.balanced,
            share=self.share,
            cache=self._cache(transform.load_size) if cached else None,
            pin_memory=self.runtime.device.type == "cuda",
        )

    def _cache(self, load_size: int) -> ImageCache | None:
        """Return the cache of images at `load_size`, one for all loaders."""
        mode = self.config.cache
        if mode != "none" and load_size not in self.caches:
            cache = ImageCache(self.manifest, load_size, mode, self.run.cache_folder)
            self.caches[load_size] = cache
        return self.caches.get(load_size)

    def _plan(self) -> TrainingPlan:
        config = self.config
        counts = {split: len(self.manifest.rows(split)) for split in SPLITS}
        labels = self.manifest.labels[self.manifest.rows("train")]
        images = images_per_epoch(labels, config.balanced)
        assert isinstance(config.batch_size, int), "resolve() fills the automatic settings"
        assert config.lr is not None
        assert config.workers is not None
        return TrainingPlan(
            run=str(self.run.path),
            backbone=config.backbone,
            parameters=sum(parameter.numel() for parameter in self.network.parameters()),
            method=config.method,
            device=str(self.runtime.device),
            precision=self.runtime.precision,
            classes=self.manifest.num_classes,
            train_images=counts["train"],
            val_images=counts["val"],
            test_images=counts["test"],
            image_size=self.preprocessing.image_size,
            epochs=config.epochs,
            first_epoch=self.epoch,
            batches=-(-images // (config.batch_size * self.group.processes)),
            batch_size=config.batch_size,
            optimizer=config.optimizer,
            lr=config.lr,
            workers=config.workers,
            processes=self.group.processes,
        )
