"""The audit of a run from evidence to files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

import elrcli
from elrcli.audit.calibration import LabelModel, fit_label_model, posterior, unpulled
from elrcli.audit.evidence import Evidence, evidence_of_run
from elrcli.audit.report import render_report
from elrcli.audit.result import AuditResult
from elrcli.audit.scores import best_other, ranking_figures
from elrcli.audit.summary import summarise
from elrcli.data.manifest import SPLITS, Manifest, load_data
from elrcli.engine.checkpoints import load_checkpoint
from elrcli.engine.observer import Observer
from elrcli.engine.predict import Predictor
from elrcli.errors import ConfigError, DataError, RunError
from elrcli.run import RunFolder, json_text, write_text
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
)
TOP_CLASSES = 5
EXEMPLARS = 12
TOP_SUSPECTS = 10


def audit_run(
    run_path: Path,
    out: Path | None = None,
    *,
    data: Path | None = None,
    root: Path | None = None,
    path_column: str = "path",
    label_column: str = "label",
    split_column: str = "split",
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

    `out` defaults to `RUN/audit`. `truth` is a CSV file whose `truth_column` (default
    `true_label`) only adds figures. Raises ConfigError, DataError or RunError.
    """
    observer = observer or Observer()
    run = RunFolder.open(run_path)
    if data is None:
        manifest = run.manifest()
        state = load_checkpoint(run.checkpoint_folder)
        try:
            evidence = evidence_of_run(manifest, state)
        except RunError as error:
            raise RunError(f"{run.checkpoint_folder}: {error}") from None
        unreadable = {int(row): str(reason) for row, reason in state.get("unreadable", ())}
    else:
        manifest = load_data(
            data,
            root=root,
            path_column=path_column,
            label_column=label_column,
            split_column=split_column,
            classes=run.classes(),
        )
        evidence, unreadable = predicted_evidence(run_path, manifest, device, observer)
    if len(evidence.rows) == 0:
        raise DataError(
            f"{run_path}: no image has been predicted yet. Train at least one epoch: "
            f"elr train --resume {run_path}"
        )
    true_labels = _true_labels(manifest, truth, truth_column)
    observer.note(f"ranking {len(evidence.rows):,} labels")
    result, belief, model = rank_labels(evidence, manifest, threshold)
    settings = run.train_config()
    summary = full_summary(result, belief, model, manifest, threshold) | {
        "unreadable": [
            {"path": manifest.paths[row], "reason": unreadable[row]} for row in sorted(unreadable)
        ],
        "run": str(run_path),
        "data": str(manifest.root),
        "backbone": settings.backbone,
        "method": settings.method,
        "epochs": settings.epochs,
        "version": elrcli.__version__,
    }
    if true_labels is not None:
        is_error = result.labels != true_labels[result.rows]
        summary["truth"] = ranking_figures(result.score, is_error)
    summary["top_suspects"] = list(islice(table_rows(result, manifest), TOP_SUSPECTS))
    result = replace(result, summary=summary)

    folder = out or run.audit_folder
    table = folder / f"audit.{format}"
    write_table(table, TABLE_COLUMNS, table_rows(result, manifest))
    write_text(folder / "summary.json", json_text(result.summary))
    if report:
        observer.note("writing the review page")
        curves = run.curves_file.read_text() if run.curves_file.is_file() else None
        page = render_report(result, manifest, curves_svg=curves, max_suspects=report_images)
        write_text(folder / "report.html", page)
    return result


def predicted_evidence(
    run_path: Path, manifest: Manifest, device: str, observer: Observer
) -> tuple[Evidence, dict[int, str]]:
    """Return the run's predictions for a data set that it never saw, and unreadable rows."""
    predictor = Predictor.load(run_path, device=device)
    rows, probs, unreadable = [], [], {}
    done = 0
    for seen, batch_probs, problems in predictor.manifest_batches(
        manifest, np.arange(len(manifest))
    ):
        rows.append(seen)
        probs.append(batch_probs.reshape(len(seen), manifest.num_classes))
        unreadable.update(dict(problems))
        done += len(seen) + len(problems)
        observer.progress("predict", done, len(manifest))
    found = np.concatenate(rows)
    predicted = np.concatenate(probs)
    evidence = Evidence(
        rows=found,
        labels=manifest.labels[found],
        held_out=np.ones(len(found), dtype=bool),
        probs=predicted,
        targets=predicted,
    )
    return evidence, unreadable


