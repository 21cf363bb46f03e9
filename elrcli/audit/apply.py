"""Write a corrected dataset from reviewed decisions. The user's own files are only read."""

from __future__ import annotations

import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from elrcli.audit.decisions import (
    SHOWN,
    Decision,
    Suggestion,
    read_decisions,
    read_suggestions,
)
from elrcli.config import Reading
from elrcli.data.folders import is_image_name
from elrcli.data.manifest import Manifest
from elrcli.data.rows import SPLIT_CODES, SPLITS
from elrcli.engine.interrupts import StopSignals
from elrcli.errors import (
    SAME_COMMAND,
    ConfigError,
    DataError,
    cannot_be_written,
    folded,
    legible,
    listed,
)
from elrcli.tables import write_table

MODES = ("copy", "hardlink", "symlink")
CHANGE_COLUMNS = ("path", "from", "to", "reason")
FILE_COLUMN = "file"  # in the log of a folder: where in it the image is


@dataclass(frozen=True)
class Change:
    """One sample whose label changes; `new` is empty where the sample is removed."""

    path: str
    old: str
    new: str
    reason: str


@dataclass(frozen=True, eq=False)
class Plan:
    """The corrected dataset: R samples of the manifest with their labels."""

    manifest: Manifest
    rows: np.ndarray  # [R] int64 manifest rows that stay, ascending
    labels: np.ndarray  # [R] int32 corrected class ids
    changes: tuple[Change, ...]  # in the order of the manifest
    decided: Counter[str]  # samples per decision: keep, relabel, remove, unsure, accepted
    skipped: int = 0  # decisions on paths or labels that the run does not have
    added: int = 0  # images that came to the data after the training: they are left out
    reading: Reading = Reading()  # of what is written
    truth_column: str | None = None  # of what is written

    def change_rows(self) -> Iterator[dict[str, str]]:
        """Yield CHANGE_COLUMNS of every change; `to` is empty for a removed sample."""
        for change in self.changes:
            cells = (change.path, change.old, change.new, change.reason)
            yield dict(zip(CHANGE_COLUMNS, cells, strict=True))

    @property
    def unseen(self) -> int:
        """How many of the images a scan of the folder would skip, by their names."""
        names = (self.manifest.paths[int(row)].rpartition("/")[2] for row in self.rows)
        return sum(name.startswith(".") or not is_image_name(name) for name in names)

    @property
    def emptied(self) -> tuple[str, ...]:
        """Classes that had samples and lose all of them."""
        lost = set(self.manifest.labels.tolist()) - set(self.labels.tolist())
        return tuple(self.manifest.classes[label] for label in sorted(lost))


def plan_corrections(
    manifest: Manifest,
    decisions_csv: Path | None,
    *,
    skip_foreign: bool = False,
    audit_csv: Path | None = None,
    accept_above: float | None = None,
) -> Plan:
    """Work out every label after the review; nothing is written.

    A relabelled sample gets its new label, a removed one goes, kept and unsure ones stay as they
    are. With `accept_above`, samples without a decision whose error probability in `audit_csv` is
    at least that get the suggested label.
    """
    decisions: dict[int, Decision] = {}
    skipped = 0
    if decisions_csv is not None:
        decisions, skipped = read_decisions(decisions_csv, manifest, skip_foreign=skip_foreign)
    suggestions: dict[int, Suggestion] = {}
    if accept_above is not None:
        if not 0.0 <= accept_above <= 1.0:
            raise ConfigError(f"--accept-above {accept_above:g}: must lie between 0 and 1.")
        if audit_csv is None:
            raise ConfigError("--accept-above needs the audit of the run. Run `elr audit` first.")
        suggestions = read_suggestions(audit_csv, manifest)
    labels = manifest.labels.copy()
    stays = np.ones(len(manifest), dtype=bool)
    reasons: dict[int, str] = {}
    decided: Counter[str] = Counter()
    for row, decision in decisions.items():
        decided[decision.decision] += 1
        labels[row] = decision.label
        stays[row] = decision.decision != "remove"
        reasons[row] = f"reviewed: {decision.decision}"
    for row, suggestion in suggestions.items():
        is_sure = accept_above is not None and suggestion.error_probability >= accept_above
        if row not in decisions and is_sure and suggestion.label != manifest.labels[row]:
            decided["accepted"] += 1
            labels[row] = suggestion.label
            reasons[row] = f"accepted: error probability {suggestion.error_probability:g}"
    changed = np.flatnonzero((labels != manifest.labels) | ~stays)
    changes = tuple(
        Change(
            path=manifest.paths[int(row)],
            old=manifest.classes[manifest.labels[row]],
            new=manifest.classes[labels[row]] if stays[row] else "",
            reason=reasons[int(row)],
        )
        for row in changed
    )
    rows = np.flatnonzero(stays).astype(np.int64)
    return Plan(manifest, rows, labels[rows], changes, decided, skipped)


