"""A training in progress: the loop over epochs and batches, and its state."""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from elrcli.config import TrainConfig
from elrcli.data.loader import Batch, RowLoader, images_per_epoch
from elrcli.data.manifest import Manifest, manifest_text
from elrcli.data.rows import SPLITS
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
    Group,
    SharedSignal,
    batch_statistics,
    is_lost,
    own_state,
    what_nccl_says,
    whole_state,
)
from elrcli.engine.epoch import PartOfEpoch
from elrcli.engine.features import Features, look_at_images
from elrcli.engine.finite import STEPS_BETWEEN_LOOKS, WHAT
from elrcli.engine.graphs import compute_again, replay_on_gpu
from elrcli.engine.inference import predict_batches
from elrcli.engine.interrupts import StopSignals
from elrcli.engine.learner import Learner
from elrcli.engine.loaders import Loaders
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
from elrcli.engine.optimizers import restore_optimizer
from elrcli.engine.samples import OwnSamples
from elrcli.engine.unreadable import UnreadableImages, too_many_unreadable
from elrcli.errors import (
    DataError,
    NotWritten,
    OutOfMemory,
    TrainingError,
    first_line,
    legible,
    named,
)
from elrcli.files import csv_text, write_text
from elrcli.methods.averages import WeightAverage
from elrcli.methods.sending import sent
from elrcli.methods.table import TableChoice
from elrcli.models import Preprocessing, members, training_mode
from elrcli.run import RunFolder

SECONDS_BETWEEN_CURVES = 30.0
MOST_HALVINGS = 3  # of the learning rate, with --on-nan retry
LEAST_SCALE = 2.0**-10  # of losses in fp16: it is halved after each gradient that is not finite


