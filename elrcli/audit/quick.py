"""An audit without a run: train one that is made for it, or take up the one that is there."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from elrcli.config import (
    AUDIT_SETTINGS,
    AUTO,
    MACHINE_SETTINGS,
    READING_SETTINGS,
    TrainConfig,
    plain_name,
)
from elrcli.data.folders import image_paths
from elrcli.data.manifest import draw_validation, load_data, manifest_text
from elrcli.engine.checkpoints import has_checkpoint
from elrcli.engine.distributed import current_group, joined
from elrcli.engine.fit import fit, resume
from elrcli.engine.observer import Observer
from elrcli.errors import DataError, Interrupted, RunError, UsageError
from elrcli.run import RunFolder, new_path, remove_audit


def audit_config(data: Path, settings: Mapping[str, Any]) -> TrainConfig:
    """Return how a run for an audit is trained; `settings` win over AUDIT_SETTINGS."""
    return TrainConfig(**{**AUDIT_SETTINGS, **settings, "data": data})


@joined()
def run_for_audit(
    data: Path,
    settings: Mapping[str, Any],
    out: Path | None = None,
    *,
    overwrite: bool = False,
    observer: Observer | None = None,
) -> RunFolder:
    """Return a finished run on `data`, in `out/run` or in a new folder under `runs/`.

    A run that is in `out/run` already is reused if it has these `settings` and the same data,
    after its training has been finished where it was interrupted; `overwrite` trains it anew.
    """
    observer = observer or Observer()
    config = audit_config(data, settings)
    if not data.exists():
        raise DataError(f"{data}: no such file or folder. Name a run, or images to audit.")
    if RunFolder(data / "run").is_run() and not any(image_paths(str(data))):
        raise DataError(f"{data}: holds an audit, no images. Its run is {data / 'run'}.")
    if out is not None and out.exists() and out.samefile(data):
        raise DataError(f"{out}: is the folder of the images. Choose another --out.")
    if out is None and overwrite:
        raise UsageError("--overwrite: needs --out DIR. Without it every run is a new one.")
    group = current_group()
    run = RunFolder(
        group.from_first(lambda: new_path(data, "audit")) if out is None else out / "run"
    )

    def is_begun() -> bool:
        return run.is_run() and (run.is_finished() or has_checkpoint(run.checkpoint_folder))

    is_there = group.from_first(lambda: out is not None and not overwrite and is_begun())
    if is_there:
        ignored = {*READING_SETTINGS, *(MACHINE_SETTINGS if run.is_finished() else ())}
        _check_same(run, config, {*AUDIT_SETTINGS, *settings} - ignored)
        if run.is_finished():
            observer.note(f"{run.path}: trained before, used as it is")
            return run
        observer.note(f"{run.path}: goes on from its last epoch")
    try:
        if is_there:
            return resume(run.path, observer=observer)
        # What a kill left before its first checkpoint is nothing to keep.
        anew = group.from_first(lambda: overwrite or (out is not None and run.is_run()))
        if anew and out is not None:  # what an earlier audit says is of another run
            group.from_first(lambda: remove_audit(out))
        return fit(config, run.path, overwrite=anew, observer=observer)
    except Interrupted as error:
        command = ["elr", "audit", str(run.path)] + ([] if out is None else ["--out", str(out)])
        both = f"{error.command} && {shlex.join(command)}"
        raise Interrupted(error.signal_number, both) from None


def _check_same(run: RunFolder, config: TrainConfig, asked: Collection[str]) -> None:
    """Raise RunError unless the run was made with the settings `asked` and the same data."""
    remedy = "Add --overwrite, or choose another --out."
    made = run.train_config()
    differences = other_settings(made, config, asked)
    if differences:
        raise RunError(f"{run.path}: holds a run with other settings ({differences}). {remedy}")
    listed = load_data(config.data, config.reading, truth_column=made.truth_column)
    now = draw_validation(listed, made.val_fraction, made.seed)
    before = run.manifest()
    if now.root != before.root or manifest_text(now) != manifest_text(before):
        raise RunError(
            f"{run.path}: was trained on other data, or {config.data} has changed. {remedy}"
        )


def other_settings(made: TrainConfig, wanted: TrainConfig, asked: Collection[str]) -> str:
    """Return how a run differs in the settings `asked`, such as `epochs 8, not 12`.

    Where None is wanted, the choice was left to the run.
    """
    differences = []
    left_to_run = {"batch_size", "accumulate"} if wanted.batch_size == AUTO else set()
    for name in sorted(set(asked) - left_to_run):
        has, wants = getattr(made, name), getattr(wanted, name)
        if wants is not None and has != wants:
            differences.append(f"{plain_name(name)} {has}, not {wants}")
    return ", ".join(differences)
