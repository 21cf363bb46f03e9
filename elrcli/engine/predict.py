"""Classifying images with a finished run."""

from __future__ import annotations

import math
import shlex
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import nn

from elrcli.data.loader import RowLoader
from elrcli.data.manifest import Manifest, StringTable
from elrcli.data.shares import Share
from elrcli.data.transforms import eval_transform
from elrcli.engine.device import Runtime, blank_images, choose_runtime, worker_count
from elrcli.engine.distributed import current_group, joined
from elrcli.engine.features import Look, look_at_images
from elrcli.engine.inference import predict_batches
from elrcli.engine.memory import is_out_of_memory, largest_fitting, memory_explained
from elrcli.engine.observer import Observer
from elrcli.errors import ConfigError, OutOfMemory, RunError
from elrcli.models import Preprocessing, lay_out, load_weights, network_of
from elrcli.run import RunFolder
from elrcli.weights import check_classes

NOT_FINITE = "the prediction is not a finite number"
NO_IMAGES = torch.empty(0, 3, 0, 0, dtype=torch.uint8)


@dataclass(frozen=True)
class Prediction:
    """The result for one image: probabilities [K] in class order, or the reason for none."""

    path: str
    probabilities: np.ndarray | None
    error: str | None = None


@dataclass(frozen=True)
class Predictor:
    """The network of a run, ready on a device.

    Several processes each predict a part of the images and are told the predictions of all.
    """

    network: nn.Module
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    runtime: Runtime

    @classmethod
    def load(cls, run_path: Path, *, device: str = "auto", precision: str = "auto") -> Predictor:
        """Load the weights that `elr train` left in the run."""
        run = RunFolder.open(run_path)
        if not run.model_file.is_file():
            raise RunError(
                f"{run_path}: holds no model.safetensors, training has not finished. "
                f"Continue with: elr train --resume {shlex.quote(str(run_path))}"
            )
        config, classes = run.train_config(), run.classes()
        runtime = choose_runtime(device, precision)
        check_classes(run.model_file, len(classes))
        network = network_of(config, len(classes))
        load_weights(network, run.model_file)
        with memory_explained(runtime.device, "Choose another --device."):
            lay_out(network.eval(), runtime.device)
        return cls(network, classes, stored_preprocessing(run), runtime)

    def manifest_batches(
        self,
        manifest: Manifest,
        rows: np.ndarray,
        *,
        batch_size: int = 64,
        workers: int | None = None,
    ) -> Iterator[tuple[np.ndarray, np.ndarray, tuple[tuple[int, str], ...]]]:
        """Yield (rows [B], probabilities [B, K] fp32, unreadable (row, reason)) in row order.

        An image whose prediction is not a finite number is among the unreadable ones.
        """
        loader = self._loader(manifest, rows, batch_size, workers)
        batches = predict_batches(self.network, loader, self.runtime, self.preprocessing)
        own = (
            (batch.index.numpy(), probs.cpu().numpy(), batch.unreadable) for probs, batch in batches
        )
        try:
            for parts in current_group().in_turn(own):
                index, probs, unreadable = zip(*parts, strict=True)
                seen = np.concatenate(index)
                order = np.argsort(seen)  # each process had every n-th row
                whole = np.concatenate([part.reshape(-1, len(self.classes)) for part in probs])
                is_good = np.isfinite(whole).all(axis=1)
                lost = tuple((int(row), NOT_FINITE) for row in seen[~is_good])
                order = order[is_good[order]]
                yield seen[order], whole[order], tuple(sorted(sum(unreadable, lost)))
        except RuntimeError as error:
            if not is_out_of_memory(error, self.runtime.device):
                raise
            traceback.clear_frames(error.__traceback__)  # what they hold would be in the way
            remedy = self._memory_remedy(batch_size)
            raise OutOfMemory(f"{self.runtime.device}: out of memory. {remedy}") from error

    def _memory_remedy(self, failed: int) -> str:
        """Return what to do after so many images at once did not fit."""
        fitting = None
        if failed > 1:
            fitting = largest_fitting(-(-failed // 2), self._predict_blank, self.runtime.device)
        if fitting is None:
            return "Not even a single image fits. Choose another --device."
        return f"Add --batch-size {fitting}, which fits."

    @torch.inference_mode()
    def _predict_blank(self, images: int) -> None:
        with self.runtime.autocast():
            self.network(blank_images(images, self.runtime, self.preprocessing))

    def looks(self, manifest: Manifest) -> Iterator[Look]:
        """Yield predictions and features of every image, without the image."""
        loader = self._loader(manifest, np.arange(len(manifest)), 64, None)
        looks = look_at_images(self.network, loader, self.runtime, self.preprocessing)
        own = (look._replace(batch=look.batch._replace(images=NO_IMAGES)) for look in looks)
        with memory_explained(self.runtime.device, "Choose another --device."):
            yield from chain.from_iterable(current_group().in_turn(own))

    def _loader(
        self, manifest: Manifest, rows: np.ndarray, batch_size: int, workers: int | None
    ) -> RowLoader:
        for option, value, least in (("--batch-size", batch_size, 1), ("--workers", workers, 0)):
            if value is not None and value < least:
                raise ConfigError(f"{option} {value}: must be at least {least}.")
        group = current_group()
        if workers is None:  # a process takes longer to start than to load a few hundred images
            workers = min(worker_count(None), len(rows) // (200 * group.processes))
        return RowLoader(
            manifest,
            rows,
            eval_transform(self.preprocessing.image_size),
            batch_size=batch_size,
            workers=workers,
            seed=0,
            shuffle=False,
            share=Share(rows[group.rank :: group.processes], group.processes),
            pin_memory=self.runtime.device.type == "cuda",
        )


def predict_images(
    run_path: Path,
    files: Sequence[Path],
    *,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int = 64,
    workers: int | None = None,
    observer: Observer | None = None,
) -> Iterator[Prediction]:
    """Yield one prediction per file, in the order given.

    A file that cannot be read gets a prediction whose `error` says why.
    """
    with joined():
        predictor = Predictor.load(run_path, device=device, precision=precision)
        yield from _predictions(predictor, files, batch_size, workers, observer)


def _predictions(
    predictor: Predictor,
    files: Sequence[Path],
    batch_size: int,
    workers: int | None,
    observer: Observer | None,
) -> Iterator[Prediction]:
    manifest = Manifest(
        root=Path(),
        paths=StringTable([str(file) for file in files]),
        labels=np.zeros(len(files), dtype=np.int32),
        splits=np.zeros(len(files), dtype=np.int8),
        classes=predictor.classes,
    )
    done = 0
    for rows, probs, unreadable in predictor.manifest_batches(
        manifest, np.arange(len(files)), batch_size=batch_size, workers=workers
    ):
        found = {
            int(row): Prediction(manifest.paths[int(row)], prob)
            for row, prob in zip(rows, probs, strict=True)
        }
        for row, reason in unreadable:
            found[row] = Prediction(manifest.paths[row], None, reason)
        for row in sorted(found):
            yield found[row]
        done += len(found)
        if observer is not None:
            observer.progress("predict", done, len(files))


def stored_preprocessing(run: RunFolder) -> Preprocessing:
    """Return the preprocessing that the run was trained with."""
    try:
        stored = run.config()["preprocessing"]
        size = int(stored["image_size"])
        mean = tuple(float(value) for value in stored["mean"])
        std = tuple(float(value) for value in stored["std"])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise RunError(f"{run.config_file}: holds no valid preprocessing.") from None
    are_finite = all(math.isfinite(value) for value in mean + std)
    if not (8 <= size <= 4096 and len(mean) == len(std) == 3 and are_finite and min(std) > 0):
        raise RunError(f"{run.config_file}: holds no valid preprocessing.")
    return Preprocessing(size, mean, std)
