from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elrcli.audit import evidence as module
from elrcli.audit.evidence import Evidence, evidence_of_run, normalised
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


def make_state(visits: list[int], **tables: object) -> dict[str, Any]:
    record = {name: torch.tensor(table) for name, table in tables.items()}
    return {"record": record | {"visits": torch.tensor(visits, dtype=torch.int32)}}


SUMS = [[3.0, 1.0], [0.0, 0.0], [0.5, 1.5]]


def make_evidence() -> Evidence:
    return evidence_of_run(make_manifest(), make_state([4, 0, 2], prob_sum=SUMS))


def test_a_sample_that_was_never_seen_is_left_out():
    evidence = make_evidence()
    assert evidence.rows.tolist() == [0, 2]
    assert evidence.labels.tolist() == [0, 0]
    assert evidence.held_out.tolist() == [False, True]
    np.testing.assert_allclose(evidence.belief(np.arange(2)), [[0.75, 0.25], [0.25, 0.75]])


def test_a_judge_has_as_much_weight():
    state = make_state([4, 0, 2], prob_sum=SUMS, held_out_sum=[[1.0, 3.0], [0, 0], [1.5, 0.5]])
    evidence = evidence_of_run(make_manifest(), state)
    np.testing.assert_allclose(evidence.own(np.arange(2)), [[0.5, 0.5], [0.5, 0.5]])
    np.testing.assert_allclose(evidence.verdict(np.arange(2)), [[0.25, 0.75], [0.75, 0.25]])


def test_without_a_judge_the_verdict_is_the_prediction():
    np.testing.assert_allclose(make_evidence().verdict(np.array([1])), [[0.25, 0.75]])


def test_neighbours_have_as_much_weight():
    evidence = replace(make_evidence(), neighbours=np.array([[1], [0]]))
    # own (.75, .25), its neighbour (.25, .75)
    np.testing.assert_allclose(evidence.belief(np.array([0])), [[0.5, 0.5]])


def test_no_neighbours_is_no_evidence():
    evidence = replace(make_evidence(), neighbours=np.empty((2, 0), dtype=np.int64))
    np.testing.assert_allclose(evidence.belief(np.array([0])), [[0.75, 0.25]])


def test_parts_cover_all_samples_once(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 2)  # one sample of two classes
    assert [part.tolist() for part in make_evidence().chunks()] == [[0], [1]]


@pytest.mark.parametrize(
    "tables",
    [
        {"prob_sum": [[1.0] * 5] * 3},
        {"prob_sum": SUMS, "held_out_sum": SUMS[:2]},
    ],
)
def test_a_state_of_another_run_is_refused(tables):
    with pytest.raises(RunError, match="does not fit the manifest"):
        evidence_of_run(make_manifest(), make_state([1, 1, 1], **tables))


@pytest.mark.parametrize(
    "line", [[float("nan"), 1.0], [float("inf"), 1.0], [-1.0, 2.0], [0.0, 0.0]]
)
def test_predictions_that_are_no_probabilities_are_refused(line):
    with pytest.raises(RunError, match="no probabilities"):
        evidence_of_run(make_manifest(), make_state([4, 0, 2], prob_sum=[line, *SUMS[1:]]))


def top_state(**changes: object) -> dict[str, Any]:
    """Two entries of five classes; the others have 0.5, 0 and 0.75 together."""
    entries = [[2.0, 1.5, 0.5], [0.0, 0.0, 0.0], [1.0, 0.25, 0.75]]
    tables = {"prob_sum": entries, "prob_sum_classes": [[4, 0], [0, 0], [1, 2]], **changes}
    state = make_state([4, 0, 2], **tables)
    for name, dtype in (("prob_sum", torch.float16), ("prob_sum_classes", torch.int16)):
        state["record"][name] = state["record"][name].to(dtype)
    return state


def test_the_largest_entries_of_a_line_and_the_sum_of_the_others():
    manifest = replace(make_manifest(), classes=tuple("abcde"))
    evidence = evidence_of_run(manifest, top_state())
    assert evidence.classes == 5
    expected = [[0.375, 0.5 / 12, 0.5 / 12, 0.5 / 12, 0.5], [0.125, 0.5, 0.125, 0.125, 0.125]]
    np.testing.assert_allclose(evidence.belief(np.arange(2)), expected, rtol=1e-6)
    assert evidence.belief(np.arange(2)).dtype == np.float32


@pytest.mark.parametrize(
    "changes",
    [
        {"prob_sum_classes": [[4, 0], [0, 0], [1, 5]]},
        {"prob_sum_classes": [[4, 0], [0, 0], [1, -1]]},
        {"prob_sum_classes": [[4, 0], [0, 0]]},
        {"prob_sum_classes": [[4], [0], [1]]},
        {"prob_sum_classes": [4, 0, 1]},
        {"prob_sum": [2.0, 1.0, 0.5]},
    ],
)
def test_largest_entries_that_do_not_fit_are_refused(changes):
    manifest = replace(make_manifest(), classes=tuple("abcde"))
    with pytest.raises(RunError, match="does not fit the manifest"):
        evidence_of_run(manifest, top_state(**changes))


def test_half_precision_is_worked_on_in_full():
    state = make_state([4, 0, 2], prob_sum=SUMS)
    state["record"]["prob_sum"] = state["record"]["prob_sum"].half()
    evidence = evidence_of_run(make_manifest(), state)
    assert evidence.belief(np.arange(2)).dtype == np.float32
    np.testing.assert_allclose(evidence.belief(np.arange(2)), [[0.75, 0.25], [0.25, 0.75]])


@pytest.mark.parametrize("visits", [3, [[1, 1, 1]]])
def test_visits_of_another_shape_are_refused(visits):
    with pytest.raises(RunError, match="does not fit the manifest"):
        evidence_of_run(make_manifest(), make_state(visits, prob_sum=SUMS))


def test_a_state_without_evidence_is_refused():
    with pytest.raises(RunError, match="holds no evidence"):
        evidence_of_run(make_manifest(), {"method": {}})


def test_normalising_leaves_empty_rows_empty():
    np.testing.assert_allclose(normalised(np.array([[1.0, 3.0], [0, 0]])), [[0.25, 0.75], [0, 0]])
