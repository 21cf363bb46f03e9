from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from elrcli.audit.report import headline

CALLS: list[dict[str, object]] = []  # what the audit was called with

SUMMARY = {
    "samples": 200,
    "classes": ["cat", "dog"],
    "flagged": 18,
    "threshold": 0.5,
    "estimated_errors": {"estimate": 20.2, "low": 15.0, "high": 26.0},
    "estimated_error_rate": 0.101,
    "most_confused": [{"true": "cat", "given": "dog", "probability": 0.1, "samples": 12.4}],
    "top_suspects": [
        {"path": "dog/1.png", "label": "dog", "suggested": "cat", "error_probability": 0.987}
    ],
}


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run whose audit finds SUMMARY."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/a")
    folder.mkdir(parents=True)
    (folder / "config.json").touch()

    def audit_run(run, out, **options):
        options["observer"].progress("predict", 1, 1)
        CALLS.append({"run": run, "out": out} | options)
        return SimpleNamespace(summary=SUMMARY)

    monkeypatch.setattr("elrcli.audit.audit_run", audit_run)
    return folder


def test_a_short_summary_on_stderr(elr, run):
    outcome = elr("audit", run)
    assert outcome.code == 0
    assert outcome.out == ""
    assert outcome.err.splitlines() == [
        "",
        *headline(SUMMARY),
        "",
        "probably  labelled  images",
        "cat       dog           12",
        "",
        "most suspicious  label  suggested  wrong with",
        "dog/1.png        dog    cat               99%",
        "",
        "  table     runs/a/audit/audit.csv",
        "  look at   runs/a/audit/report.html",
    ]


def test_figures_against_the_truth(elr, run, monkeypatch):
    truth = {"errors": 21, "auroc": 0.97, "ap": 0.9123, "p_at_n": None}
    monkeypatch.setitem(SUMMARY, "truth", truth)
    assert "against the true labels: 21 errors, AUROC 0.970, AP 0.912\n" in elr("audit", run).err


def test_without_a_run_the_newest_is_taken(elr, run):
    newer = Path("runs/b")
    newer.mkdir()
    (newer / "config.json").touch()
    os.utime(run / "config.json", ns=(1, 1))
    assert elr("audit").code == 0
    assert CALLS[-1]["run"] == newer


def test_no_run_at_all(elr, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = elr("audit")
    assert outcome.code == 1
    assert outcome.err.startswith("error: runs: holds no run.")


def test_data_instead_of_a_run_says_how_to_train(elr, tmp_path):
    outcome = elr("audit", tmp_path)
    assert outcome.code == 1
    assert outcome.err == f"error: {tmp_path}: not a run. Train one first: elr train {tmp_path}\n"


def test_json_on_stdout(elr, run):
    for quiet in ("--quiet", "-q"):
        outcome = elr("audit", run, "--json", quiet)
        assert json.loads(outcome.out) == SUMMARY
        assert outcome.err == ""


def test_the_gate(elr, run):
    assert elr("audit", run, "--fail-above", 0.101).code == 0
    outcome = elr("audit", run, "--fail-above", 0.05, "-q")
    assert outcome == (
        3,
        "",
        "error: 10.1% of the labels are estimated to be wrong, more than 5.0%.\n",
    )


def test_options_reach_the_audit(elr, run):
    outcome = elr(
        "audit", run, "--out", "o", "--format", "jsonl", "--threshold", "0.7", "--no-report",
        "--report-images", "9", "--data", "d.csv", "--truth", "t.csv", "--truth-column", "true",
        "--path-column", "p", "--label-column", "l", "--split-column", "s", "--root", "r",
        "--device", "cpu",
    )  # fmt: skip
    assert "o/audit.jsonl" in outcome.err
    assert "report.html" not in outcome.err
    call = CALLS[-1]
    call.pop("observer")
    assert call == {
        "run": run,
        "out": Path("o"),
        "format": "jsonl",
        "threshold": 0.7,
        "report": False,
        "report_images": 9,
        "data": Path("d.csv"),
        "truth": Path("t.csv"),
        "truth_column": "true",
        "path_column": "p",
        "label_column": "l",
        "split_column": "s",
        "root": Path("r"),
        "device": "cpu",
    }


def test_defaults(elr, run):
    assert elr("audit", run, "-o", "o", "--report").code == 0
    assert CALLS[-1]["out"] == Path("o")
    assert CALLS[-1]["report"] is True
    assert (CALLS[-1]["threshold"], CALLS[-1]["report_images"]) == (0.5, 500)
