"""Every command as a function. Each loads what it needs when it is called."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elrcli.config import (
    MACHINE_SETTINGS,
    TUNED_SETTINGS,
    Reading,
    TrainConfig,
    check_names,
)
from elrcli.engine.interrupts import interrupted_at_once
from elrcli.engine.launch import launch
from elrcli.engine.observer import Observer
from elrcli.errors import ConfigError, DataError, UsageError
from elrcli.presets import with_preset

if TYPE_CHECKING:
    from elrcli.audit.apply import Plan
    from elrcli.audit.result import AuditResult
    from elrcli.data.manifest import Manifest
    from elrcli.engine.doctor import DoctorReport
    from elrcli.engine.evaluate import Evaluation
    from elrcli.engine.predict import Prediction
    from elrcli.engine.tune import TuneResult
    from elrcli.run import RunFolder

AnyPath = str | os.PathLike[str]

OTHER_TABLES = (".tsv", ".json", ".jsonl", ".parquet")  # no names for a folder of images


def train(
    data: AnyPath,
    *,
    out: AnyPath | None = None,
    overwrite: bool = False,
    preset: str | None = None,
    for_audit: bool = True,
    observer: Observer | None = None,
    **settings: Any,
) -> RunFolder:
    """Train on a folder or a CSV file; `settings` are the fields of `TrainConfig`.

    They win over the `preset`, a name from `elrcli.presets.PRESETS`. `for_audit` saves features of
    every image at the end, one more pass over the data: an audit finds neighbours by them.
    """
    if preset is not None:
        settings = with_preset(preset, settings)
    config = TrainConfig.from_dict({"data": Path(data), **settings}, "train()")
    return train_as(config, _path(out), overwrite=overwrite, for_audit=for_audit, observer=observer)


def train_as(
    config: TrainConfig,
    out: Path | None = None,
    *,
    overwrite: bool = False,
    for_audit: bool = True,
    observer: Observer | None = None,
) -> RunFolder:
    """Train as `config` says. What is wrong with the data is said before torch is loaded."""
    samples = None
    if launch().processes == 1:  # several find out together
        from elrcli.data.samples import load_samples
        from elrcli.run import RunFolder

        if out is not None:
            RunFolder(out).check_free(overwrite=overwrite)
        samples = load_samples(config)
    from elrcli.engine.fit import fit

    return fit(
        config, out, samples=samples, overwrite=overwrite, for_audit=for_audit, observer=observer
    )


def _check_there(data: AnyPath, run: AnyPath | None = None) -> None:
    """Say what is missing before torch is loaded; several processes find out together."""
    if launch().processes > 1:
        return
    from elrcli.data.manifest import check_exists
    from elrcli.run import RunFolder

    if run is not None:
        RunFolder.open(Path(run))
    check_exists(Path(data))


def resume(
    run: AnyPath, *, for_audit: bool = True, observer: Observer | None = None, **settings: Any
) -> RunFolder:
    """Continue an interrupted run from its last checkpoint; `for_audit` as for `train`.

    `settings` are fields of `TrainConfig` that belong to the machine, such as `workers` or
    `device`: they hold from now on until the run is stopped.
    """
    check_names(settings, "resume()")
    others = [name for name in settings if name not in MACHINE_SETTINGS]
    if others:
        raise ConfigError(f"a run is continued with its own {', '.join(others)}. Leave it out.")
    from elrcli.engine.fit import resume

    return resume(Path(run), settings, for_audit=for_audit, observer=observer)


def tune(
    data: AnyPath,
    *,
    lambdas: Sequence[float] | None = None,
    betas: Sequence[float] | None = None,
    lrs: Sequence[float] | None = None,
    out: AnyPath | None = None,
    overwrite: bool = False,
    observer: Observer | None = None,
    **settings: Any,
) -> TuneResult:
    """Search lambda, beta and learning rate with short runs.

    None stands for a default grid. `settings` are the other fields of `TrainConfig`, for the
    training that the search is for. The `config` of the result is that training with the pick. A
    search that `out` holds already goes on.
    """
    grid = {"lambdas": lambdas, "betas": betas, "lrs": lrs}
    for name, values in zip(TUNED_SETTINGS, grid.values(), strict=True):
        if name in settings:
            raise ConfigError(f"tune(): searches {name!r}. Name the values to try instead.")
        if values is not None and len(values) == 0:
            raise ConfigError("tune(): an empty list leaves nothing to try.")
    config = TrainConfig.from_dict({"data": Path(data), **settings}, "tune()")
    _check_there(data)
    from elrcli.engine.tune import tune

    return tune(
        config,
        _path(out),
        **{name: tuple(values) for name, values in grid.items() if values is not None},
        overwrite=overwrite,
        observer=observer,
    )


def predict(
    run: AnyPath,
    images: AnyPath | Sequence[AnyPath],
    *,
    top_k: int = 1,
    probabilities: bool = False,
    root: AnyPath | None = None,
    path_column: str = "path",
    follow_links: bool = False,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int = 64,
    workers: int | None = None,
    observer: Observer | None = None,
) -> Iterator[dict[str, Any]]:
    """Classify images and yield one row per image, in the order given.

    `images` are files, folders, patterns, CSV files, or `-` for paths on standard input. The
    keys of a row are `prediction_columns`; an image that cannot be read has only its path and
    `error`.
    """
    from elrcli.data.folders import other_pictures
    from elrcli.data.inputs import expand_inputs
    from elrcli.engine.predict import predict_images
    from elrcli.run import RunFolder

    classes = RunFolder.open(Path(run)).classes()
    if not 1 <= top_k <= len(classes):
        raise ConfigError(f"--top-k {top_k}: the run has {len(classes)} classes.")
    names = [images] if isinstance(images, str | os.PathLike) else images
    refuse_shared_stdin(names)
    inputs = expand_inputs(
        names, root=_path(root), path_column=path_column, follow_links=follow_links, stdin=sys.stdin
    )
    observer = observer or Observer()
    for name in filter(os.path.isdir, names):
        for line in other_pictures(os.fspath(name)):
            observer.note(line)
    predictions = predict_images(
        Path(run),
        [image.file for image in inputs],
        device=device,
        precision=precision,
        batch_size=batch_size,
        workers=workers,
        observer=observer,
    )
    return (
        prediction_row(image.path, prediction, classes, top_k, probabilities)
        for image, prediction in zip(inputs, predictions, strict=True)
    )


def refuse_shared_stdin(names: Sequence[AnyPath]) -> None:
    """Raise ConfigError where several processes would read the standard input of one."""
    if launch().processes > 1 and "-" in [os.fspath(name) for name in names]:
        raise ConfigError(
            "-: several processes cannot share standard input. List the paths in a CSV file."
        )


def prediction_columns(classes: Sequence[str], top_k: int, probabilities: bool) -> list[str]:
    """Return the columns of a table of predictions."""
    columns = ["path", "label", "confidence"]
    for place in range(2, top_k + 1):
        columns += [f"label_{place}", f"confidence_{place}"]
    if probabilities:
        columns += [f"p_{name}" for name in classes]
    return [*columns, "error"]


def prediction_row(
    path: str, prediction: Prediction, classes: Sequence[str], top_k: int, probabilities: bool
) -> dict[str, Any]:
    """Return one row of a table of predictions; probabilities keep 6 decimals."""
    columns = prediction_columns(classes, top_k, probabilities)
    row: dict[str, Any] = dict.fromkeys(columns)
    row["path"] = path
    if prediction.probabilities is None:
        row["error"] = prediction.error
        return row
    found = prediction.probabilities
    for place, label in enumerate((-found).argsort(kind="stable")[:top_k]):
        row[columns[1 + 2 * place]] = classes[label]
        row[columns[2 + 2 * place]] = round(float(found[label]), 6)
    if probabilities:
        shares = (round(share, 6) for share in found.tolist())
        row |= {f"p_{name}": share for name, share in zip(classes, shares, strict=True)}
    return row


def audit_labels(
    target: AnyPath,
    *,
    out: AnyPath | None = None,
    overwrite: bool = False,
    data: AnyPath | None = None,
    root: AnyPath | None = None,
    path_column: str = "path",
    label_column: str = "label",
    split_column: str = "split",
    follow_links: bool = False,
    truth: AnyPath | None = None,
    truth_column: str | None = None,
    threshold: float = 0.5,
    format: str = "csv",
    report: bool = True,
    report_images: int | None = None,
    device: str = "auto",
    observer: Observer | None = None,
    **settings: Any,
) -> AuditResult:
    """Rank the labels that a run disagrees with and write table, summary and review page.

    `target` is a run, or a folder or a CSV file of images: then a run is trained first, in
    `out/run` or under `runs/`. `settings` are fields of `TrainConfig` for that training. How data
    are read, and `device`, belong to that training or to `data`. `report_images` is 500 by default.
    """
    check_names(settings, "audit_labels()")
    if not Path(target).exists():  # said before torch is loaded
        raise DataError(f"{target}: no such file or folder. Name a run, or images to audit.")
    from elrcli.run import RunFolder
    from elrcli.tables import table_format

    table_format(Path(f"audit.{format}"))  # such problems are better noticed before any work
    if not 0 <= threshold <= 1:
        raise ConfigError(f"--threshold {threshold}: must be between 0 and 1.")
    if report_images is not None and not report:
        raise UsageError("--report-images: there is no page with --no-report. Leave one out.")
    if report_images is not None and report_images < 1:
        raise ConfigError(f"--report-images {report_images}: must be at least 1.")
    reading = Reading(_path(root), path_column, label_column, split_column, follow_links)
    run = Path(target)
    trains = not RunFolder(run).is_run()
    if trains and data is not None:
        raise UsageError(f"{run}: is no run, so it cannot rank the labels of {data}.")
    if not trains:
        refused = [*settings, *(["overwrite"] if overwrite else [])]
        unused = {} if data is not None else asdict(reading) | {"device": device}
        refused += [name for name, value in unused.items() if value != getattr(TrainConfig, name)]
        if refused:
            raise UsageError(f"{run}: is trained already. Leave out {', '.join(refused)}.")

    from elrcli.audit.quick import run_for_audit
    from elrcli.audit.run import audit_run, check_place, true_labels_of
    from elrcli.data.manifest import load_data

    if trains:
        if out is not None:
            check_place(Path(out))
        if truth is None:
            settings["truth_column"] = truth_column
            truth_column = None
        else:
            true_labels_of(load_data(run, reading), Path(truth), truth_column, [path_column])
        if device != "auto":
            settings["device"] = device
        run = run_for_audit(
            run, asdict(reading) | settings, _path(out), overwrite=overwrite, observer=observer
        ).path
    command = ["elr", "audit", str(run), *(() if out is None else ("--out", str(out)))]
    with interrupted_at_once(shlex.join(command)):
        return audit_run(
            run,
            _path(out),
            data=_path(data),
            reading=reading,
            truth=_path(truth),
            truth_column=truth_column,
            threshold=threshold,
            format=format,
            report=report,
            report_images=report_images or 500,
            device=device,
            observer=observer,
        )


def apply_decisions(
    run: AnyPath,
    decisions: AnyPath | None = None,
    *,
    out: AnyPath | None = None,
    mode: str | None = None,
    accept_above: float | None = None,
    skip_foreign: bool = False,
    data: AnyPath | None = None,
    root: AnyPath | None = None,
    dry_run: bool = False,
) -> Plan:
    """Write a corrected dataset from reviewed decisions and return what was changed.

    `run` is a run, or the output of `elr audit DATA --out`, which holds one.
    An `out` that ends in .csv becomes a CSV file with paths from the data root, any other a
    folder of class folders, filled by `mode` (copy, hardlink or symlink; default copy). The
    run's own data is only read; where its labels have changed since the training, that is an
    error. `data` and `root` say where it is now, if it has moved. `skip_foreign` leaves out
    decisions on images or labels that the run does not have. `dry_run` writes nothing and needs
    no `out`.
    """
    from elrcli.audit.apply import (
        MODES,
        check_csv,
        check_folder,
        plan_corrections,
        write_csv,
        write_folder,
    )
    from elrcli.audit.reviewed import check_own_audit, check_removed, data_by_now, run_and_audit
    from elrcli.data.manifest import NO_CLASS

    if decisions is None and accept_above is None:
        raise UsageError("nothing to apply. Name a decisions.csv, or give --accept-above.")
    if decisions is None and skip_foreign:
        raise UsageError("--skip-foreign: needs a decisions.csv. Leave it out.")
    place = _path(out)
    if place is None and not dry_run:
        raise UsageError("no place to write to. Give --out, or --dry-run to look first.")
    to_csv = place is not None and place.suffix.lower() == ".csv"
    if place is not None and place.suffix.lower() in OTHER_TABLES:
        raise ConfigError(f"{out}: a table is written as CSV only. End its name in .csv.")
    if mode not in (None, *MODES):
        raise ConfigError(f"--mode {mode}: must be one of {', '.join(MODES)}.")
    if mode is not None and (to_csv or place is None):
        raise UsageError("--mode: only an --out that is a folder uses it. Leave it out.")
    folder, audit_folder = run_and_audit(Path(run))
    if accept_above is not None:
        check_own_audit(audit_folder, folder)
    settings = folder.train_config()
    now = data_by_now(folder.manifest(), settings, _path(data), _path(root))
    plan = plan_corrections(
        now.manifest,
        _path(decisions),
        skip_foreign=skip_foreign,
        audit_csv=audit_folder / "audit.csv",
        accept_above=accept_above,
    )
    check_removed(now, plan.rows, _path(data) or settings.data)
    if len(plan.rows) == 0:
        raise DataError(f"{decisions}: removes every sample. Nothing is left to train on.")
    plan = replace(plan, added=now.added)
    if place is None:
        return plan
    with_split = bool((now.manifest.splits != 0).any())
    truth_column = None
    if to_csv:
        split_column = settings.split_column if with_split else None
        reading = replace(settings.reading, root=now.manifest.root, split_column=split_column)
        truth = now.manifest.truth
        if truth is not None and (truth != NO_CLASS).all():  # a cell must name a class
            truth_column = settings.truth_column
        if dry_run:
            check_csv(place)
        else:
            write_csv(plan, place, reading, truth_column)
    else:
        reading = Reading(follow_links=mode == "symlink")
        if dry_run:
            check_folder(plan, place, with_split=with_split)
        else:
            write_folder(plan, place, mode=mode or "copy", with_split=with_split)
    return replace(plan, reading=reading, truth_column=truth_column)


def evaluate(
    run: AnyPath,
    data: AnyPath,
    *,
    split: str | None = None,
    root: AnyPath | None = None,
    path_column: str = "path",
    label_column: str = "label",
    split_column: str = "split",
    follow_links: bool = False,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int = 64,
    workers: int | None = None,
    observer: Observer | None = None,
) -> Evaluation:
    """Compare the predictions of a run with the labels of a folder or a CSV file."""
    _check_there(data, run)
    from elrcli.engine.evaluate import evaluate_run

    return evaluate_run(
        Path(run),
        Path(data),
        reading=Reading(_path(root), path_column, label_column, split_column, follow_links),
        split=split,
        device=device,
        precision=precision,
        batch_size=batch_size,
        workers=workers,
        observer=observer,
    )


def export(
    run: AnyPath,
    out: AnyPath | None = None,
    *,
    format: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the network of a finished run for other programs and return the file.

    `format` is onnx, a graph from pixels to probabilities, or safetensors, weights for timm with
    a `config.json` beside them; without it the suffix of `out` decides. Without `out` the file
    is `RUN/export/model.FORMAT`, and without both it is ONNX.
    """
    from elrcli.engine.export import export_run

    return export_run(Path(run), _path(out), format=format, overwrite=overwrite)


