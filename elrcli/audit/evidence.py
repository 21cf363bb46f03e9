"""What a run knows about each label, as arrays: the input of scores and calibration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from elrcli.data.manifest import Manifest
from elrcli.data.rows import SPLITS
from elrcli.errors import RunError
from elrcli.methods.table import spread

FLOOR = 1e-6  # of a probability
CHUNK = 16_000_000  # numbers of a table that are worked on at once


@dataclass(frozen=True, eq=False)
class TopTable:
    """A table [N, K] of which only the largest entries of each line are there, with their sum.

    Used like an array: some lines of it are an array. The other entries are taken as equal.
    """

    entries: np.ndarray  # [N, k + 1] k entries and the sum of all others
    columns: np.ndarray  # [N, k] of the entries
    classes: int

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        return len(self.entries), self.classes

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Return whole lines, rows [m] -> [m, K] float32."""
        entries, columns = (torch.from_numpy(part[rows]) for part in (self.entries, self.columns))
        lines: np.ndarray = spread(entries, columns, self.classes).numpy()
        return lines


Table = np.ndarray | TopTable


@dataclass(frozen=True, eq=False)
class Evidence:
    """M samples that were seen, in manifest order; tables have one line per manifest row.

    Lines are sums of predicted probabilities over the epochs: only their direction counts. A
    table may lie in a file and is read in parts.
    """

    rows: np.ndarray  # [M] int64 manifest rows
    labels: np.ndarray  # [M] int32 given class
    held_out: np.ndarray  # [M] bool: `seen` holds predictions made without training on the sample
    seen: Table  # [N, K] predictions by the network that trains on the sample
    judged: Table | None = None  # [N, K] the same by a network that never trained on it
    neighbours: np.ndarray | None = None  # [M, k] positions of samples that look alike

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def classes(self) -> int:
        """The number of classes K."""
        return int(self.seen.shape[1])

    def own(self, positions: np.ndarray) -> np.ndarray:
        """Return what is predicted for samples alone, positions [m] -> [m, K] float32."""
        rows = self.rows[positions]
        found = normalised(self.seen[rows])
        return found if self.judged is None else agreed(found, normalised(self.judged[rows]))

    def belief(self, positions: np.ndarray) -> np.ndarray:
        """Return the belief in each class, positions [m] -> [m, K] float32, rows sum to 1.

        The samples themselves and their neighbours have equal weight.
        """
        found = self.own(positions)
        if self.neighbours is not None and self.neighbours.shape[1] > 0:
            beside = self.neighbours[positions]
            around = np.zeros_like(found)
            for column in beside.T:
                around += self.own(column)
            found = agreed(found, around / np.float32(beside.shape[1]))
        return found

    @property
    def apart(self) -> Table:
        """The table [N, K] by networks that did not train on the samples, if there is one."""
        return self.seen if self.judged is None else self.judged

    def verdict(self, positions: np.ndarray) -> np.ndarray:
        """Return the mean prediction by a network that did not train on the samples, if any.

        positions [m] -> [m, K], rows that sum to 1.
        """
        return normalised(self.apart[self.rows[positions]])

    def chunks(self) -> Iterator[np.ndarray]:
        """Yield all positions in parts whose beliefs fit into memory."""
        step = max(1, CHUNK // self.classes)
        for start in range(0, len(self), step):
            yield np.arange(start, min(start + step, len(self)))


def evidence_of_run(manifest: Manifest, state: Mapping[str, Any]) -> Evidence:
    """Return the evidence in a checkpoint `state` of a run over `manifest`."""
    try:
        record = state["record"]
        visits = record["visits"].numpy()
        seen = _table(record, "prob_sum", manifest.num_classes)
        judged = None
        if "held_out_sum" in record:
            judged = _table(record, "held_out_sum", manifest.num_classes)
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(f"the checkpoint holds no evidence ({error}). Train again.") from None
    shape = (len(manifest), manifest.num_classes)
    tables = [seen] if judged is None else [seen, judged]
    if visits.shape != shape[:1] or any(table.shape != shape for table in tables):
        raise RunError("the checkpoint does not fit the manifest. Train again.")
    rows = np.flatnonzero(visits > 0)
    evidence = Evidence(
        rows=rows,
        labels=manifest.labels[rows],
        held_out=manifest.splits[rows] != SPLITS.index("train"),
        seen=seen,
        judged=judged,
    )
    if not all(_are_sums(table[rows[part]]) for part in evidence.chunks() for table in tables):
        raise RunError("the checkpoint holds predictions that are no probabilities. Train again.")
    return evidence


def _table(record: Mapping[str, Any], name: str, classes: int) -> Table:
    """Return one table of a checkpoint; whether its shape fits is looked at later."""
    entries = record[name].numpy()
    if f"{name}_classes" not in record:
        return entries  # type: ignore[no-any-return]
    columns = record[f"{name}_classes"].numpy()
    fits = columns.ndim == 2 and entries.shape == (len(columns), columns.shape[1] + 1)
    if not fits or (columns.size and not 0 <= columns.min() <= columns.max() < classes):
        raise RunError("the checkpoint does not fit the manifest. Train again.")
    return TopTable(entries, columns, classes)


def _are_sums(lines: np.ndarray) -> bool:
    """Tell whether rows can be normalised to probabilities; not so with NaN."""
    return bool(
        (lines >= 0).all() and np.isfinite(lines.sum(axis=1)).all() and lines.any(axis=1).all()
    )


def agreed(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the normalised geometric mean of two beliefs [m, K]: both must agree on a class."""
    return normalised(np.sqrt(np.maximum(one, FLOOR) * np.maximum(other, FLOOR)))


def normalised(table: np.ndarray) -> np.ndarray:
    """Return rows that sum to 1, table [M, K] >= 0 with at least one positive entry a row.

    fp16 becomes float32.
    """
    table = table.astype(np.result_type(table.dtype, np.float32), copy=False)
    totals = table.sum(axis=1, keepdims=True, dtype=np.float64)
    return np.asarray(table / np.maximum(totals, 1e-12).astype(table.dtype))
