"""The audit of a run from evidence to files."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

import elrcli
from elrcli.audit.calibration import cautions
from elrcli.audit.duplicates import find_duplicates
from elrcli.audit.evidence import Evidence, evidence_of_run
from elrcli.audit.neighbours import FeatureSpace, neighbourhoods
from elrcli.audit.ranking import Ranking, nearest_exemplars, rank_labels
from elrcli.audit.report import render_report
from elrcli.audit.result import AuditResult, DuplicateGroup
from elrcli.audit.scores import ranking_figures
from elrcli.audit.summary import summarise
from elrcli.config import Reading
from elrcli.data.csv_files import column_names, csv_column, csv_rows, read_csv
from elrcli.data.manifest import FOREIGN_TRUTH, NO_CLASS, Manifest, load_data
from elrcli.data.rows import SPLITS
from elrcli.engine.checkpoints import load_checkpoint
from elrcli.engine.distributed import current_group, joined
from elrcli.engine.features import Features
from elrcli.engine.observer import Observer
from elrcli.engine.predict import NOT_FINITE, Predictor
from elrcli.errors import ConfigError, DataError, RunError, UsageError, legible, named
from elrcli.files import json_text, read_json_object, write_text
from elrcli.run import AUDIT_FILES, RunFolder, new_path
from elrcli.tables import write_table

TABLE_COLUMNS = (
    "rank",
    "path",
    "split",
    "label",
    "suggested",
    "score",
    "error_probability",
    "flagged",
    "duplicates",
)
UNKNOWN = -2  # as a true label
TOP_SUSPECTS = 10


@joined()
def audit_run(
    run_path: Path,
    out: Path | None = None,
    *,
    data: Path | None = None,
    reading: Reading = Reading(),
    truth: Path | None = None,
    truth_column: str | None = None,
    threshold: float = 0.5,
    format: str = "csv",
    report: bool = True,
    report_images: int = 500,
    device: str = "auto",
    observer: Observer | None = None,
) -> AuditResult:
    """Rank the labels of a run, or of `data` by its predictions, and write the files.

    `out` defaults to `RUN/audit`, with `data` to a new folder under `runs/`. `truth` is a CSV file
    whose `truth_column` (default `true_label`) only adds figures. Raises ConfigError, DataError or
    RunError.
    """
    observer = observer or Observer()
    run = RunFolder.open(run_path)
    group = current_group()
    folder = out or run.audit_folder
    if out is None and data is not None:
        folder = group.from_first(partial(new_path, data, "audit"))  # it has the time in its name
    check_place(folder)
    manifest = run.manifest() if data is None else load_data(data, reading, classes=run.classes())
    settings = run.train_config()
    path_columns = [reading.path_column, settings.path_column]
    if data is None:
        path_columns.reverse()
    true_labels = true_labels_of(manifest, truth, truth_column, path_columns)
    if data is None:
        evidence, unreadable, epochs = trained_evidence(run, manifest)
        features = Features.load(run.features_file, len(manifest))
        if features is None:
            observer.note(
                "the run holds no features, so there are no neighbours and no duplicates. To add"
                f" them: elr train --resume {shlex.quote(str(run_path))}"
            )
    else:
        evidence, unreadable, features = predicted_evidence(run_path, manifest, device, observer)
        epochs = settings.epochs
    suspects = report_images if report else 0
    evidence, ranking = _rank(evidence, features, manifest, threshold, suspects, observer)
    result = ranking.result
    summary = full_summary(result, ranking, manifest, threshold) | {
        "cautions": [
            *cautions(evidence, manifest.classes, ranking.share),
            *_not_looked_at(manifest, evidence, unreadable, run),
        ],
        "unreadable": [
            {"path": manifest.paths[row], "reason": unreadable[row]} for row in sorted(unreadable)
        ],
        "run": str(run_path),
        "training": run.training_digest(),
        "data": str(manifest.root),
        "applies_to_run": data is None,
        "backbone": settings.backbone,
        "method": settings.method,
        "epochs": epochs,
        "version": elrcli.__version__,
    }
    if true_labels is not None:
        if foreign := int((true_labels == NO_CLASS).sum()):
            observer.note(f"{foreign:,} true labels {FOREIGN_TRUTH}")
        true = true_labels[result.rows]
        known = true != UNKNOWN
        figures = ranking_figures(result.score[known], (result.labels != true)[known])
        summary["truth"] = {"samples": int(known.sum())} | figures
    summary["top_suspects"] = list(islice(table_rows(result, manifest), TOP_SUSPECTS))
    result = replace(result, summary=summary, folder=folder)
    if group.is_first:
        _write_files(result, folder, manifest, run, format, suspects, observer)
    return result


def _rank(
    evidence: Evidence,
    features: Features | None,
    manifest: Manifest,
    threshold: float,
    suspects: int,
    observer: Observer,
) -> tuple[Evidence, Ranking]:
    """Rank the labels; where there are features, by neighbours too, and find duplicates.

    Returns all the evidence that there is. `suspects` get the exemplars that are nearest to them.
    """
    if features is None:
        observer.note(f"ranking {len(evidence):,} labels")
        return evidence, rank_labels(evidence, threshold)
    observer.note(f"comparing {len(evidence):,} images")
    space = FeatureSpace.of(features.vectors[evidence.rows])
    evidence = replace(evidence, neighbours=neighbourhoods(space, evidence.classes))
    observer.note(f"ranking {len(evidence):,} labels")
    ranking = rank_labels(evidence, threshold)
    result = ranking.result
    result = replace(
        result,
        nearest=nearest_exemplars(result, evidence.rows, space, suspects),
        duplicates=find_duplicates(manifest, result.rows, features.thumbnails[result.rows]),
    )
    return evidence, replace(ranking, result=result)


def _write_files(
    result: AuditResult,
    folder: Path,
    manifest: Manifest,
    run: RunFolder,
    format: str,
    suspects: int,
    observer: Observer,
) -> None:
    """Write summary, table and a review page of so many `suspects`, 0 for none."""
    write_text(folder / "summary.json", json_text(result.summary))
    write_table(folder / f"audit.{format}", TABLE_COLUMNS, table_rows(result, manifest))
    written = {"summary.json", f"audit.{format}", *(["report.html"] if suspects else [])}
    for name in set(AUDIT_FILES) - written:  # of an earlier audit
        (folder / name).unlink(missing_ok=True)
    if not suspects:
        return
    gone = sum(not os.path.exists(manifest.file(int(row))) for row in result.rows[:suspects])
    if gone:
        observer.note(f"{gone:,} images of the review page are not in {manifest.root} any more")
    observer.note("writing the review page")
    curves = run.curves()
    is_around = os.path.abspath(folder / "run") == os.path.abspath(run.path)
    is_found = is_around or os.path.abspath(folder) == os.path.abspath(run.audit_folder)
    page = render_report(
        result,
        manifest,
        curves_svg=curves,
        apply_to=folder if is_around else run.path,
        can_accept=result.summary["applies_to_run"] and is_found and format == "csv",
        max_suspects=suspects,
    )
    write_text(folder / "report.html", page)


def check_place(folder: Path) -> None:
    """Raise DataError where the files of an audit would replace files of something else."""
    there = [folder / name for name in AUDIT_FILES if os.path.lexists(folder / name)]
    try:
        is_audit = "estimated_errors" in read_json_object(folder / "summary.json")
    except ConfigError:
        is_audit = False
    if there and not is_audit:
        raise DataError(
            f"{there[0]}: exists and is not of an audit. Move it, or choose another --out."
        )


def trained_evidence(run: RunFolder, manifest: Manifest) -> tuple[Evidence, dict[int, str], int]:
    """Return what a run collected, its unreadable rows and the epochs that it has trained."""
    state = load_checkpoint(run.checkpoint_folder)
    try:
        rows = range(len(manifest))
        unreadable = {rows[row]: str(reason) for row, reason in state.get("unreadable", ())}
        evidence, epochs = evidence_of_run(manifest, state), int(state.get("epoch", 0))
    except RunError as error:
        raise RunError(f"{run.checkpoint_folder}: {error}") from None
    except (IndexError, TypeError, ValueError) as error:
        raise RunError(f"{run.checkpoint_folder}: not readable ({error}). Train again.") from None
    if len(evidence) == 0:
        raise DataError(
            f"{run.path}: no image has been predicted yet. Train at least one epoch: "
            f"elr train --resume {shlex.quote(str(run.path))}"
        )
    return evidence, unreadable, epochs


def predicted_evidence(
    run_path: Path, manifest: Manifest, device: str, observer: Observer
) -> tuple[Evidence, dict[int, str], Features]:
    """Return what the run says of a data set that it never saw, and unreadable rows."""
    predictor = Predictor.load(run_path, device=device)
    probs = np.zeros((len(manifest), manifest.num_classes), dtype=np.float32)
    features = Features.empty(len(manifest))
    seen = np.zeros(len(manifest), dtype=bool)
    unreadable: dict[int, str] = {}
    done = 0
    for look in predictor.looks(manifest):
        index = look.batch.index.numpy()
        if len(index) > 0:
            probs[index] = look.probs
            features.keep(look, index)
            seen[index] = np.isfinite(look.probs).all(axis=1)
        unreadable.update(dict(look.batch.unreadable))
        done += len(index) + len(look.batch.unreadable)
        observer.progress("predict", done, len(manifest))
    found = np.flatnonzero(seen)
    lost = set(np.flatnonzero(~seen).tolist()) - unreadable.keys()
    unreadable |= dict.fromkeys(lost, NOT_FINITE)
    if len(found) == 0:
        row = min(unreadable)
        path = legible(manifest.paths[row])
        raise DataError(f"{manifest.root}: no image can be predicted. {path}: {unreadable[row]}.")
    evidence = Evidence(
        rows=found,
        labels=manifest.labels[found],
        held_out=np.ones(len(found), dtype=bool),
        seen=probs,
    )
    return evidence, unreadable, features


def _not_looked_at(
    manifest: Manifest, evidence: Evidence, unreadable: Mapping[int, str], run: RunFolder
) -> list[str]:
    """Return a caution where images are missing that could be read."""
    is_missing = np.ones(len(manifest), dtype=bool)
    is_missing[evidence.rows] = False
    is_missing[list(unreadable)] = False
    count = int(is_missing.sum())
    if count == 0:
        return []
    images = f"{count:,} of {len(manifest):,} images"
    if not run.is_finished(for_audit=False):
        again = f"elr train --resume {shlex.quote(str(run.path))}"
        return [f"{images} have not been looked at yet and are not ranked. Continue with: {again}"]
    return [
        f"{images} were drawn in no epoch of the balanced training and are not ranked. More"
        " --epochs draw more of them."
    ]


def _truth_columns(
    truth: Path, truth_column: str | None, path_columns: Sequence[str]
) -> tuple[str, str]:
    """Return the names of two columns of a CSV file: of the paths and of the true labels.

    The paths are in the first of `path_columns` that is there, or in `path`.
    """
    if not truth.is_file():
        problem = "is no CSV file" if truth.exists() else "no such file"
        raise DataError(f"{truth}: {problem}. Check --truth.")
    names = list(dict.fromkeys([*path_columns, "path"]))
    header = [name.strip() for name in next(csv_rows(truth, names[0]))[1]]
    path_column = next((name for name in names if name in header), None)
    if path_column is None:
        raise DataError(
            f"{truth}:1: no column with the paths ({' or '.join(names)}); there are:"
            f" {column_names(header)}. Rename one."
        )
    column = truth_column or "true_label"
    csv_column(truth, header, column, "--truth-column")
    return path_column, column


def true_labels_of(
    manifest: Manifest,
    truth: Path | None,
    truth_column: str | None,
    path_columns: Sequence[str],
) -> np.ndarray | None:
    """Return the true class of every manifest row, NO_CLASS or UNKNOWN.

    Without `truth`, what the manifest knows.
    """
    if truth is None:
        if truth_column is not None:
            raise UsageError("--truth-column: needs --truth FILE.")
        return manifest.truth
    path_column, column = _truth_columns(truth, truth_column, path_columns)
    # No image is opened for it, so links do no harm.
    reading = Reading(manifest.root, path_column, column, split_column=None, follow_links=True)
    rows, _ = read_csv(truth, manifest.root, reading, None, None, check_files=False)
    known = dict(zip(rows.paths, rows.labels, strict=True))
    class_ids = {name: i for i, name in enumerate(manifest.classes)} | {None: UNKNOWN}
    found = [class_ids.get(known.get(path), NO_CLASS) for path in manifest.paths]
    if max(found) == min(found) == UNKNOWN:
        raise DataError(
            f"{truth}: no true label of any sample, such as '{legible(manifest.paths[0])}'."
            f" Its paths must start from {manifest.root}."
        )
    if max(found) < 0:
        raise DataError(
            f"{truth}: no label in column '{column}' is a class of the data. Its classes are"
            f" {named([legible(name) for name in manifest.classes])}."
        )
    return np.array(found, dtype=np.int32)


def full_summary(
    result: AuditResult, ranking: Ranking, manifest: Manifest, threshold: float
) -> dict[str, Any]:
    """Return what the audit itself found, for `summary.json`."""
    samples = len(result)
    estimate = float(result.error_probability.sum(dtype=np.float64))
    return {
        "samples": samples,
        "classes": list(manifest.classes),
        "flagged": int(result.flagged.sum()),
        "threshold": threshold,
        "estimated_errors": {
            "estimate": round(estimate, 1),
            "low": round(min(ranking.share.low * samples, estimate), 1),
            "high": round(max(ranking.share.high * samples, estimate), 1),
        },
        "estimated_error_rate": round(estimate / samples, 6),
        **summarise(result.labels, ranking.joint, result.flagged, manifest.classes),
        "duplicates": _duplicate_counts(result.duplicates, manifest),
    }


def _duplicate_counts(groups: Sequence[DuplicateGroup], manifest: Manifest) -> dict[str, int]:
    return {
        "groups": len(groups),
        "same_file": sum(group.has_same_file for group in groups),
        "different_labels": sum(group.labels_differ(manifest.labels) for group in groups),
    }


def table_rows(result: AuditResult, manifest: Manifest) -> Iterator[dict[str, Any]]:
    """Yield the rows of `audit.csv`, most suspicious first."""
    group_of = {
        row: number for number, group in enumerate(result.duplicates, 1) for row in group.rows
    }
    for place in range(len(result)):
        row = int(result.rows[place])
        yield {
            "rank": place + 1,
            "path": manifest.paths[row],
            "split": SPLITS[manifest.splits[row]],
            "label": manifest.classes[result.labels[place]],
            "suggested": manifest.classes[result.suggested[place]],
            "score": round(float(result.score[place]), 6),
            "error_probability": round(float(result.error_probability[place]), 6),
            "flagged": int(result.flagged[place]),
            "duplicates": group_of.get(row),
        }