def list_backbones(pattern: str = "", *, pretrained: bool = False) -> list[str]:
    """Return timm model names that contain `pattern`, or match it where it has wildcards."""
    from elrcli.models import list_backbones

    return list_backbones(pattern, pretrained=pretrained)


def doctor(*, device: str = "auto", online: bool = False) -> DoctorReport:
    """Try out what works on this machine and in the current folder, and leave nothing behind.

    `online` also asks the hub of pretrained weights for an answer; nothing else needs the network.
    """
    from elrcli.engine.doctor import examine

    return examine(device, online=online)


def make_noise(
    data: AnyPath,
    out: AnyPath,
    *,
    kind: str = "symmetric",
    rate: float | None = None,
    mapping: Mapping[str, str] | None = None,
    matrix: AnyPath | None = None,
    seed: int = 0,
    root: AnyPath | None = None,
    path_column: str = "path",
    label_column: str = "label",
    split_column: str = "split",
    follow_links: bool = False,
    observer: Observer | None = None,
) -> Manifest:
    """Write a CSV file with synthetic label noise and return its content.

    The columns are path, label, true_label, and split where the data has splits. Only training
    labels are changed. `rate` belongs to all kinds but `matrix`, whose file holds K lines of K
    numbers, P(given | true), classes in natural order. `mapping` belongs to `asymmetric`.
    """
    from elrcli.data.csv_files import csv_rows
    from elrcli.data.manifest import load_data
    from elrcli.data.noisy_labels import Noise
    from elrcli.data.rows import SPLITS
    from elrcli.tables import table_format, write_table

    noise = Noise(kind, rate, mapping or {}, _path(matrix))
    if table_format(Path(out)) != "csv":
        raise ConfigError(f"{out}: noisy labels are written as CSV. End the name in .csv.")
    if Path(out).exists():
        raise ConfigError(f"{out}: exists. Choose another --out, or delete it first.")
    reading = Reading(_path(root), path_column, label_column, split_column, follow_links)
    clean = load_data(Path(data), reading)
    train_rows = clean.rows("train")
    if len(train_rows) == 0:
        raise DataError(f"{data}: no training images, and only their labels are changed.")
    observer = observer or Observer()
    is_table = Path(data).is_file()
    if is_table and "true_label" in map(str.strip, next(csv_rows(Path(data), path_column))[1]):
        observer.note(f"{data}: '{label_column}' is taken for true, its true_label is not used")
    labels = clean.labels.copy()
    labels[train_rows] = noise.labels_of(
        clean, train_rows, seed, note=observer.note, progress=partial(observer.progress, "pictures")
    )
    noisy = replace(clean, labels=labels, truth=clean.labels)
    columns = ["path", "label", "true_label"]
    if len(train_rows) < len(clean):
        columns.append("split")
    write_table(
        Path(out),
        columns,
        (
            {
                "path": path,
                "label": clean.classes[labels[row]],
                "true_label": clean.classes[clean.labels[row]],
                "split": SPLITS[clean.splits[row]],
            }
            for row, path in enumerate(clean.paths)
        ),
    )
    return noisy


def _path(value: AnyPath | None) -> Path | None:
    return None if value is None else Path(value)
