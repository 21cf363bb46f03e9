"""Every command as a function. Each loads what it needs when it is called."""

from __future__ import annotations

import csv
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elrcli.config import (
    MACHINE_SETTINGS,
    TUNED_SETTINGS,
    Reading,
    TrainConfig,
    check_names,
    read_json_object,
)
from elrcli.engine.launch import launch
from elrcli.engine.observer import Observer
from elrcli.errors import ConfigError, DataError, UsageError, legible
from elrcli.presets import with_preset

if TYPE_CHECKING:
    import numpy as np

    from elrcli.audit.apply import Plan
    from elrcli.audit.result import AuditResult
    from elrcli.data.manifest import Manifest
    from elrcli.engine.doctor import DoctorReport
    from elrcli.engine.evaluate import Evaluation
    from elrcli.engine.predict import Prediction
    from elrcli.engine.tune import TuneResult
    from elrcli.run import RunFolder

AnyPath = str | os.PathLike[str]

NOISE_KINDS = ("symmetric", "asymmetric", "pair", "matrix", "instance")
OTHER_TABLES = (".tsv", ".json", ".jsonl", ".parquet")  # no names for a folder of images
FEATURE_SIDE = 16  # instance-dependent noise looks at grey pictures of this size


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
    from elrcli.data.inputs import expand_inputs
    from elrcli.engine.predict import predict_images
    from elrcli.run import RunFolder

    classes = RunFolder.open(Path(run)).classes()
    if not 1 <= top_k <= len(classes):
        raise ConfigError(f"--top-k {top_k}: the run has {len(classes)} classes.")
    names = [images] if isinstance(images, str | os.PathLike) else images
    if launch().processes > 1 and "-" in [os.fspath(name) for name in names]:
        raise ConfigError(
            "-: several processes cannot share standard input. List the paths in a CSV file."
        )
    inputs = expand_inputs(
        names, root=_path(root), path_column=path_column, follow_links=follow_links, stdin=sys.stdin
    )
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
    from elrcli.audit.quick import run_for_audit
    from elrcli.audit.run import audit_run, check_place, true_labels_of
    from elrcli.data.manifest import load_data
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
    if RunFolder(run).is_run():
        refused = [*settings, *(["overwrite"] if overwrite else [])]
        unused = {} if data is not None else asdict(reading) | {"device": device}
        refused += [name for name, value in unused.items() if value != getattr(TrainConfig, name)]
        if refused:
            raise ConfigError(f"{run}: is trained already. Leave out {', '.join(refused)}.")
    else:
        if data is not None:
            raise ConfigError(f"{run}: is no run, so it cannot rank the labels of {data}.")
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
    dry_run: bool = False,
) -> Plan:
    """Write a corrected dataset from reviewed decisions and return what was changed.

    `run` is a run, or the output of `elr audit DATA --out`, which holds one.
    An `out` that ends in .csv becomes a CSV file with paths from the data root, any other a
    folder of class folders, filled by `mode` (copy, hardlink or symlink; default copy). The
    run's own data is only read; where its labels have changed since the training, that is an
    error. `dry_run` writes nothing and needs no `out`.
    """
    from elrcli.audit.apply import (
        check_csv,
        check_folder,
        plan_corrections,
        write_csv,
        write_folder,
    )

    if decisions is None and accept_above is None:
        raise UsageError("nothing to apply. Name a decisions.csv, or give --accept-above.")
    place = _path(out)
    if place is None and not dry_run:
        raise UsageError("no place to write to. Give --out, or --dry-run to look first.")
    to_csv = place is not None and place.suffix.lower() == ".csv"
    if place is not None and place.suffix.lower() in OTHER_TABLES:
        raise ConfigError(f"{out}: a table is written as CSV only. End its name in .csv.")
    if mode is not None and (to_csv or place is None):
        raise UsageError("--mode: only an --out that is a folder uses it. Leave it out.")
    folder, audit_folder = _run_and_audit(Path(run))
    if accept_above is not None:
        _check_own_audit(audit_folder / "summary.json", folder.path)
    settings = folder.train_config()
    manifest, gone, added = _as_given(folder.manifest(), settings)
    plan = plan_corrections(
        manifest,
        _path(decisions),
        audit_csv=audit_folder / "audit.csv",
        accept_above=accept_above,
    )
    _check_removed(plan, gone, settings.data)
    plan = replace(plan, added=added)
    if place is None:
        return plan
    with_split = bool((manifest.splits != 0).any())
    if to_csv:
        split_column = settings.split_column if with_split else None
        reading = replace(settings.reading, root=manifest.root, split_column=split_column)
        if dry_run:
            check_csv(place)
        else:
            write_csv(plan, place, reading)
    else:
        reading = Reading(follow_links=mode == "symlink")
        if dry_run:
            check_folder(plan, place, with_split=with_split)
        else:
            write_folder(plan, place, mode=mode or "copy", with_split=with_split)
    return replace(plan, reading=reading)


