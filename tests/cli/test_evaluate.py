from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from elrcli.cli.evaluate import evaluation_lines
from elrcli.config import Reading
from elrcli.engine.evaluate import evaluation_of

CALLS: list[dict[str, object]] = []  # what the engine was called with


@pytest.fixture(autouse=True)
def _run_and_data_are_there(monkeypatch) -> None:
    monkeypatch.setattr("elrcli.api._check_there", lambda *_: None)


@pytest.fixture
def evaluated(monkeypatch):
    """Let the engine find 3 cats, one of them taken for a dog, and 1 dog."""

    def evaluate_run(run, data, **options):
        CALLS.append({"run": run, "data": data} | options)
        return evaluation_of(np.array([[2, 1], [0, 1]]), ("cat", "dog"), [("x.png", "truncated")])

    monkeypatch.setattr("elrcli.engine.evaluate.evaluate_run", evaluate_run)


@pytest.mark.usefixtures("evaluated")
def test_figures_on_stdout(elr):
    outcome = elr("evaluate", "run", "data")
    assert outcome.code == 0
    assert outcome.out.splitlines() == [
        "accuracy           75.00%",
        "balanced accuracy  83.33%",
        "images                  4",
        "left out                1",
        "",
        "class  images  precision  recall     f1",
        "cat         3     100.0%   66.7%  80.0%",
        "dog         1      50.0%  100.0%  66.7%",
        "",
        "label \\ predicted  cat  dog",
        "cat                  2    1",
        "dog                  0    1",
    ]
    assert outcome.err == "left out: x.png: truncated\n"


def test_json_is_utf8_whatever_the_file_names(elr, monkeypatch):
    unreadable = [("größe \udcff.png", "truncated")]
    evaluation = evaluation_of(np.array([[1]]), ("cat",), unreadable)
    monkeypatch.setattr("elrcli.engine.evaluate.evaluate_run", lambda *_, **__: evaluation)
    text = elr("evaluate", "run", "data", "--json", "--quiet").out
    assert r'"größe \udcff.png"' in text
    assert json.loads(text)["unreadable"][0]["path"] == "größe \udcff.png"


@pytest.mark.usefixtures("evaluated")
def test_json_on_stdout(elr):
    outcome = elr("evaluate", "run", "data", "--json", "--no-follow-links")
    figures = json.loads(outcome.out)
    assert next(iter(figures)) == "accuracy"
    assert figures["accuracy"] == 0.75
    assert figures["confusion"] == [[2, 1], [0, 1]]
    assert CALLS[-1]["reading"] == Reading()


@pytest.mark.usefixtures("evaluated")
def test_options_reach_the_engine(elr):
    for quiet in ("--quiet", "-q"):
        outcome = elr(
            "evaluate", "run", "d.csv", quiet,
            "--split", "test", "--root", "r", "--path-column", "p", "--label-column", "l",
            "--split-column", "s", "--follow-links",
            "--batch-size", "8", "--workers", "0", "--device", "cpu",
            "--precision", "fp32",
        )  # fmt: skip
        assert (outcome.code, outcome.err) == (0, "")
        call = CALLS[-1]
        call.pop("observer")
        assert call == {
            "run": Path("run"),
            "data": Path("d.csv"),
            "split": "test",
            "reading": Reading(Path("r"), "p", "l", "s", follow_links=True),
            "batch_size": 8,
            "workers": 0,
            "device": "cpu",
            "precision": "fp32",
        }


def test_many_classes_show_the_largest_confusions(elr, monkeypatch):
    confusion = np.diag(np.full(20, 5))
    confusion[3, 4], confusion[7, 1] = 2, 9
    found = evaluation_of(confusion, tuple(f"c{i}" for i in range(20)), [])
    monkeypatch.setattr("elrcli.engine.evaluate.evaluate_run", lambda *_, **__: found)
    assert elr("evaluate", "run", "data").out.splitlines()[-3:] == [
        "label  predicted  images",
        "c7     c1              9",
        "c3     c4              2",
    ]


@pytest.mark.parametrize(("room", "is_matrix"), [(None, True), (33, True), (32, False)])
def test_a_matrix_that_is_wider_than_the_terminal_is_a_list(room, is_matrix):
    found = evaluation_of(np.array([[2, 1], [0, 1]]), ("beagle", "collie"), [])
    lines = evaluation_lines(found, room)
    assert ("label \\ predicted  beagle  collie" in lines) == is_matrix
    assert ("label   predicted  images" in lines) == (not is_matrix)


def test_confidence_is_shown_where_it_is_known(elr, monkeypatch):
    found = evaluation_of(np.array([[1]]), ("cat",), [])
    found = replace(found, top5_accuracy=0.925, calibration_error=0.0312)
    monkeypatch.setattr("elrcli.engine.evaluate.evaluate_run", lambda *_, **__: found)
    lines = elr("evaluate", "run", "data").out.splitlines()
    assert lines[2:4] == ["top-5 accuracy      92.50%", "calibration error    3.12%"]
    figures = json.loads(elr("evaluate", "run", "data", "--json").out)
    assert (figures["top5_accuracy"], figures["calibration_error"]) == (0.925, 0.0312)


def test_a_class_that_never_occurs_has_no_figures(elr, monkeypatch):
    found = evaluation_of(np.array([[1, 0], [0, 0]]), ("cat", "dog"), [])
    monkeypatch.setattr("elrcli.engine.evaluate.evaluate_run", lambda *_, **__: found)
    assert "dog         0          -       -       -" in elr("evaluate", "run", "data").out
