"""Training: from settings to a finished run folder."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

import elrcli
from elrcli.config import AUTO, TrainConfig
from elrcli.data.folders import left_out
from elrcli.data.manifest import FOREIGN_TRUTH, NO_CLASS, Manifest, manifest_text
from elrcli.data.samples import load_samples
from elrcli.engine.automatic import open_settings, resolve, table_choice
from elrcli.engine.batch_size import with_fitting_batch
from elrcli.engine.checkpoints import load_checkpoint
from elrcli.engine.device import Runtime, choose_runtime, worker_count
from elrcli.engine.distributed import Group, current_group, joined
from elrcli.engine.memory import memory_explained
from elrcli.engine.observer import Observer
from elrcli.engine.predict import stored_preprocessing
from elrcli.engine.training import Training
from elrcli.errors import ConfigError, DataError, ModelError, RunError, folded, legible, named
from elrcli.files import json_text, write_text
from elrcli.methods.table import row_columns
from elrcli.models import (
    Preprocessing,
    check_image_size,
    create_network,
    has_batch_norm,
    network_of,
    preprocessing,
)
from elrcli.run import RunFolder, new_path

NETWORK_TOO_LARGE = "Choose a smaller --backbone, or another --device."


@joined()
def fit(
    config: TrainConfig,
    out: Path | None = None,
    *,
    samples: Manifest | None = None,
    overwrite: bool = False,
    for_audit: bool = True,
    observer: Observer | None = None,
) -> RunFolder:
    """Train as `config` says and return the run folder.

    `samples` are those of `config` where they have been loaded already. `out` defaults to
    `runs/<data>-<backbone>-<time>`. Processes started by torchrun train together. `for_audit`
    saves what an audit looks at beside the checkpoint: features of every image, one more pass over
    the data. Raises DataError, ModelError, RunError, TrainingError or OutOfMemory; Interrupted
    after SIGINT or SIGTERM, with the state saved; EndedByAnother if another process failed first.
    """
    group = current_group()
    runtime = _joint_runtime(config, group)
    if config.tensorboard:
        from elrcli.engine.tensorboard import writer_class

        writer_class()  # say that the package is missing before anything is written
    if out is not None:  # say so before the work, which takes minutes
        group.from_first(lambda: RunFolder(out).check_free(overwrite=overwrite))
    manifest = load_samples(config) if samples is None else samples
    if len(manifest.rows("train")) < 2:
        raise DataError(f"{config.data}: too few training images. At least 2 are needed.")
    torch.manual_seed(config.seed)
    network = create_network(
        config.backbone,
        manifest.num_classes,
        pretrained=config.pretrained,
        weights=config.weights,
        small_input=config.small_input,
        image_size=config.image_size,
        copies=config.networks,
    )
    prepared = preprocessing(network, config.image_size)
    check_image_size(network, prepared.image_size)
    _check_sync_bn(config, network, runtime, group)
    observer = observer or Observer()
    unseen = _classes_without_training(manifest)
    if unseen:
        observer.note(f"no training image of {unseen}: cannot be learned")
    if alike := _alike_classes(manifest.classes):
        observer.note(f"classes that differ only in case or Unicode form: {alike}")
    if manifest.truth is not None and (foreign := int((manifest.truth == NO_CLASS).sum())):
        observer.note(f"{foreign:,} true labels {FOREIGN_TRUTH}")
    for line in left_out(config.data):
        observer.note(line)
    if config.schedule == "step" and min(config.milestones, default=0) >= config.epochs:
        observer.note("the first of --milestones is beyond the last epoch: --lr stays")
    tries_batches = config.batch_size == AUTO
    config = resolve(config, manifest, network, prepared, group.processes)
    tables = table_choice(config, manifest, runtime, group)
    config = config.replace(table=tables.form)
    if tries_batches:
        config = with_fitting_batch(config, manifest, runtime, prepared, group, observer, tables)

    def create() -> None:
        RunFolder.create(run.path, overwrite=overwrite)
        write_text(run.config_file, _config_text(config, manifest, prepared))
        write_text(run.classes_file, json_text({"classes": list(manifest.classes)}))
        write_text(run.manifest_file, manifest_text(manifest))

    kind = config.backbone.replace("/", "_").replace(":", "_")
    run = group.from_first(lambda: RunFolder(out or new_path(config.data, kind)))
    with run.locked() if group.is_first else nullcontext():
        group.from_first(create)
        with memory_explained(runtime.device, NETWORK_TOO_LARGE):
            training = Training(config, manifest, run, network, runtime, prepared, group, tables)
        training.save()
        return training.run_to_end(observer, for_audit=for_audit)


@joined()
def resume(
    run_path: Path,
    changes: Mapping[str, Any] = MappingProxyType({}),
    *,
    for_audit: bool = True,
    observer: Observer | None = None,
) -> RunFolder:
    """Continue a run from its last checkpoint, with as many processes as there are now.

    With as many as before it goes on in the middle of an epoch, otherwise from an epoch's end. A
    finished run is returned as it is. `changes` are other settings of the machine, for this time.
    `for_audit` as for `fit`.
    """
    run = RunFolder.open(run_path)
    group = current_group()
    run.config()  # settings that cannot be read are named before anything is locked
    with run.locked() if group.is_first else nullcontext():
        return _go_on(run, group, changes, observer or Observer(), for_audit)


def _go_on(
    run: RunFolder, group: Group, changes: Mapping[str, Any], observer: Observer, for_audit: bool
) -> RunFolder:
    if group.is_first:
        run.remove_leftovers()
    made = run.train_config()
    if open_settings(made):
        raise RunError(f"{run.config_file}: holds automatic settings. Train again.")
    config = made.replace(**changes)
    config = config.replace(workers=worker_count(config.workers))
    manifest = run.manifest()

    def problem(state: Mapping[str, Any]) -> str | None:
        if state.get("part") is None or state.get("processes") == group.processes:
            return None
        return f"saved within an epoch by {state.get('processes')} processes"

    state = load_checkpoint(run.checkpoint_folder, observer.note, problem)
    _check_size(run, state, manifest, config)
    network = network_of(config, manifest.num_classes)
    runtime = _joint_runtime(config, group)
    _check_sync_bn(config, network, runtime, group)
    prepared = stored_preprocessing(run)
    tables = table_choice(config, manifest, runtime, group)
    with memory_explained(runtime.device, NETWORK_TOO_LARGE):
        training = Training(config, manifest, run, network, runtime, prepared, group, tables)
    try:
        training.load_state_dict(state)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(
            f"{run.checkpoint_folder}: does not fit the run ({reason}). Train again."
        ) from None
    del state  # as large as the tables
    if group.is_first:
        training.save_tables()  # a kill may have come between the checkpoint and these
    is_there = group.from_first(lambda: run.is_finished(for_audit=for_audit))
    if is_there and training.epoch == config.epochs:
        observer.note(f"{run.path}: finished before, nothing left to train")
        return run
    return training.run_to_end(observer, for_audit=for_audit)


def _check_size(
    run: RunFolder, state: Mapping[str, Any], manifest: Manifest, config: TrainConfig
) -> None:
    """Raise RunError before tables are made for samples, classes and epochs of another run."""
    epochs = config.epochs
    try:
        record = state["record"]
        found = (*record["prob_sum"].shape, *record["given_prob"].shape)
    except (KeyError, TypeError, AttributeError):
        found = ()
    samples = len(manifest)
    columns = row_columns(config.table, manifest.num_classes)
    if found != (samples, columns, samples, epochs):
        raise RunError(
            f"{run.checkpoint_folder}: does not fit the run ({samples:,} samples,"
            f" {manifest.num_classes:,} classes, {epochs:,} epochs). Train again."
        )


def _joint_runtime(config: TrainConfig, group: Group) -> Runtime:
    """Return the device of this process, and the precision that all processes can have."""
    runtime = choose_runtime(config.device, config.precision)
    precisions = group.gather(runtime.precision)
    common = next(kind for kind in ("fp32", "fp16", "bf16") if kind in precisions)
    return runtime if common == runtime.precision else choose_runtime(config.device, common)


def _classes_without_training(manifest: Manifest) -> str:
    """Return the names of classes that occur in other splits only."""
    seen = np.unique(manifest.labels[manifest.rows("train")])
    unseen = np.setdiff1d(np.arange(manifest.num_classes), seen)
    return named([f"'{legible(manifest.classes[label])}'" for label in unseen])


def _alike_classes(classes: Sequence[str]) -> str:
    """Return the names of classes that a person takes for the same."""
    count = Counter(folded(name) for name in classes)
    return named([f"'{legible(name)}'" for name in classes if count[folded(name)] > 1])


def _check_sync_bn(
    config: TrainConfig, network: torch.nn.Module, runtime: Runtime, group: Group
) -> None:
    if config.sync_bn and not has_batch_norm(network):
        raise ModelError("--sync-bn: this backbone has no BatchNorm. Leave it out.")
    if config.sync_bn and group.processes > 1 and runtime.device.type != "cuda":
        raise ConfigError(f"--sync-bn: needs CUDA, not {runtime.device}. Leave it out.")


def _config_text(config: TrainConfig, manifest: Manifest, prepared: Preprocessing) -> str:
    packages = ("torch", "timm", "albumentations", "numpy", "pillow")
    return json_text(
        {
            "elr": elrcli.__version__,
            "settings": config.to_dict(),
            "data_root": str(manifest.root),
            "preprocessing": dataclasses.asdict(prepared),
            "versions": {name: version(name) for name in packages},
        }
    )
