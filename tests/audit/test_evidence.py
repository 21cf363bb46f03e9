from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from elrcli.audit.evidence import evidence_of_run, normalised
from elrcli.data.manifest import Manifest, StringTable
from elrcli.errors import RunError


def make_manifest() -> Manifest:
    return Manifest(
        root=Path("/data"),
        paths=StringTable(["a.png", "b.png", "c.png"]),
        labels=np.array([0, 1, 0], dtype=np.int32),
        splits=np.array([0, 0, 1], dtype=np.int8),
        classes=("cat", "dog"),
    )


def make_state(targets: torch.Tensor, visits: list[int]) -> dict[str, object]:
    record = {
        "visits": torch.tensor(visits, dtype=torch.int32),
        "prob_sum": torch.tensor([[2.0, 2.0], [0.0, 0.0], [0.5, 1.5]]),
    }
    return {"record": record, "method": {"loss.targets": targets}}


def test_a_sample_that_was_never_seen_is_left_out():
    targets = torch.tensor([[0.45, 0.15], [0.0, 0.0], [0.3, 0.3]])
    evidence = evidence_of_run(make_manifest(), make_state(targets, [4, 0, 2]))
    assert evidence.rows.tolist() == [0, 2]
    assert evidence.labels.tolist() == [0, 0]
    assert evidence.held_out.tolist() == [False, True]
    # targets (.75, .25) and (.5, .5), mean predictions (.5, .5) and (.25, .75)
    np.testing.assert_allclose(evidence.targets, [[0.75, 0.25], [0.5, 0.5]], rtol=1e-6)
    np.testing.assert_allclose(evidence.probs, [[0.625, 0.375], [0.375, 0.625]], rtol=1e-6)


def test_a_state_of_another_run_is_refused():
    with pytest.raises(RunError, match="does not fit the manifest"):
        evidence_of_run(make_manifest(), make_state(torch.zeros(3, 5), [1, 1, 1]))


def test_a_state_without_evidence_is_refused():
    with pytest.raises(RunError, match="holds no evidence"):
        evidence_of_run(make_manifest(), {"method": {}})


def test_normalising_leaves_empty_rows_empty():
    np.testing.assert_allclose(normalised(np.array([[1.0, 3.0], [0, 0]])), [[0.25, 0.75], [0, 0]])