def write_csv(plan: Plan, out: Path, reading: Reading, truth_column: str | None = None) -> Path:
    """Write the corrected labels as a CSV file; return the path of the change log beside it.

    The columns are those that `reading` will read: a split only where the data came with splits,
    not where one was drawn. `truth_column` is for true labels, all of them known classes.
    """
    log = check_csv(out)
    manifest, names = plan.manifest, plan.manifest.classes
    columns = [reading.path_column, reading.label_column]
    cells = [(manifest.paths[row] for row in plan.rows), (names[label] for label in plan.labels)]
    if reading.split_column is not None:
        columns.append(reading.split_column)
        cells.append(SPLITS[split] for split in manifest.splits[plan.rows])
    if truth_column is not None and manifest.truth is not None:
        columns.append(truth_column)
        cells.append(names[label] for label in manifest.truth[plan.rows])
    rows = (dict(zip(columns, each, strict=True)) for each in zip(*cells, strict=True))
    write_table(log, CHANGE_COLUMNS, plan.change_rows())
    try:
        write_table(out, columns, rows)
    except BaseException:  # Ctrl-C, too: the same command must be possible again
        log.unlink()
        raise
    return log


def check_csv(out: Path) -> Path:
    """Return the path of the change log of a CSV file, or raise if it cannot be written."""
    if os.path.lexists(out):
        raise DataError(f"{out}: exists. Choose another --out.")
    return _free_log(out, out.stem)


def write_folder(plan: Plan, out: Path, *, mode: str, with_split: bool) -> Path:
    """Write class folders with the images; return the path of the change log beside `out`.

    The folder is filled under a temporary name in the same place and renamed at the end.
    `with_split` is for data that came with splits.
    """
    out = Path(os.path.abspath(out))
    targets = check_folder(plan, out, with_split=with_split)
    log = _free_log(out, out.name)
    sources = [plan.manifest.file(int(row)) for row in plan.rows]
    temporary = out.parent / f".{out.name[:40]}.{uuid.uuid4().hex[:8]}"
    with StopSignals() as stop:
        try:
            temporary.mkdir(parents=True)
            for source, target in zip(sources, targets, strict=True):
                stop.raise_if_received(SAME_COMMAND)
                place = temporary / target
                place.parent.mkdir(parents=True, exist_ok=True)
                _transfer(source, place, mode)
            write_table(log, (*CHANGE_COLUMNS, FILE_COLUMN), _file_rows(plan, targets))
            if out.is_dir():
                out.rmdir()
            temporary.rename(out)
        except OSError as error:
            log.unlink(missing_ok=True)
            raise DataError(_transfer_problem(out, mode, error)) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return log


def check_folder(plan: Plan, out: Path, *, with_split: bool) -> list[str]:
    """Return where in the folder each of the R images goes, or raise if it cannot be written."""
    out = Path(os.path.abspath(out))
    _require_empty(out)
    _free_log(out, out.name)
    if _is_inside_classes(out, plan.manifest):
        raise DataError(
            f"{out}: lies in the folder of the images, where it would become a class."
            " Choose another --out."
        )
    targets = folder_targets(plan, with_split=with_split)
    sources = [plan.manifest.file(int(row)) for row in plan.rows]
    missing = [str(source) for source in sources if not source.is_file()]
    if missing:
        problems = [f"{legible(path)}: no such file." for path in missing[:SHOWN]]
        raise DataError(listed(problems, len(missing), shown=SHOWN))
    return targets


