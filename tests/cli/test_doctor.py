from __future__ import annotations

import json

import pytest
import torch

from elrcli.engine.doctor import Check, DoctorReport

CALLS: list[dict[str, object]] = []  # what the engine was called with


@pytest.fixture
def examined(monkeypatch):
    """Let the engine find what `checks` says."""

    def set_up(*checks):
        def examine(device, **options):
            CALLS.append({"device": device} | options)
            return DoctorReport(checks, "cpu", "fp32")

        monkeypatch.setattr("elrcli.engine.doctor.examine", examine)

    return set_up


def test_a_line_per_check_and_one_per_remedy(elr, examined):
    examined(
        Check("device", "ok", "cpu, Fast 9000"),
        Check("shared memory", "warning", "0.1 GB", "Start it with --shm-size 8g."),
    )
    outcome = elr("doctor")
    assert outcome.code == 0
    assert outcome.err == ""
    assert outcome.out.splitlines() == [
        "ok       device         cpu, Fast 9000",
        "warning  shared memory  0.1 GB",
        "                        Start it with --shm-size 8g.",
        "",
        "A training can work here, on cpu in fp32.",
    ]


@pytest.mark.parametrize(
    ("backbones", "offline", "answers", "start"),
    [
        ([], False, True, ""),
        ([], False, False, ", with --weights FILE or --no-pretrained"),
        ([], True, True, ", with --weights FILE or --no-pretrained"),
        (["resnet50.a1_in1k"], True, False, ""),
    ],
)
def test_where_no_weights_can_be_had_the_end_says_so(
    elr, examined, backbones, offline, answers, start
):
    cache = {"backbones": backbones, "offline": offline}
    examined(
        Check("weights cache", "ok", "some", None, cache),
        Check("weights online", "ok", "asked", None, {"answers": answers}),
    )
    last = elr("doctor", "--online").out.splitlines()[-1]
    assert last == f"A training can work here, on cpu in fp32{start}."


def test_a_problem_is_exit_code_1(elr, examined):
    examined(Check("runs", "problem", "runs/ cannot be written", "Go elsewhere."))
    outcome = elr("doctor")
    assert outcome.code == 1
    assert outcome.err == ""
    assert outcome.out.splitlines()[-1] == "A training cannot work here."


def test_options_reach_the_engine(elr, examined):
    examined(Check("elr", "ok", "1"))
    assert elr("doctor").code == 0
    assert CALLS[-1] == {"device": "auto", "online": False}
    assert elr("doctor", "--device", "cuda:1", "--online").code == 0
    assert CALLS[-1] == {"device": "cuda:1", "online": True}


def test_json_on_stdout(elr, examined):
    examined(Check("runs", "problem", "no", "Go.", {"writable": False}))
    outcome = elr("doctor", "--json")
    assert outcome.code == 1
    assert json.loads(outcome.out) == {
        "can_train": False,
        "device": "cpu",
        "precision": "fp32",
        "checks": [
            {
                "name": "runs",
                "status": "problem",
                "finding": "no",
                "remedy": "Go.",
                "facts": {"writable": False},
            }
        ],
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_gpu_that_is_asked_for_and_not_there(elr, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = elr("doctor", "--device", "cuda", "--json")
    assert outcome.code == 1
    report = json.loads(outcome.out)
    checks = {check["name"]: check for check in report["checks"]}
    assert (report["can_train"], report["device"], report["precision"]) == (False, None, None)
    assert checks["device"]["finding"] == "--device cuda: this machine has 0 CUDA devices"
    assert checks["GPU"]["status"] == "warning"
    assert checks["memory"]["facts"]["free"] > 0
    assert "precision" not in checks
