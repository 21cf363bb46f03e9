"""The installed program on a few dozen generated images with planted wrong labels."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shapes import write_shapes

ROOT = Path(__file__).parents[2]
SMALL = (
    "-b",
    "test_resnet",
    "--no-pretrained",
    "--image-size",
    "32",
    "--workers",
    "0",
    "--no-flip",
)


def start(*arguments: object, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "elrcli", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Hold `shapes` with 12 of 60 labels wrong, clean `test`, and `runs/first`."""
    folder = tmp_path_factory.mktemp("end_to_end")
    truth = write_shapes(folder / "shapes", per_class=20, size=32, flip_share=0.2)
    rows = [("path", "true_label"), *sorted(truth.items())]
    (folder / "truth.csv").write_text("".join(f"{path},{label}\n" for path, label in rows))
    write_shapes(folder / "test", per_class=5, size=32, seed=1)
    (folder / "shapes/circle/broken.png").write_bytes(b"no picture")
    with start("train", "shapes", *SMALL, "-e", 8, "-o", "runs/first", cwd=folder) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out == "runs/first\n"
    assert "elr audit runs/first" in err
    return folder


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_run_folder_is_whole(folder):
    run = folder / "runs/first"
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.json", "classes.json", "manifest.csv", "metrics.csv"}
    assert names >= {"model.safetensors", "checkpoint", "unreadable.csv", "curves.svg"}
    assert not [name for name in names if name.startswith(".")]
    assert len(read(run / "metrics.csv")) == 8
    assert [row["path"] for row in read(run / "unreadable.csv")] == ["circle/broken.png"]


