"""Read what a review decided (`decisions.csv`) and what the audit suggests (`audit.csv`)."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from elrcli.data.csv_files import column_names, csv_column, csv_rows, path_below
from elrcli.data.manifest import Manifest
from elrcli.errors import MOST_PROBLEMS, DataError, legible, listed, unknown_name

DECISIONS = ("keep", "relabel", "remove", "unsure")
DECISION_COLUMNS = ("path", "label", "decision", "new_label")
AUDIT_COLUMNS = ("path", "label", "suggested", "error_probability")
SHOWN = 20  # bad rows that one message lists


@dataclass(frozen=True)
class Decision:
    """What a person decided about one sample."""

    line: int
    decision: str  # one of DECISIONS
    label: int  # class id: the new one for relabel, else the given one


@dataclass(frozen=True)
class Suggestion:
    """What the evidence prefers for one sample."""

    label: int  # class id
    error_probability: float


def read_decisions(
    csv_path: Path, manifest: Manifest, *, skip_foreign: bool = False
) -> tuple[dict[int, Decision], int]:
    """Return the decision of each reviewed manifest row, and how many lines were skipped.

    `skip_foreign` skips lines about paths or labels that the manifest does not have. Every bad
    line is in one DataError.
    """
    row_of = {path: row for row, path in enumerate(manifest.paths)}
    class_ids = {name: i for i, name in enumerate(manifest.classes)}
    bases = str(manifest.root), os.path.realpath(manifest.root)
    decisions: dict[int, Decision] = {}
    bad: list[str] = []
    foreign = 0
    for line, cells in _rows(csv_path, DECISION_COLUMNS, bad):
        row = row_of.get(cells["path"])
        if row is None:  # written by hand
            row = row_of.get(path_below(cells["path"], bases) or "")
        problem = _foreign(cells, row, manifest)
        if problem or row is None:
            foreign += 1
            if not skip_foreign:
                bad.append(f"{csv_path}:{line}: {problem}")
            continue
        if problem := _problem(cells, manifest, class_ids):
            bad.append(f"{csv_path}:{line}: {problem}")
            continue
        is_relabel = cells["decision"] == "relabel" and cells["new_label"] != cells["label"]
        label = class_ids[cells["new_label"]] if is_relabel else int(manifest.labels[row])
        is_kept = cells["decision"] == "relabel" and not is_relabel  # to the label that it has
        decision = Decision(line, "keep" if is_kept else cells["decision"], label)
        first = decisions.setdefault(row, decision)
        if (first.decision, first.label) != (decision.decision, decision.label):
            bad.append(
                f"{csv_path}:{line}: '{legible(cells['path'])}' is decided otherwise on line"
                f" {first.line}. Keep one of the two lines."
            )
    if bad:
        hint = "\nTo leave out what is not of this run: --skip-foreign" if foreign else ""
        raise DataError(listed(bad, shown=SHOWN) + ("" if skip_foreign else hint))
    return decisions, foreign


def read_suggestions(csv_path: Path, manifest: Manifest) -> dict[int, Suggestion]:
    """Return what `audit.csv` says about each manifest row."""
    if not csv_path.is_file():
        raise DataError(
            f"{csv_path}: no such file, where suggestions are looked for. Run `elr audit` on the"
            f" run with --format csv --out {shlex.quote(str(csv_path.parent))}"
        )
    row_of = {path: row for row, path in enumerate(manifest.paths)}
    class_ids = {name: i for i, name in enumerate(manifest.classes)}
    suggestions: dict[int, Suggestion] = {}
    bad: list[str] = []
    for line, cells in _rows(csv_path, AUDIT_COLUMNS, bad):
        row = row_of.get(cells["path"])
        label = class_ids.get(cells["suggested"])
        probability = _probability(cells["error_probability"])
        if row is None or label is None or probability is None:
            bad.append(f"{csv_path}:{line}: not of this run. Audit it again.")
        elif manifest.classes[manifest.labels[row]] != cells["label"]:
            bad.append(f"{csv_path}:{line}: {_other_label(cells, manifest, row)}")
        else:
            suggestions[row] = Suggestion(label, probability)
    if bad:
        raise DataError(listed(bad, shown=SHOWN))
    return suggestions


def _rows(
    csv_path: Path, columns: Sequence[str], bad: list[str]
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line, cells by column) of every row; a row that is too long goes to `bad`."""
    lines = csv_rows(csv_path, "path")
    header = [name.strip() for name in next(lines)[1]]
    missing = [name for name in columns if name not in header]
    if missing:
        raise DataError(
            f"{csv_path}:1: no column '{missing[0]}'; there are: {column_names(header)}."
            f" The columns must be {','.join(columns)}."
        )
    places = {name: csv_column(csv_path, header, name, "") for name in columns}
    for line, cells in lines:
        if len(bad) == MOST_PROBLEMS:
            return
        if len(cells) > len(header):
            bad.append(f"{csv_path}:{line}: {len(cells)} cells, but the header has {len(header)}")
            continue
        named = {name: cells[place] for name, place in places.items()}
        # Class names carry no space around them, but a file name may.
        yield line, {name: x if name == "path" else x.strip() for name, x in named.items()}


def _foreign(cells: Mapping[str, str], row: int | None, manifest: Manifest) -> str:
    """Return why one line of decisions.csv is not about this run, or nothing."""
    if row is None:
        return f"'{legible(cells['path'])}' is not a path of this run"
    if manifest.classes[manifest.labels[row]] != cells["label"]:
        return _other_label(cells, manifest, row)
    return ""


def _problem(cells: Mapping[str, str], manifest: Manifest, class_ids: Mapping[str, int]) -> str:
    """Return what is wrong with the decision of one line of decisions.csv, or nothing."""
    decision, new_label = cells["decision"], cells["new_label"]
    if decision not in DECISIONS:
        return unknown_name("decision", decision, DECISIONS)
    if decision == "relabel" and not new_label:
        return "relabel needs a new_label"
    if decision == "relabel" and new_label not in class_ids:
        return unknown_name("class", new_label, manifest.classes)
    if decision != "relabel" and new_label not in ("", cells["label"]):
        return f"'{decision}' with the new_label '{legible(new_label)}'. Did you mean 'relabel'?"
    return ""


def _other_label(cells: Mapping[str, str], manifest: Manifest, row: int) -> str:
    given = manifest.classes[manifest.labels[row]]
    return (
        f"'{legible(cells['path'])}' has the label '{legible(cells['label'])}' here, but"
        f" '{legible(given)}' in the run. Use the files that belong together."
    )


def _probability(cell: str) -> float | None:
    """Return a number from 0 to 1, NaN for an empty cell (not ranked), None for anything else."""
    try:
        value = float(cell or "nan")
    except ValueError:
        return None
    return value if not cell or 0.0 <= value <= 1.0 else None
