"""What an audit found: the one object that tables, summary and review page are written from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class DuplicateGroup(NamedTuple):
    """Samples that show the same picture."""

    rows: tuple[int, ...]  # manifest rows, at least two, ascending
    exact: bool  # same bytes; else the pictures look the same
    partly_exact: bool = False  # they look the same, and some of them have the same bytes

    @property
    def has_same_file(self) -> bool:
        """Whether some or all of them have the same bytes."""
        return self.exact or self.partly_exact

    def labels_differ(self, labels: np.ndarray) -> bool:
        """Tell whether they have different ones of the given labels [N] of all manifest rows."""
        return bool((labels[list(self.rows)] != labels[self.rows[0]]).any())


@dataclass(frozen=True, eq=False)
class AuditResult:
    """M ranked samples, most suspicious first; all arrays are parallel to `rows`."""

    rows: np.ndarray  # [M] int64 manifest rows
    labels: np.ndarray  # [M] int32 given class
    suggested: np.ndarray  # [M] int32 class that the evidence prefers
    score: np.ndarray  # [M] float32 in [0, 1], higher is worse
    error_probability: np.ndarray  # [M] float32 in [0, 1], calibrated
    flagged: np.ndarray  # [M] bool
    top_classes: np.ndarray  # [M, k] int32, k = min(5, K), most probable first
    top_probabilities: np.ndarray  # [M, k] float32
    exemplars: Mapping[int, np.ndarray]  # class -> manifest rows that are sure of it, best first
    summary: Mapping[str, Any]  # content of summary.json
    # manifest row of a leading suspect -> its given and its suggested class -> manifest rows that
    # are sure of that class, nearest to the suspect first; empty without features
    nearest: Mapping[int, Mapping[int, np.ndarray]] = field(default_factory=dict)
    duplicates: tuple[DuplicateGroup, ...] = ()
    folder: Path | None = None  # where the files are

    def __len__(self) -> int:
        return len(self.rows)