def test_audit_finds_the_planted_errors(elr, folder, monkeypatch):
    monkeypatch.chdir(folder)
    outcome = elr("audit", "--json", "--truth", "truth.csv")  # the newest run
    assert outcome.code == 0  # the broken image has no true label: none is asked for
    assert json.loads(outcome.out)["truth"]["samples"] == 60
    with (folder / "truth.csv").open("a") as file:
        file.write("circle/broken.png,circle\n")
    outcome = elr("audit", "--json", "--truth", "truth.csv")
    assert outcome.code == 0, outcome.err
    summary = json.loads(outcome.out)
    assert summary["samples"] == 60
    assert summary["truth"]["errors"] == 12
    assert summary["truth"]["ap"] > 0.8
    assert [row["path"] for row in summary["unreadable"]] == ["circle/broken.png"]

    table = read(folder / "runs/first/audit/audit.csv")
    header = "rank,path,split,label,suggested,score,error_probability,flagged,duplicates"
    assert ",".join(table[0]) == header
    assert [int(row["rank"]) for row in table] == list(range(1, 61))
    truth = {row["path"]: row["true_label"] for row in read(folder / "truth.csv")}
    assert sum(truth[row["path"]] != row["label"] for row in table[:12]) >= 9
    page = (folder / "runs/first/audit/report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_the_gate_closes(elr, folder, monkeypatch):
    monkeypatch.chdir(folder)
    outcome = elr("audit", "runs/first", "--out", "gate", "--no-report", "--fail-above", 0.0)
    assert outcome.code == 3
    assert sorted(path.name for path in Path("gate").iterdir()) == ["audit.csv", "summary.json"]


def test_predict_and_evaluate(elr, folder, monkeypatch):
    monkeypatch.chdir(folder)
    outcome = elr("predict", "runs/first", "test", "shapes/circle/broken.png", "--out", "p.csv")
    assert outcome.code == 1
    *rows, broken = read(Path("p.csv"))
    assert len(rows) == 15
    assert broken["path"] == "shapes/circle/broken.png"
    assert broken["error"]
    right = sum(row["path"].split("/")[1] == row["label"] for row in rows)
    assert right >= 12
    outcome = elr("evaluate", "runs/first", "test", "--json", "-q")
    assert json.loads(outcome.out)["accuracy"] == pytest.approx(right / 15)


def test_ctrl_c_saves_and_resume_goes_on(elr, folder, monkeypatch):
    monkeypatch.chdir(folder)
    with start("train", "test", *SMALL, "-e", 15, "-o", "my run", cwd=folder) as process:
        for line in process.stderr:
            if line.split()[0] == "2/15":
                process.send_signal(signal.SIGINT)
                break
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert err.splitlines()[-1].endswith("elr train --resume 'my run'")
    outcome = elr("train", "--resume", "my run")
    assert outcome.code == 0
    assert outcome.out == "my run\n"
    assert len(read(Path("my run/metrics.csv"))) == 15


def test_two_networks_that_teach_each_other(elr, folder, monkeypatch):
    monkeypatch.chdir(folder)
    command = ("train", "shapes", *SMALL, "--method", "elr-plus", "-e", 4, "-o", "plus")
    with start(*command, cwd=folder) as process:
        for line in process.stderr:
            if line.split()[:1] == ["1/4"]:
                process.send_signal(signal.SIGINT)
                break
        process.communicate(timeout=120)
    assert process.returncode == 130
    assert elr("train", "--resume", "plus", "-q") == (0, "plus\n", "")
    assert [row["epoch"] for row in read(Path("plus/metrics.csv"))] == ["1", "2", "3", "4"]

    outcome = elr("audit", "plus", "--json", "-q")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["method"] == "elr-plus"
    assert len(read(Path("plus/audit/audit.csv"))) == 60
    outcome = elr("predict", "plus", "test", "-q")
    assert outcome.code == 0, outcome.err
    rows = list(csv.DictReader(outcome.out.splitlines()))
    right = sum(row["path"].split("/")[1] == row["label"] for row in rows)
    outcome = elr("evaluate", "plus", "test", "--json", "-q")
    assert json.loads(outcome.out)["accuracy"] == pytest.approx(right / 15)


def test_an_audit_without_a_run(elr, folder, monkeypatch):
    monkeypatch.chdir(folder)
    command = ("audit", "shapes", *SMALL, "--out", "checked", "--epochs", 2)
    with start(*command, cwd=folder) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out == ""
    assert err.splitlines()[-2:] == [
        "  run       checked/run",
        "  next      elr apply checked decisions.csv --out corrected.csv",
    ]
    files = sorted(path.name for path in Path("checked").iterdir())
    assert files == ["audit.csv", "report.html", "run", "summary.json"]
    assert len(read(Path("checked/audit.csv"))) == 60
    assert len(read(Path("checked/run/metrics.csv"))) == 2

    trained = Path("checked/run/model.safetensors").stat().st_mtime_ns
    outcome = elr(*command, "--no-report")
    assert outcome.code == 0
    assert "checked/run: trained before, used as it is\n" in outcome.err
    assert Path("checked/run/model.safetensors").stat().st_mtime_ns == trained
    outcome = elr("audit", "checked/run", "--no-report", "--quiet")  # a run like any other
    assert outcome == (0, "", "")

    outcome = elr(*command[:-1], 1)
    assert outcome.code == 1
    assert "checked/run: holds a run with other settings (epochs 2, not 1)." in outcome.err
    assert elr(*command[:-1], 1, "--overwrite", "--no-report", "-q").code == 0
    assert len(read(Path("checked/run/metrics.csv"))) == 1


def test_ctrl_c_in_an_audit_and_the_same_again(elr, folder, monkeypatch):
    monkeypatch.chdir(folder)
    command = ("audit", "test", *SMALL, "-e", 15, "-o", "my audit", "--no-report")
    with start(*command, "--overwrite", cwd=folder) as process:
        for line in process.stderr:
            if line.split()[0] == "2/15":
                process.send_signal(signal.SIGINT)
                break
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    again = "elr " + " ".join(map(str, command)).replace("my audit", "'my audit'")
    assert err.splitlines()[-1] == f"error: stopped by SIGINT. Continue with: {again}"
    outcome = elr(*command)
    assert outcome.code == 0
    assert "my audit/run: goes on from its last epoch" in outcome.err
    assert len(read(Path("my audit/run/metrics.csv"))) == 15
