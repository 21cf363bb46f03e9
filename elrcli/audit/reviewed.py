"""What was reviewed: a run, the audit of it, and its data as they are by now."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from elrcli.config import TrainConfig
from elrcli.data.manifest import Manifest, load_data
from elrcli.data.rows import SPLITS
from elrcli.errors import DataError, legible, listed
from elrcli.files import read_json_object
from elrcli.run import RunFolder


@dataclass(frozen=True, eq=False)
class ReviewedData:
    """The samples of a run, with the splits of its data: one that was drawn is taken back."""

    manifest: Manifest
    gone: frozenset[int]  # manifest rows whose image is not there any more
    added: int  # images that have come to the data


def run_and_audit(place: Path) -> tuple[RunFolder, Path]:
    """Return a run and the folder of its audit; `elr audit DATA --out` puts the run inside that.

    Raises RunError where there is no run.
    """
    run, inside = RunFolder(place), RunFolder(place / "run")
    if not run.is_run() and inside.is_run():
        return RunFolder.open(inside.path), place
    return RunFolder.open(place), run.audit_folder


def check_own_audit(audit: Path, run: RunFolder) -> None:
    """Raise DataError if the audit in that folder is not of this training and its data."""
    file = audit / "summary.json"
    if not file.is_file():
        return
    summary = read_json_object(file)
    problem = None
    if summary.get("applies_to_run") is False:
        problem = "ranks other data than that of the run"
    elif summary.get("training") != run.training_digest():
        problem = "is of another training, or of an earlier epoch"
    if problem is not None:
        raise DataError(
            f"{audit}: {problem}. Do it again with:"
            f" elr audit {shlex.quote(str(run.path))} --out {shlex.quote(str(audit))}"
        )


def data_by_now(
    manifest: Manifest, settings: TrainConfig, data: Path | None, root: Path | None
) -> ReviewedData:
    """Compare the samples of a run with its data; raises DataError where a label has changed.

    `data` and `root` are where these are now, if not where they were.
    """
    if data is None:
        data, root = settings.data, root or (None if settings.data.is_dir() else manifest.root)
        if not data.exists():
            raise DataError(
                f"{data}: is gone, the data of the run. Say where it is: --data PATH, and with"
                " a CSV file --root DIR."
            )
    given = load_data(data, replace(settings.reading, root=root), check_files=False)
    manifest = replace(manifest, root=given.root)
    row_of = {path: row for row, path in enumerate(given.paths)}
    gone: set[int] = set()
    changed = []
    splits = np.full(len(manifest), SPLITS.index("train"), dtype=np.int8)
    for row, path in enumerate(manifest.paths):
        now = row_of.get(path)
        if now is None or not manifest.file(row).exists():
            gone.add(row)
            continue
        splits[row] = given.splits[now]
        names = manifest.classes[manifest.labels[row]], given.classes[given.labels[now]]
        if names[0] != names[1]:
            changed.append(f"'{legible(path)}': '{legible(names[0])}', now '{legible(names[1])}'")
    if changed:
        raise DataError(
            f"{data}: {len(changed)} labels are others than in the run. Put these back,"
            " or train again and review that run:\n" + listed(changed)
        )
    added = len(set(row_of).difference(manifest.paths))
    return ReviewedData(replace(manifest, splits=splits), frozenset(gone), added)


def check_removed(data: ReviewedData, stays: np.ndarray, place: Path) -> None:
    """Raise DataError if samples that are gone from `place` are among the rows [R] that stay."""
    missing = sorted(data.gone.intersection(stays.tolist()))
    if missing:
        names = [f"'{legible(data.manifest.paths[row])}'" for row in missing]
        raise DataError(
            f"{place}: {len(missing)} samples of the run are gone. Bring them back, or decide"
            " 'remove' for them:\n" + listed(names)
        )