def _run_and_audit(place: Path) -> tuple[RunFolder, Path]:
    """Return a run and the folder of its audit; `elr audit DATA --out` puts the run inside that."""
    from elrcli.run import RunFolder

    run, inside = RunFolder(place), RunFolder(place / "run")
    if not run.is_run() and inside.is_run():
        return RunFolder.open(inside.path), place
    return RunFolder.open(place), run.audit_folder


def _check_own_audit(summary: Path, run: Path) -> None:
    """Raise DataError if the audit that wrote `summary` ranked other data than that of the run."""
    if summary.is_file() and read_json_object(summary).get("applies_to_run") is False:
        raise DataError(
            f"{summary.parent}: ranks other data than that of the run. Do it again with:"
            f" elr audit {shlex.quote(str(run))} --out {shlex.quote(str(summary.parent))}"
        )


def _as_given(manifest: Manifest, settings: TrainConfig) -> tuple[Manifest, set[int], int]:
    """Return the manifest of a run with the splits of its data, rows that are gone, images added.

    A split that was drawn is taken back. Raises DataError where labels are others than in the run.
    """
    import numpy as np

    from elrcli.data.manifest import load_data
    from elrcli.data.rows import SPLITS
    from elrcli.errors import listed

    is_csv = settings.data.is_file()
    reading = replace(settings.reading, root=manifest.root if is_csv else None)
    given = load_data(settings.data, reading, check_files=False)
    row_of = {path: row for row, path in enumerate(given.paths)}
    gone: set[int] = set()
    changed = []
    splits = np.full(len(manifest), SPLITS.index("train"), dtype=np.int8)
    for row, path in enumerate(manifest.paths):
        now = row_of.get(path)
        if now is None or (is_csv and not manifest.file(row).exists()):
            gone.add(row)
            continue
        splits[row] = given.splits[now]
        names = manifest.classes[manifest.labels[row]], given.classes[given.labels[now]]
        if names[0] != names[1]:
            changed.append(f"'{legible(path)}': '{legible(names[0])}', now '{legible(names[1])}'")
    if changed:
        raise DataError(
            f"{settings.data}: {len(changed)} labels are others than in the run. Put these back,"
            " or train again and review that run:\n" + listed(changed)
        )
    added = len(set(row_of).difference(manifest.paths))
    return replace(manifest, splits=splits), gone, added


