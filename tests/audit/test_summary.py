from __future__ import annotations

import numpy as np

from elrcli.audit import summary as module
from elrcli.audit.summary import confused_pairs, joint_counts, summarise

LABELS = np.array([0, 0, 1, 1])
POSTERIOR = np.array([[1.0, 0.0], [0.2, 0.8], [0.0, 1.0], [0.0, 1.0]])


def test_counts_are_summed_by_true_and_given_class():
    np.testing.assert_allclose(joint_counts(LABELS, POSTERIOR), [[1.2, 0.0], [0.8, 2.0]])


def test_rates_and_matrix_follow_from_the_counts():
    joint = joint_counts(LABELS, POSTERIOR)
    summary = summarise(LABELS, joint, np.array([False, True, False, False]), ("cat", "dog"))
    assert summary["per_class"] == [
        {"class": "cat", "samples": 2, "flagged": 1, "estimated_error_rate": 0.4},
        {"class": "dog", "samples": 2, "flagged": 0, "estimated_error_rate": 0.0},
    ]
    assert summary["noise_matrix"] == [[1.0, 0.0], [0.285714, 0.714286]]  # rows are true classes
    assert summary["most_confused"] == [
        {"true": "dog", "given": "cat", "probability": 0.285714, "samples": 0.8}
    ]


def test_pairs_come_largest_first_and_need_half_a_sample():
    joint = np.array([[9.0, 2.0, 0.4], [3.0, 9.0, 0.0], [0.0, 0.0, 0.0]])
    pairs = confused_pairs(joint, ("a", "b", "c"))
    assert [(pair["true"], pair["given"]) for pair in pairs] == [("b", "a"), ("a", "b")]


def test_a_class_without_samples_has_no_rate():
    joint = np.pad(joint_counts(LABELS, POSTERIOR), (0, 1))
    summary = summarise(LABELS, joint, LABELS > 5, ("a", "b", "c"))
    assert summary["per_class"][2]["estimated_error_rate"] is None


def test_less_than_half_a_sample_says_nothing_of_a_class():
    joint = np.array([[9.0, 1.0, 0.0], [0.0, 0.5, 0.0], [0.2, 0.2, 0.0]])
    matrix = summarise(LABELS, joint, LABELS > 5, ("a", "b", "c"))["noise_matrix"]
    assert matrix == [[0.9, 0.1, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]


def test_a_matrix_of_many_classes_is_left_out(monkeypatch):
    monkeypatch.setattr(module, "MOST_CLASSES", 1)
    summary = summarise(LABELS, joint_counts(LABELS, POSTERIOR), LABELS > 5, ("cat", "dog"))
    assert summary["noise_matrix"] is None
    assert summary["most_confused"]