def folder_targets(plan: Plan, *, with_split: bool) -> list[str]:
    """Return where each of the R images goes: `[split/]class/[sub-folders/]file`, all different.

    Sub-folders are those that an image has below the folder of its class, if it is in one. Of
    several images with one name in a class, all but the first get `-1`, `-2` and so on; names
    that differ only in case or Unicode form count as one, because some file systems take them for
    one. Images that stay in their class come first, so that they keep their names.
    """
    manifest = plan.manifest
    names = [manifest.classes[label] for label in np.unique(plan.labels)]
    _check_folder_names(names, with_split=with_split)
    targets = [""] * len(plan.rows)
    taken: set[str] = set()
    numbers: Counter[str] = Counter()
    is_moved = plan.labels != manifest.labels[plan.rows]
    for i in np.argsort(is_moved, kind="stable"):
        row = int(plan.rows[i])
        folder = manifest.classes[plan.labels[i]]
        if with_split:
            folder = f"{SPLITS[manifest.splits[row]]}/{folder}"
        file = _below_class(manifest.paths[row], manifest.classes[manifest.labels[row]])
        stem, suffix = os.path.splitext(file)
        target = wanted = f"{folder}/{file}"
        while folded(target) in taken:
            numbers[folded(wanted)] += 1
            target = f"{folder}/{stem}-{numbers[folded(wanted)]}{suffix}"
        taken.add(folded(target))
        targets[i] = target
    return targets


def _below_class(path: str, label: str) -> str:
    """Return the part of a path below the folder of its class, else the name of the file."""
    parts = path.split("/")
    folders = [name.strip() for name in parts[:-1]][:2]
    below = parts[folders.index(label) + 1 :] if label in folders else parts[-1:]
    is_hidden = any(name.startswith(".") for name in below[:-1])  # a scan would skip it
    return parts[-1] if is_hidden else "/".join(below)


def _file_rows(plan: Plan, targets: Sequence[str]) -> Iterator[dict[str, str]]:
    """Yield the changes with the places of the images, then images that have another name."""
    paths = [plan.manifest.paths[int(row)] for row in plan.rows]
    place_of = dict(zip(paths, targets, strict=True))
    for change in plan.change_rows():
        yield change | {FILE_COLUMN: place_of.pop(change["path"], "")}
    label_of = dict(zip(paths, plan.labels.tolist(), strict=True))
    for path, place in place_of.items():
        if os.path.basename(path) != os.path.basename(place):
            label = plan.manifest.classes[label_of[path]]
            cells = (path, label, label, "renamed: its name was taken")
            yield dict(zip(CHANGE_COLUMNS, cells, strict=True)) | {FILE_COLUMN: place}


def _transfer(source: Path, place: Path, mode: str) -> None:
    if mode == "copy":
        shutil.copy2(source, place)
    elif mode == "hardlink":
        os.link(os.path.realpath(source), place)  # to the image, not to a link that leads there
    else:
        place.symlink_to(source)


def _transfer_problem(out: Path, mode: str, error: OSError) -> str:
    if mode == "copy":
        return cannot_be_written(out, error)
    reason = error.strerror or error
    return f"{out}: cannot be written with --mode {mode} ({reason}). Try --mode copy."


def _free_log(out: Path, stem: str) -> Path:
    """Return the path of the change log, `<stem>.changes.csv`; nothing may be there yet."""
    log = out.with_name(f"{stem}.changes.csv")
    if os.path.lexists(log):
        raise DataError(f"{log}: exists, from an earlier run. Remove it, or choose another --out.")
    return log


def _require_empty(out: Path) -> None:
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir() or any(out.iterdir()):
        raise DataError(f"{out}: exists and is not an empty folder. Choose another --out.")


def _is_inside_classes(out: Path, manifest: Manifest) -> bool:
    """Say whether `out` lies in a root whose images are in folders named after classes."""
    if not out.resolve().is_relative_to(manifest.root.resolve()):
        return False
    folders = {name.strip() for path in manifest.paths for name in path.split("/")[:-1][:2]}
    return len(folders.intersection(manifest.classes)) > 1


def _check_folder_names(names: Iterable[str], *, with_split: bool) -> None:
    """Refuse classes that cannot be folders, or that some systems take for one and the same."""
    remedy = "Write a CSV file instead: --out corrected.csv"
    folders: dict[str, str] = {}
    for name in names:
        if not is_folder_name(name):
            raise DataError(f"class '{legible(name)}' cannot be the name of a folder. {remedy}")
        if not with_split and name.lower() in SPLIT_CODES:
            raise DataError(f"class '{name}': a folder of that name is a split. {remedy}")
        other = folders.setdefault(folded(name), name)
        if other != name:
            raise DataError(
                f"classes '{legible(other)}' and '{legible(name)}' may be one folder: they differ"
                f" only in case or Unicode form. {remedy}"
            )


def is_folder_name(name: str) -> bool:
    """Tell whether a class can be a folder that leads nowhere else and is not hidden."""
    return bool(name) and not name.startswith(".") and not any(c in name for c in "/\\\0")