def _check_removed(plan: Plan, gone: set[int], data: Path) -> None:
    """Raise DataError unless every sample that is gone from the data is decided to be removed."""
    from elrcli.errors import listed

    missing = sorted(gone.intersection(plan.rows.tolist()))
    if missing:
        names = [f"'{legible(plan.manifest.paths[row])}'" for row in missing]
        raise DataError(
            f"{data}: {len(missing)} samples of the run are gone. Bring them back, or decide"
            " 'remove' for them:\n" + listed(names)
        )


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
    _check_noise(kind, rate, mapping, matrix)
    from elrcli.data.manifest import load_data
    from elrcli.data.rows import SPLITS
    from elrcli.tables import table_format, write_table

    if table_format(Path(out)) != "csv":
        raise ConfigError(f"{out}: noisy labels are written as CSV. End the name in .csv.")
    if Path(out).exists():
        raise ConfigError(f"{out}: exists. Choose another --out, or delete it first.")
    reading = Reading(_path(root), path_column, label_column, split_column, follow_links)
    clean = load_data(Path(data), reading)
    labels = clean.labels.copy()
    train_rows = clean.rows("train")
    if len(train_rows) == 0:
        raise DataError(f"{data}: no training images, and only their labels are changed.")
    labels[train_rows] = _noisy_labels(
        clean, train_rows, kind, rate or 0.0, mapping or {}, _path(matrix), seed, observer
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


def _check_noise(
    kind: str, rate: float | None, mapping: Mapping[str, str] | None, matrix: AnyPath | None
) -> None:
    """Refuse what is missing for this kind of noise, and what it would ignore."""
    if kind not in NOISE_KINDS:
        raise ConfigError(f"--kind {kind}: choose one of {', '.join(NOISE_KINDS)}.")
    for option, value, kinds in (
        ("--rate", rate, tuple(name for name in NOISE_KINDS if name != "matrix")),
        ("--map", mapping, ("asymmetric",)),
        ("--matrix", matrix, ("matrix",)),
    ):
        is_given = value is not None and value != {}
        if kind in kinds and not is_given:
            raise UsageError(f"--kind {kind} needs {option}.")
        if kind not in kinds and is_given:
            raise UsageError(f"--kind {kind} does not use {option}. Leave it out.")
    if rate is not None and not 0.0 <= rate <= 1.0:
        raise ConfigError(f"--rate {rate}: must lie between 0 and 1.")


def _noisy_labels(
    clean: Manifest,
    rows: np.ndarray,
    kind: str,
    rate: float,
    mapping: Mapping[str, str],
    matrix: Path | None,
    seed: int,
    observer: Observer | None,
) -> np.ndarray:
    """Return noisy labels of the manifest rows `rows` [M], int32 [M]."""
    import numpy as np

    from elrcli.data import noise

    labels, num_classes = clean.labels[rows], clean.num_classes
    rng = np.random.default_rng(seed)
    if kind == "symmetric":
        return noise.symmetric(labels, num_classes, rate, rng)
    if kind == "asymmetric":
        return noise.asymmetric(labels, _class_ids(mapping, clean.classes), rate, rng)
    if kind == "pair":
        return noise.pair(labels, num_classes, rate, rng)
    if kind == "matrix":
        assert matrix is not None
        return noise.from_matrix(labels, _read_matrix(matrix, clean.classes), rng)
    features = _small_pictures(clean, rows, observer or Observer())
    return noise.instance_dependent(labels, features, num_classes, rate, rng)


def _class_ids(mapping: Mapping[str, str], classes: Sequence[str]) -> dict[int, int]:
    unknown = sorted({*mapping, *mapping.values()} - set(classes))
    if unknown:
        raise ConfigError(
            f"--map: unknown class {unknown[0]!r}. The classes are {', '.join(classes[:10])}."
        )
    return {classes.index(source): classes.index(target) for source, target in mapping.items()}


def _read_matrix(path: Path, classes: Sequence[str]) -> np.ndarray:
    """Read K lines of K numbers, P(given | true), each line summing to 1."""
    import numpy as np

    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [(number, cells) for number, cells in enumerate(csv.reader(file), 1) if cells]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error}).") from None
    matrix = []
    for number, cells in lines:
        try:
            row = [float(cell) for cell in cells]
        except ValueError:
            raise DataError(f"{path}:{number}: not numbers. Write {len(classes)} a line.") from None
        is_distribution = min(row) >= 0 and abs(sum(row) - 1) <= 1e-6  # neither holds for NaN
        if len(row) != len(classes) or not is_distribution:
            raise DataError(
                f"{path}:{number}: expected {len(classes)} probabilities that sum to 1,"
                f" found {len(row)} numbers that sum to {sum(row):g}."
            )
        matrix.append(row)
    if len(matrix) != len(classes):
        raise DataError(f"{path}: {len(matrix)} lines for {len(classes)} classes.")
    return np.array(matrix)


def _small_pictures(manifest: Manifest, rows: np.ndarray, observer: Observer) -> np.ndarray:
    """Return grey pictures as standardised features, float32 [M, FEATURE_SIDE ** 2].

    An image that cannot be read counts as an average one; training leaves it out anyway.
    """
    import numpy as np
    from PIL import Image

    from elrcli.data.images import ImageProblem, read_image

    side = FEATURE_SIDE
    pictures = np.full((len(rows), side * side), np.nan, dtype=np.float32)
    for place, row in enumerate(rows):
        try:
            pixels = read_image(manifest.file(int(row)), side)
        except ImageProblem as problem:
            observer.note(f"{manifest.paths[int(row)]}: {problem}")
        else:
            picture = Image.fromarray(pixels).convert("L").resize((side, side))
            pictures[place] = np.asarray(picture, dtype=np.float32).ravel()
        observer.progress("pictures", place + 1, len(rows))
    read = pictures[~np.isnan(pictures[:, 0])]
    if len(read) == 0:
        raise DataError(f"{manifest.root}: no image can be read.")
    centred = (pictures - read.mean(axis=0)) / (read.std(axis=0) + 1e-6)
    return np.asarray(np.nan_to_num(centred, nan=0.0))


def _path(value: AnyPath | None) -> Path | None:
    return None if value is None else Path(value)