class Training:
    """One run in progress: what the loop works on and what a checkpoint holds.

    Each of several processes keeps tables of its own samples alone. Places in these are not
    manifest rows.
    """

    def __init__(
        self,
        config: TrainConfig,
        manifest: Manifest,
        run: RunFolder,
        network: nn.Module,
        runtime: Runtime,
        preprocessing: Preprocessing,
        group: Group,
        tables: TableChoice,
    ) -> None:
        self.config = config
        self.manifest = manifest
        self.run = run
        self.runtime = runtime
        self.preprocessing = preprocessing
        self.group = group
        self.epoch = 0  # the one in progress or the next one
        self.part: PartOfEpoch | None = None  # None between two epochs
        self.metrics: list[dict[str, float]] = []
        self.unreadable = UnreadableImages(manifest, config.max_unreadable)
        if group.processes > 1:
            self._check_same(manifest_text(manifest))
        self.samples = OwnSamples(manifest, group, config.seed, runtime.device)
        self.tables = tables
        rows = self.samples.share.rows
        self.learner = Learner(config, network, manifest, rows, runtime, self.tables, group)
        self.plan = self._plan()
        self.loaders = Loaders(
            config,
            manifest,
            self.samples.share,
            preprocessing.image_size,
            run.cache_folder,
            pin_memory=runtime.device.type == "cuda",
        )
        self.signal = SharedSignal(group)
        self.processes_before = group.processes
        self.precision_before = runtime.precision
        self.is_replayed = False  # by CUDA graphs
        self.saved_at = time.monotonic()
        self.writer = BackgroundWriter()

    @property
    def command(self) -> str:
        """What goes on with this run when it has ended early."""
        return f"elr train --resume {shlex.quote(str(self.run.path))}"

    @property
    def remedy(self) -> str:
        """The same, as a sentence of a message."""
        return f"Continue with: {self.command}"

    def run_to_end(self, observer: Observer, *, for_audit: bool) -> RunFolder:
        """Train the remaining epochs, saving after each, and write the results."""
        self._check_same(f"epoch {self.epoch} {self.part and self.part.batches}")
        if self.config.tensorboard and self.group.is_first:
            from elrcli.engine.tensorboard import TensorBoardObserver

            observer = TensorBoardObserver(self.run.tensorboard_folder, observer)
        loader = self.loaders.train()
        held_out = {split: self.loaders.held_out(split) for split in ("val", "test")}
        observer.training_started(dataclasses.replace(self.plan, first_epoch=self.epoch))
        if self.processes_before != self.group.processes:
            observer.note(
                f"begun by {self.processes_before} processes, goes on with {self.group.processes}: "
                f"{self.plan.batch_size * self.group.processes} images per step instead of "
                f"{self.plan.batch_size * self.processes_before}"
            )
        if self.precision_before != self.runtime.precision:
            observer.note(
                f"begun in {self.precision_before}, goes on in {self.runtime.precision},"
                f" as {self.runtime.device} does"
            )
        if self.part is not None:
            done = self.part.batches["train"]
            observer.note(
                f"goes on in epoch {self.epoch + 1} after {done} of {len(loader)} batches"
            )
        if self.tables.note is not None:
            observer.note(self.tables.note)
        self._replay_steps(loader, held_out, observer)
        with StopSignals() as stop, self._failures_explained(stop), self.writer:
            try:
                self._run_epochs(loader, held_out, observer, stop)
            finally:
                compute_again(self.learner.method.modules())  # what is captured holds memory
            self._draw_curves()
            self._save_model()
            no_features = self.group.from_first(lambda: not self.run.features_file.is_file())
            if for_audit and no_features:
                self._look_at_all_images(observer, stop)
            stop.raise_if_received(self.command)
        if len(self.unreadable) > 0:
            observer.note(
                f"{len(self.unreadable)} images could not be read and were left out:"
                f" {self.run.unreadable_file}"
            )
        return self.run

    def _run_epochs(
        self,
        loader: RowLoader,
        held_out: Mapping[str, RowLoader],
        observer: Observer,
        stop: StopSignals,
    ) -> None:
        """Train the remaining epochs, saving after each."""
        drawn_at = time.monotonic()
        while self.epoch < self.config.epochs:
            is_last = self.epoch + 1 == self.config.epochs
            try:
                row = self._finish_epoch(loader, held_out, observer, stop)
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
                self._end_if_told(stop)

    def _replay_steps(
        self, loader: RowLoader, held_out: Mapping[str, RowLoader], observer: Observer
    ) -> None:
        """Let a GPU replay the network's passes where every batch is one pass and one step."""
        config, method, network = self.config, self.learner.method, self.learner.network
        is_whole = method.takes_whole_batches and config.accumulate == 1
        is_alone = self.runtime.device.type == "cuda" and self.group.processes == 1
        is_over = self.epoch == config.epochs
        if not (config.cuda_graphs and is_whole and is_alone) or config.compile or is_over:
            return
        training_mode(network, config.freeze)
        averages = [m.network for m in method.modules() if isinstance(m, WeightAverage)]
        learned = {size for size in loader.batch_sizes if size > 1}
        judged = {size for one in held_out.values() for size in one.batch_sizes}
        if averages or config.mixup:  # the targets follow a prediction in eval mode
            judged |= learned
        problem = replay_on_gpu(
            learning=members(network),
            judging=[*members(method.prediction_network()), *averages],
            learning_sizes=learned,
            judging_sizes=judged - {0},
            runtime=self.runtime,
            prepared=self.preprocessing,
        )
        self.is_replayed = problem is None
        if problem is not None:
            observer.note(f"without CUDA graphs, somewhat slower: {problem}")

    def _finish_epoch(
        self,
        loader: RowLoader,
        held_out: Mapping[str, RowLoader],
        observer: Observer,
        stop: StopSignals,
    ) -> dict[str, float]:
        """Train what is left of the epoch and return its row of metrics."""
        part = self._part_of_epoch()
        totals = self._train_epoch(loader, observer, stop)
        if part.batches["val"] == part.batches["test"] == 0:
            self.group.average(batch_statistics(self.learner.method))
        is_last = self.epoch + 1 == self.config.epochs
        for split in ("val", "test") if is_last else ("val",):
            self._observe_held_out(split, held_out[split], observer, stop)
        return self._epoch_metrics(totals, part)

    def _begin_again(self, error: Diverged, observer: Observer) -> None:
        """Go back to the beginning of the epoch with half the learning rate, or give up.

        Not to the last checkpoint: when that was made is chance.
        """
        if self.config.on_nan == "stop" or self.learner.halvings == MOST_HALVINGS:
            also = f", even at {self.learner.peak_lr:g}" if self.learner.halvings else ""
            retry = "" if self.learner.halvings else " or --on-nan retry"
            raise Diverged(
                f"{error}{also}. Train again with a lower --lr, --clip-grad 1{retry}."
                " The state before the epoch is saved."
            ) from error
        halvings = self.learner.halvings + 1
        self.writer.finish()
        self.group.wait()  # for the first process to have written
        state = load_checkpoint(
            self.run.checkpoint_folder,
            problem=lambda state: None if state.get("part") is None else "within an epoch",
        )
        self.load_state_dict(state)
        self.learner.halvings = halvings
        self.learner.forget_step()
        self.save()
        observer.note(
            f"{error}. Epoch {self.epoch + 1} begins again with half the learning rate,"
            f" {self.learner.peak_lr:g}"
        )

    def _look_for_bad_numbers(self) -> None:
        """Raise Diverged in all processes if any had numbers that are not finite."""
        own = self.learner.finite.look()
        found = None
        if own is not None:
            images = named([legible(self.manifest.paths[row]) for row in own.rows])
            # A bad gradient is everybody's, a bad loss that of one process.
            found = WHAT.index(own.what), own.number, images
        told = self.group.gather((found, self.learner.scaler.get_scale()))
        bad = [one for one, _ in told if one is not None]
        if not bad and min(scale for _, scale in told) < LEAST_SCALE:
            raise Diverged(
                f"hardly any gradient is a finite number in fp16 in epoch {self.epoch + 1};"
                " --precision fp32 has a wider range"
            )
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
            self.part = PartOfEpoch(self.learner.record.prediction.clone(), totals)
        return self.part

    def _end_if_told(self, stop: StopSignals) -> None:
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
            stop.raise_if_received(self.command)

    def _is_time_to_save(self) -> bool:
        now = time.monotonic()
        is_time = self.group.is_first and now - self.saved_at >= 60 * self.config.checkpoint_minutes
        if is_time:
            self.saved_at = now
        return is_time

    @contextmanager
    def _failures_explained(self, stop: StopSignals) -> Iterator[None]:
        """Turn what a signal caused into `Interrupted`, and known failures into advice."""
        try:
            yield
        except NotWritten as error:
            raise NotWritten(f"{error} The last checkpoint is intact. {self.remedy}") from error
        except Diverged:  # the state is not worth saving, whatever signal came in
            raise
        except (RuntimeError, TrainingError) as error:
            if is_lost(error):  # torchrun sends SIGTERM then: that is not the cause
                raise TrainingError(
                    "another process of this training has ended. Its own message, or that of "
                    f"torchrun, says why.{what_nccl_says(error)} {self.remedy}"
                ) from error
            stop.settle()
            is_whole = self.part is not None and self.part.is_between_steps
            if stop.received is not None and is_whole and self.group.processes == 1:
                self.save()
            stop.raise_if_received(self.command)
            if is_out_of_memory(error, self.runtime.device):
                traceback.clear_frames(error.__traceback__)  # they hold activations
                raise OutOfMemory(self._memory_remedy()) from error
            if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                problem = first_line(error)
                raise TrainingError(f"--compile failed ({problem}). Leave it out.") from error
            raise

    def _memory_remedy(self) -> str:
        """Return which batch fits instead of the one that did not; this training is over."""
        self.learner.free()
        release_memory(self.runtime.device)
        remedy = BatchTrial(
            self.config,
            self.manifest,
            self.samples,
            self.runtime,
            self.preprocessing,
            self.group.processes,
            self.tables,
        ).after_failure()
        if self.is_replayed:
            remedy += " CUDA graphs take memory too; --no-cuda-graphs does without."
        return f"{remedy} With the same --out, add --overwrite."

    def _train_epoch(self, loader: RowLoader, observer: Observer, stop: StopSignals) -> EpochTotals:
        """Learn from what is left of the epoch's batches; return sums over all processes."""
        accumulate, learner = self.config.accumulate, self.learner
        training_mode(learner.network, self.config.freeze)
        part = self._part_of_epoch()
        first, total = part.batches["train"], loader.images
        done = total * first // len(loader)
        stage = f"epoch {self.epoch + 1}/{self.config.epochs}"
        batches = part.totals.time_waiting(loader.epoch(self.epoch, first))
        for number, batch in enumerate(batches, start=first):
            part.is_between_steps = False
            self.unreadable.add(batch.unreadable)
            part.unreadable += len(batch.unreadable)
            self._check_readable(part.unreadable, total)
            done += self._count(batch)
            is_due = (number + 1) % accumulate == 0 or number + 1 == len(loader)
            if len(batch.index) > 0:
                first_of_step = number - number % accumulate
                share = 1 / min(accumulate, len(loader) - first_of_step)
                self._learn_from(batch, number, part.totals, share=share, is_last=is_due)
            elif learner.waits_for_others:
                raise TrainingError("--sync-bn: no image of a batch can be read. Leave it out.")
            if is_due:
                learner.step(learner.lr(self.epoch + (number + 1) / len(loader)), number)
                part.has_done("train", number + 1)
            observer.progress(stage, min(done, total), total)
            if is_due:
                self._end_if_told(stop)
            if (number + 1 - first) % STEPS_BETWEEN_LOOKS == 0:
                self._look_for_bad_numbers()
        self._look_for_bad_numbers()
        totals = part.totals.of_all(self.group)
        if totals.images == 0:
            self.unreadable.share(self.group)
            raise DataError(self.unreadable.nothing_readable())
        if self.group.processes > 1:  # so far each has judged by its own images
            self.unreadable.share(self.group)
            found = self.group.sum(torch.tensor([part.unreadable]))
            self._check_readable(int(found), total)
        if not learner.is_finite():
            raise Diverged("a weight is no longer a finite number")
        return totals

    def _learn_from(
        self, batch: Batch, number: int, totals: EpochTotals, *, share: float, is_last: bool
    ) -> None:
        """Add the gradient of a batch of images: the way of a sample through the network."""
        labels = sent(batch.labels, self.runtime.device)
        index = self._index(batch)
        images = self.runtime.normalise(batch.images, self.preprocessing)
        generator = self._seed_step(self.epoch, number)
        step = self.learner.add_gradient(
            images, labels, index, self.epoch, generator, share=share, is_last=is_last
        )
        self.learner.finite.loss(step.loss, number, batch.index)
        totals.add(step, len(index))

    def _index(self, batch: Batch) -> Tensor:
        """Return the places of a batch in this process's tables, on the device."""
        return self.learner.expect(self.samples.share.places(batch.index))

    def _count(self, batch: Batch) -> int:
        """Return how many images all processes are through with when this one has a batch."""
        return (len(batch.index) + len(batch.unreadable)) * self.group.processes

    def _check_readable(self, unreadable: int, images: int) -> None:
        """Raise DataError if that many `unreadable` training images of an epoch are too many."""
        problem = self.unreadable.too_many(unreadable, images, self.run.unreadable_file)
        if problem is not None:
            self.writer.finish()
            self.save_tables()
            raise DataError(problem)

    def _seed_step(self, epoch: int, number: int) -> torch.Generator:
        """Make all randomness of a step (dropout, mixup) a function of what is named here."""
        words = [self.config.seed, epoch, number, self.group.rank]
        seed = int(np.random.SeedSequence(words).generate_state(1)[0])
        seed_generators(seed, self.runtime.device)
        return torch.Generator().manual_seed(seed)

    def _observe_held_out(
        self, split: str, loader: RowLoader, observer: Observer, stop: StopSignals
    ) -> None:
        """Let targets and record take the predictions for rows that training does not touch."""
        learner, part = self.learner, self._part_of_epoch()
        first, total = part.batches[split], len(self.manifest.rows(split))
        done = total * first // max(len(loader), 1)
        batches = predict_batches(
            learner.method.predict, loader, self.runtime, self.preprocessing, first
        )
        for number, (probs, batch) in enumerate(batches, start=first):
            part.is_between_steps = False
            self.unreadable.add(batch.unreadable)
            done += self._count(batch)
            if len(batch.index) > 0:
                index = self._index(batch)
                learner.finite.prediction(probs, number, batch.index)
                learner.method.observe(probs, index)
                labels = self.samples.labels[index]
                learner.record.update(probs, labels, index, self.epoch, probs)
            part.has_done(split, number + 1)
            observer.progress(split, min(done, total), total)
            self._end_if_told(stop)
        self._look_for_bad_numbers()

    def _look_at_all_images(self, observer: Observer, stop: StopSignals) -> None:
        """Save features and thumbnails of every image: an audit finds neighbours by them."""
        network, share = self.learner.method.prediction_network().eval(), self.samples.share
        own = Features.empty(len(share.rows))
        loader, done, total = self.loaders.every_image(), 0, len(self.manifest)
        known, lost = len(self.unreadable), list[int]()
        for look in look_at_images(network, loader, self.runtime, self.preprocessing):
            own.keep(look, share.places(look.batch.index).numpy())
            done += self._count(look.batch)
            self.unreadable.add(look.batch.unreadable)
            lost += [row for row, _ in look.batch.unreadable]
            observer.progress("features", min(done, total), total)
            self._end_if_told(stop)
        self._check_still_there(lost)
        self.unreadable.share(self.group)
        if len(self.unreadable) > known:  # in a balanced training, of images that no epoch drew
            self.save()
        vectors, thumbnails = (
            self.group.whole(torch.from_numpy(part), self.samples.owner).numpy()
            for part in (own.vectors, own.thumbnails)
        )
        if self.group.is_first:
            Features(vectors, thumbnails).save(self.run.features_file)

    def _check_still_there(self, lost: list[int]) -> None:
        """Raise DataError if too many rows are `lost` that were read before: a disk is away."""
        places = self.samples.share.places(torch.tensor(lost, dtype=torch.int64))
        was_read = self.learner.record.visits.cpu()[places] > 0
        gone = int(self.group.sum(was_read.sum()[None]))
        if too_many_unreadable(gone, len(self.manifest), self.config.max_unreadable):
            raise DataError(
                f"{self.manifest.root}: {gone:,} images that training has read cannot be read any"
                f" more. Bring them back. {self.remedy}"
            )

    def _epoch_metrics(self, totals: EpochTotals, part: PartOfEpoch) -> dict[str, float]:
        samples, learner, group = self.samples, self.learner, self.group
        train, record = samples.places["train"], learner.record
        train = train[~record.given_prob[train, self.epoch].isnan()]  # what this epoch has drawn
        predicted = record.prediction
        row: dict[str, float] = {
            "epoch": self.epoch + 1,
            "lr": learner.lr(self.epoch + 1),
            "seconds": part.seconds,
            **loss_metrics(totals),
            **agreement_metrics(
                predicted[train],
                part.before[train],
                learner.method.target_classes(train),
                samples.labels[train],
                group,
            ),
        }
        if samples.truth is not None:
            row |= memorisation_metrics(
                predicted[train], samples.labels[train], samples.truth[train], group
            )
        for split in ("val", "test"):
            places = samples.places[split]
            truth = None if samples.truth is None else samples.truth[places]
            given_prob = record.given_prob[places, self.epoch]
            row |= held_out_metrics(
                split, predicted[places], given_prob, samples.labels[places], truth, group
            )
        return row

    def save(self, *, wait: bool = True) -> None:
        """Write the checkpoint, then the text files that follow from it.

        Without `wait` the files are written while training goes on.
        """
        self.unreadable.share(self.group)
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
        return {
            self.run.metrics_file: csv_text(self.metrics, METRIC_COLUMNS),
            self.run.unreadable_file: csv_text(self.unreadable.table(), ("path", "reason")),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resume needs; the samples of all processes on the first one."""
        learner, group, samples = self.learner, self.group, self.samples
        part = self.part and self.part.state(samples, group, batch_statistics(learner.method))
        return {
            "epoch": self.epoch,
            "processes": group.processes,
            "precision": self.runtime.precision,
            "method": whole_state(learner.method, group, samples.owner),
            "record": whole_state(learner.record, group, samples.owner),
            "optimizer": learner.optimizer.state_dict()["state"],
            "scaler": learner.scaler.state_dict(),
            "halvings": learner.halvings,
            "metrics": self.metrics,
            "unreadable": self.unreadable.state(),
            "part": part,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state that `state_dict` returned; what does not fit raises something."""
        learner, samples = self.learner, self.samples
        self.epoch = range(self.config.epochs + 1)[state["epoch"]]
        learner.halvings = range(MOST_HALVINGS + 1)[state["halvings"]]
        self.processes_before = int(state.get("processes", 1))
        self.precision_before = str(state.get("precision", self.runtime.precision))
        for module, saved in ((learner.method, state["method"]), (learner.record, state["record"])):
            own = own_state(module, saved, samples.share.rows, len(self.manifest))
            module.load_state_dict(own)
        restore_optimizer(learner.optimizer, state["optimizer"])
        if state["scaler"]:  # empty if the run began without fp16, on another device
            learner.scaler.load_state_dict(state["scaler"])
        self.metrics = [
            {name: float(value) for name, value in row.items()} | {"epoch": int(row["epoch"])}
            for row in state["metrics"]
        ]
        self.unreadable.load_state(state["unreadable"])
        self.part = None
        if state["part"] is not None:
            statistics = batch_statistics(learner.method)
            self.part = PartOfEpoch.from_state(
                state["part"], samples, self.group, statistics, self.runtime.device
            )

    def _draw_curves(self) -> None:
        if self.group.is_first:
            from elrcli.plots import curves_svg  # only here: matplotlib would delay the first step

            write_text(self.run.curves_file, curves_svg(self.metrics))

    def _save_model(self) -> None:
        if not self.group.is_first:
            return
        weights = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in self.learner.method.prediction_network().state_dict().items()
        }
        write_tensors(self.run.model_file, weights)

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
            parameters=sum(parameter.numel() for parameter in self.learner.network.parameters()),
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
