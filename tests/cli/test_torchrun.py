"""The program under torchrun itself; what processes do together is in engine/test_distributed."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from elrcli.cli import console
from elrcli.run import RunFolder
from tests.shapes import write_shapes

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
TINY = [
    "--backbone",
    "test_resnet",
    "--no-pretrained",
    "--image-size",
    "32",
    "--batch-size",
    "4",
    "--workers",
    "0",
]


def start(*arguments: object) -> subprocess.Popen[str]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*torchrun, "--master-port", port, "-m", "elrcli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"},
    )


@pytest.fixture
def photos(tmp_path) -> Path:
    write_shapes(tmp_path / "photos")
    return tmp_path / "photos"


@pytest.mark.slow
def test_two_processes_train_and_predict(photos, tmp_path):
    run = tmp_path / "run"
    program = start("train", photos, "--out", run, "--device", "cpu", "--epochs", 1, *TINY)
    out, err = program.communicate(timeout=300)
    assert program.returncode == 0, err
    assert out == f"{run}\n"
    assert "1 epoch of 3 batches of 4 in each of 2 processes" in err
    assert err.count("1/1") == 1
    program = start("predict", run, photos, "--quiet", "--device", "cpu", "--workers", 0)
    out, err = program.communicate(timeout=300)
    assert program.returncode == 0, err
    paths = [line.partition(",")[0] for line in out.splitlines()[1:]]
    assert paths == sorted(str(path) for path in photos.rglob("*.png"))

    (photos / "circle" / "broken.png").write_bytes(b"no image")
    table = tmp_path / "p.csv"
    program = start("predict", run, photos, "--out", table, "--device", "cpu", "--workers", 0)
    _, err = program.communicate(timeout=300)
    assert program.returncode != 0
    assert len(table.read_text().splitlines()) == 1 + 25
    failed = "error: 1 of 25 images could not be classified. The column 'error' says why."
    assert re.findall("^error: .*", err, re.MULTILINE) == [failed]
    for command in ["predict", run, tmp_path / "none"], ["audit", tmp_path / "none"]:
        program = start(*command, "--device", "cpu")
        _, err = program.communicate(timeout=300)
        assert program.returncode != 0
        said = re.findall("^error: .*", err, re.MULTILINE)
        assert len(said) == 1, said
        assert "none: no such file" in said[0]


def test_what_fails_in_all_processes_is_said_once(tmp_path):
    program = start("train", tmp_path / "none", *TINY)
    _, err = program.communicate(timeout=300)
    assert program.returncode != 0
    assert re.findall("^error: .*", err, re.MULTILINE) == [
        f"error: {tmp_path / 'none'}: no such file or folder. Check the path."
    ]
    assert "elrcli/" not in err  # no traceback of ours


@pytest.mark.slow
def test_a_signal_to_torchrun_ends_all_after_a_checkpoint(photos, tmp_path):
    run = tmp_path / "run"
    program = start("train", photos, "--out", run, "--device", "cpu", "--epochs", 5000, *TINY)
    assert program.stderr is not None
    lines = []
    for line in program.stderr:
        lines.append(line)
        if "1/5000" in line:
            break
    program.send_signal(signal.SIGTERM)
    _, rest = program.communicate(timeout=60)
    said = re.findall("^error: .*", rest, re.MULTILINE)
    assert said == [f"error: stopped by SIGTERM. Continue with: elr train --resume {run}"], rest
    assert program.returncode != 0
    assert len(RunFolder(run).metrics()) >= 1
    assert not run.joinpath("model.safetensors").exists()


def test_only_the_first_process_speaks(elr, monkeypatch, capsys):
    for name, value in zip(ENVIRONMENT, "1212", strict=True):
        monkeypatch.setenv(name, value)
    console.say("a line")
    outcome = elr("backbones", "test_vit")
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")
    outcome = elr("train", "none", "--no-pretrained", "--weights", "w.pth")
    assert outcome.err.startswith("error: --weights")


def test_standard_input_is_for_one_process(elr, monkeypatch, tmp_path):
    """Each process would get a part of the lines."""
    for name, value in zip(ENVIRONMENT, "0202", strict=True):
        monkeypatch.setenv(name, value)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "classes.json").write_text('{"classes": ["a", "b"]}')
    outcome = elr("predict", tmp_path, "-", stdin="a.png\n")
    message = "several processes cannot share standard input. List the paths in a CSV file."
    assert outcome == (1, "", f"error: -: {message}\n")