def _true_labels(
    manifest: Manifest, truth: Path | None, truth_column: str | None
) -> np.ndarray | None:
    """Return the true class of every manifest row, or None where none are known."""
    if truth is None:
        if truth_column is not None:
            raise ConfigError("--truth-column: needs --truth FILE.")
        return manifest.truth
    column = truth_column or "true_label"
    table = load_data(truth, root=manifest.root, label_column=column, classes=manifest.classes)
    known = dict(zip(table.paths, table.labels.tolist(), strict=True))
    missing = [path for path in manifest.paths if path not in known]
    if missing:
        raise DataError(
            f"{truth}: no true label for {len(missing)} samples, first {missing[0]!r}. "
            f"Its paths must start from {manifest.root}."
        )
    return np.array([known[path] for path in manifest.paths], dtype=np.int32)


def rank_labels(
    evidence: Evidence, manifest: Manifest, threshold: float
) -> tuple[AuditResult, np.ndarray, LabelModel]:
    """Score, calibrate and order the evidence; labels are flagged from `threshold` on.

    Returns the result without its summary, P(true class) [M, K] in the result's order, and the
    label model.
    """
    labels = evidence.labels
    samples = np.arange(len(labels))
    model = fit_label_model(evidence)
    images_say = unpulled(evidence, model)
    score = 1 - images_say[samples, labels]
    belief = posterior(images_say, labels, model.error_rate)
    error = 1 - belief[samples, labels]
    order = np.lexsort((evidence.rows, -score))
    top = np.argsort(-belief[order], axis=1, kind="stable")[:, :TOP_CLASSES]
    flagged = error >= threshold
    suggested = np.where(flagged, best_other(belief, labels), belief.argmax(axis=1))
    result = AuditResult(
        rows=evidence.rows[order],
        labels=labels[order],
        suggested=suggested[order].astype(np.int32),
        score=score[order].astype(np.float32),
        error_probability=error[order].astype(np.float32),
        flagged=flagged[order],
        top_classes=top.astype(np.int32),
        top_probabilities=np.take_along_axis(belief[order], top, axis=1),
        exemplars=_exemplars(evidence, error, manifest.num_classes),
        summary={},
    )
    return result, belief[order], model


def _exemplars(evidence: Evidence, error: np.ndarray, num_classes: int) -> dict[int, np.ndarray]:
    """Return per class the rows whose label is least in doubt and best believed."""
    exemplars = {}
    belief = evidence.probs[np.arange(len(error)), evidence.labels]
    for label in range(num_classes):
        members = np.flatnonzero((evidence.labels == label) & (error < 0.5))
        best = members[np.argsort(-belief[members], kind="stable")[:EXEMPLARS]]
        exemplars[label] = evidence.rows[best]
    return exemplars


def full_summary(
    result: AuditResult,
    belief: np.ndarray,
    model: LabelModel,
    manifest: Manifest,
    threshold: float,
) -> dict[str, Any]:
    """Return what the audit itself found, for `summary.json`."""
    samples = len(result)
    low, high = model.interval
    estimate = float(result.error_probability.sum(dtype=np.float64))
    return {
        "samples": samples,
        "classes": list(manifest.classes),
        "flagged": int(result.flagged.sum()),
        "threshold": threshold,
        "estimated_errors": {
            "estimate": round(estimate, 1),
            "low": round(min(low * samples, estimate), 1),
            "high": round(max(high * samples, estimate), 1),
        },
        "estimated_error_rate": round(estimate / samples, 6),
        **summarise(result.labels, belief, result.flagged, manifest.classes),
    }


def table_rows(result: AuditResult, manifest: Manifest) -> Iterator[dict[str, Any]]:
    """Yield the rows of `audit.csv`, most suspicious first."""
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
        }
