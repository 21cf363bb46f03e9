from __future__ import annotations

from pathlib import Path

import pytest

import elrcli

CALLS: list[dict[str, object]] = []  # what the engine was called with


@pytest.fixture
def exported(monkeypatch):
    """Let the engine write nothing."""

    def export_run(run, out, **options):
        CALLS.append({"run": run, "out": out} | options)
        return out or run / "export" / f"model.{options['format'] or 'onnx'}"

    monkeypatch.setattr("elrcli.engine.export.export_run", export_run)


@pytest.mark.usefixtures("exported")
def test_the_file_is_on_stdout_and_its_use_on_stderr(elr):
    outcome = elr("export", "run")
    assert outcome.code == 0
    assert outcome.out == "run/export/model.onnx\n"
    assert "images         float32 [N, 3, S, S], RGB, 0 to 1\n" in outcome.err
    outcome = elr("export", "run", "--format", "safetensors")
    assert outcome.out == "run/export/model.safetensors\n"
    assert outcome.err.splitlines() == [
        "settings  run/export/config.json",
        "timm      timm.create_model('local-dir:run/export', pretrained=True)",
    ]


@pytest.mark.usefixtures("exported")
def test_options_reach_the_engine(elr):
    for quiet, out in (("--quiet", "--out"), ("-q", "-o")):
        outcome = elr("export", "run", "--format", "onnx", out, "m.onnx", "--overwrite", quiet)
        assert outcome == (0, "m.onnx\n", "")
        assert CALLS[-1] == {
            "run": Path("run"),
            "out": Path("m.onnx"),
            "format": "onnx",
            "overwrite": True,
        }


@pytest.mark.usefixtures("exported")
def test_the_function_takes_text():
    assert elrcli.export("run", "m.onnx") == Path("m.onnx")
    assert CALLS[-1] == {
        "run": Path("run"),
        "out": Path("m.onnx"),
        "format": None,
        "overwrite": False,
    }


def test_an_unknown_format_is_a_usage_error(elr):
    outcome = elr("export", "run", "--format", "tflite")
    assert outcome.code == 2
    assert "tflite" in outcome.err


def test_what_is_no_run_is_one_line(elr, tmp_path):
    outcome = elr("export", tmp_path)
    assert outcome == (
        1,
        "",
        f"error: {tmp_path}: holds no config.json. Name a folder written by `elr train`.\n",
    )
