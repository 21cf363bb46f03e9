"""What a run knows about each label, as arrays: the input of scores and calibration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from elrcli.data.manifest import SPLITS, Manifest
from elrcli.errors import RunError


@dataclass(frozen=True, eq=False)
class Evidence:
    """M samples that were seen, in manifest order."""

    rows: np.ndarray  # [M] int64 manifest rows
    labels: np.ndarray  # [M] int32 given class
    held_out: np.ndarray  # [M] bool: predictions made without training on the sample
    probs: np.ndarray  # [M, K] float32 belief in each class; rows sum to 1
    targets: np.ndarray  # [M, K] float32 normalised ELR targets, or held-out predictions


def evidence_of_run(manifest: Manifest, state: Mapping[str, Any]) -> Evidence:
    """Return the evidence in a checkpoint `state` of a run over `manifest`.

    The belief is the mean of two estimates: the target, normalised, which follows the last
    epochs, and the mean prediction over all epochs.
    """
    try:
        record = state["record"]
        visits = record["visits"].numpy()
        target_table = state["method"]["loss.targets"].numpy()
        prob_table = record["prob_sum"].numpy()
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(f"the checkpoint holds no evidence ({error}). Train again.") from None
    shape = (len(manifest), manifest.num_classes)
    if not (len(visits) == shape[0] and target_table.shape == prob_table.shape == shape):
        raise RunError("the checkpoint does not fit the manifest. Train again.")
    rows = np.flatnonzero(visits > 0)
    targets = normalised(target_table[rows])
    means = normalised(prob_table[rows])
    return Evidence(
        rows=rows,
        labels=manifest.labels[rows],
        held_out=manifest.splits[rows] != SPLITS.index("train"),
        probs=(0.5 * (targets + means)).astype(np.float32),
        targets=targets.astype(np.float32),
    )


def normalised(table: np.ndarray) -> np.ndarray:
    """Return rows that sum to 1, table [M, K] >= 0 with at least one positive entry a row."""
    totals = table.sum(axis=1, keepdims=True, dtype=np.float64)
    return np.asarray(table / np.maximum(totals, 1e-12))
