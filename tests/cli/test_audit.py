from __future__ import annotations

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from elrcli.audit.quick import audit_config
from elrcli.audit.report import headline
from elrcli.cli.audit import suspect_lines
from elrcli.config import AUDIT_SETTINGS, Reading, option_name
from elrcli.errors import Interrupted
from elrcli.run import RunFolder

CALLS: list[dict[str, object]] = []  # what the audit was called with
TRAININGS: list[dict[str, object]] = []  # what the training for an audit was called with

SUMMARY = {
    "samples": 200,
    "classes": ["cat", "dog"],
    "flagged": 18,
    "threshold": 0.5,
    "estimated_errors": {"estimate": 20.2, "low": 15.0, "high": 26.0},
    "estimated_error_rate": 0.101,
    "most_confused": [{"true": "cat", "given": "dog", "probability": 0.1, "samples": 12.4}],
    "top_suspects": [
        {"path": "dog/1.png", "label": "dog", "suggested": "cat", "error_probability": 0.987},
        {"path": "cat/2.png", "label": "cat", "suggested": "cat", "error_probability": 0.21},
    ],
    "cautions": ["Only 20 images were held out."],
}


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run whose audit finds SUMMARY."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/a")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"elr": "0.1.0"}')

    def audit_run(run, out, **options):
        options["observer"].progress("predict", 1, 1)
        CALLS.append({"run": run, "out": out} | options)
        return SimpleNamespace(summary=SUMMARY | {"run": str(run)}, folder=out or run / "audit")

    monkeypatch.setattr("elrcli.audit.run.audit_run", audit_run)
    return folder


@pytest.fixture
def photos(run, monkeypatch) -> Path:
    """Images whose training gives `runs/my photos`."""

    def run_for_audit(data, settings, out, **options):
        TRAININGS.append({"data": data, "out": out, "settings": settings} | options)
        return RunFolder(Path("runs/my photos"))

    monkeypatch.setattr("elrcli.audit.quick.run_for_audit", run_for_audit)
    for label in ("cat", "dog"):
        Path("photos", label).mkdir(parents=True)
        Path("photos", label, "1.png").touch()
    return Path("photos")


def test_a_short_summary_on_stderr(elr, run):
    outcome = elr("audit", run)
    assert outcome.code == 0
    assert outcome.out == ""
    assert outcome.err.splitlines() == [
        "",
        *headline(SUMMARY),
        "Only 20 images were held out.",
        "",
        "labelled  probably  images",
        "dog       cat           12",
        "",
        "most suspicious  label  suggested  probability",
        "dog/1.png        dog    cat                99%",
        "cat/2.png        cat    -                  21%",
        "",
        "  table     runs/a/audit/audit.csv",
        "  look at   runs/a/audit/report.html",
        "  next      elr apply runs/a decisions.csv --out corrected.csv",
    ]


def test_of_other_data_there_is_nothing_to_apply(elr, run):
    outcome = elr("audit", run, "--data", "others")
    assert outcome.err.splitlines()[-1] == "  look at   runs/a/audit/report.html"


@pytest.mark.parametrize(
    ("room", "path"),
    [
        (None, "a/very/long/folder/with/an/image.png"),
        (67, "a/very/long/folder/with/an/image.png"),
        (66, "a/very/long/folde…with/an/image.png"),
        (50, "a/very/lo…image.png"),
        (10, "a/very/…age.png"),
    ],
)
def test_long_paths_lose_their_middle_on_a_narrow_terminal(room, path):
    suspect = SUMMARY["top_suspects"][1] | {"path": "a/very/long/folder/with/an/image.png"}
    title, line = suspect_lines([suspect], room)
    assert line.split()[0] == path
    assert len(line) == len(title)
    assert room is None or len(line) <= max(room, len("most suspicious") + 31)


def test_long_classes_lose_their_middle_too():
    names = {"label": "Staffordshire_bull_terrier" * 4, "suggested": "Old_English_sheepdog" * 4}
    suspect = SUMMARY["top_suspects"][1] | {"path": "a/1.png"} | names
    title, line = suspect_lines([suspect], 80)
    assert len(title) == len(line) == 80
    assert line.split()[1].startswith("Staff")


def test_figures_against_the_truth(elr, run, monkeypatch):
    truth = {"samples": 1200, "errors": 21, "auroc": 0.97, "ap": 0.9123, "p_at_n": None}
    monkeypatch.setitem(SUMMARY, "truth", truth)
    assert (
        "against the true labels: 21 errors in 1,200 samples, AUROC 0.970, AP 0.912\n"
        in elr("audit", run).err
    )


def test_without_a_run_the_newest_is_taken(elr, run):
    newer = Path("runs/b")
    newer.mkdir()
    (newer / "config.json").write_text('{"elr": "0.1.0"}')
    os.utime(run / "config.json", ns=(1, 1))
    assert elr("audit").code == 0
    assert CALLS[-1]["run"] == newer


def test_no_run_at_all(elr, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = elr("audit")
    assert outcome.code == 1
    assert outcome.err.startswith("error: runs: holds no run.")


def test_a_missing_target(elr, tmp_path):
    outcome = elr("audit", tmp_path / "missing")
    assert outcome.code == 1
    message = f"{tmp_path}/missing: no such file or folder. Name a run, or images to audit."
    assert outcome.err == f"error: {message}\n"


def test_json_on_stdout(elr, run):
    for quiet in ("--quiet", "-q"):
        outcome = elr("audit", run, "--json", quiet)
        assert json.loads(outcome.out) == SUMMARY | {"run": str(run)}
        assert outcome.err == ""


def test_the_gate(elr, run):
    assert elr("audit", run, "--fail-above", 0.101).code == 0
    outcome = elr("audit", run, "--fail-above", 0.05, "-q")
    assert outcome == (
        3,
        "",
        "error: 10.1% of the labels are estimated to be wrong, more than --fail-above 0.05.\n",
    )


def test_options_reach_the_audit(elr, run):
    outcome = elr(
        "audit", run, "--out", "o", "--format", "jsonl", "--threshold", "0.7", "--no-report",
        "--data", "d.csv", "--truth", "t.csv", "--truth-column", "true",
        "--path-column", "p", "--label-column", "l", "--split-column", "s", "--root", "r",
        "--follow-links", "--device", "cpu",
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
        "report_images": 500,
        "data": Path("d.csv"),
        "truth": Path("t.csv"),
        "truth_column": "true",
        "reading": Reading(Path("r"), "p", "l", "s", follow_links=True),
        "device": "cpu",
    }


def test_images_of_the_report(elr, run):
    assert elr("audit", run, "--report-images", 9).code == 0
    assert CALLS[-1]["report_images"] == 9
    outcome = elr("audit", run, "--report-images", 9, "--no-report")
    assert outcome.code == 2
    assert outcome.err.startswith("error: --report-images: there is no page with --no-report.")


def test_defaults(elr, run):
    assert elr("audit", run, "-o", "o", "--report").code == 0
    assert CALLS[-1]["out"] == Path("o")
    assert CALLS[-1]["report"] is True
    assert (CALLS[-1]["threshold"], CALLS[-1]["report_images"]) == (0.5, 500)


# --- images instead of a run ---

# option, value typed, setting of the training, its value
TRAINING_OPTIONS = [
    ("--root", "pics", "root", Path("pics")),
    ("--path-column", "file", "path_column", "file"),
    ("--label-column", "class", "label_column", "class"),
    ("--split-column", "part", "split_column", "part"),
    ("--follow-links", None, "follow_links", True),
    ("--no-follow-links", None, "follow_links", False),
    ("--val-fraction", "0.25", "val_fraction", 0.25),
    ("--max-unreadable", "0.2", "max_unreadable", 0.2),
    ("--backbone", "resnet18", "backbone", "resnet18"),
    ("-b", "resnet18", "backbone", "resnet18"),
    ("--pretrained", None, "pretrained", True),
    ("--no-pretrained", None, "pretrained", False),
    ("--weights", "w.safetensors", "weights", Path("w.safetensors")),
    ("--small-input", None, "small_input", True),
    ("--no-small-input", None, "small_input", False),
    ("--method", "elr-halves", "method", "elr-halves"),
    ("--epochs", "3", "epochs", 3),
    ("-e", "3", "epochs", 3),
    ("--batch-size", "16", "batch_size", 16),
    ("--batch-size", "auto", "batch_size", "auto"),
    ("--accumulate", "2", "accumulate", 2),
    ("--lr", "1e-3", "lr", 0.001),
    ("--image-size", "64", "image_size", 64),
    ("--augment", "strong", "augment", "strong"),
    ("--flip", None, "flip", True),
    ("--no-flip", None, "flip", False),
    ("--cache", "disk", "cache", "disk"),
    ("--workers", "0", "workers", 0),
    ("--precision", "bf16", "precision", "bf16"),
    ("--seed", "7", "seed", 7),
]


@pytest.mark.parametrize(("option", "value", "setting", "expected"), TRAINING_OPTIONS)
def test_an_option_reaches_the_training(elr, photos, option, value, setting, expected):
    typed = [option] if value is None else [option, value]
    outcome = elr("audit", photos, *typed)
    assert outcome.code == 0, outcome.err
    assert TRAININGS[-1]["settings"][setting] == expected
    assert getattr(audit_config(photos, TRAININGS[-1]["settings"]), setting) == expected


@pytest.mark.parametrize(("option", "value", "setting", "expected"), TRAINING_OPTIONS)
def test_an_option_of_the_training_is_refused_with_a_run(
    elr, run, option, value, setting, expected
):
    typed = [option] if value is None else [option, value]
    outcome = elr("audit", run, *typed)
    assert outcome.code == 2
    message = f"runs/a has its own data and settings. Leave out {option_name(setting)}."
    assert message in outcome.err


@pytest.mark.parametrize("target", ["runs/a", None])
def test_everything_refused_is_named(elr, run, target):
    typed = ["--epochs", "8", "--overwrite", "--root", "r"]
    outcome = elr("audit", *([] if target is None else [target]), *typed)
    assert outcome.code == 2
    assert "Leave out --root, --epochs, --overwrite." in outcome.err


def test_a_device_is_refused_where_nothing_is_predicted(elr, run):
    outcome = elr("audit", run, "--device", "cpu")
    assert outcome.code == 2
    assert "Leave out --device." in outcome.err


def test_only_a_run_ranks_other_data(elr, photos):
    outcome = elr("audit", photos, "--data", "others")
    assert outcome.code == 2
    assert "photos is no run. Name one." in outcome.err


def test_the_defaults_of_the_training(elr, photos):
    assert elr("audit", photos).code == 0
    training = TRAININGS[-1]
    assert (training["data"], training["out"], training["overwrite"]) == (photos, None, False)
    config = audit_config(photos, training["settings"])
    assert {name: getattr(config, name) for name in AUDIT_SETTINGS} == AUDIT_SETTINGS
    assert CALLS[-1]["run"] == Path("runs/my photos")
    page = " ".join(elr("audit", "--help").out.split())
    for value in AUDIT_SETTINGS.values():
        assert re.search(rf"\[default: {value}[];]", page)


def test_what_both_take(elr, photos):
    elr("audit", photos, "--out", "o", "--overwrite", "--device", "cpu", "--threshold", "0.7")
    assert (TRAININGS[-1]["out"], TRAININGS[-1]["overwrite"]) == (Path("o"), True)
    assert TRAININGS[-1]["settings"]["device"] == "cpu"
    assert (CALLS[-1]["out"], CALLS[-1]["device"], CALLS[-1]["threshold"]) == (
        Path("o"), "cpu", 0.7
    )  # fmt: skip


def test_the_truth_of_images_is_in_their_table_or_a_file(elr, photos):
    elr("audit", photos, "--truth-column", "real")
    assert TRAININGS[-1]["settings"]["truth_column"] == "real"
    assert (CALLS[-1]["truth"], CALLS[-1]["truth_column"]) == (None, None)
    Path("t.csv").write_text("path,real\ncat/1.png,cat\ndog/1.png,cat\n")
    elr("audit", photos, "--truth-column", "real", "--truth", "t.csv")
    assert "truth_column" not in TRAININGS[-1]["settings"]
    assert (CALLS[-1]["truth"], CALLS[-1]["truth_column"]) == (Path("t.csv"), "real")


def test_the_last_lines_name_the_run_and_the_next_step(elr, photos):
    outcome = elr("audit", photos)
    assert outcome.out == ""
    assert outcome.err.splitlines()[-4:] == [
        "  table     runs/my photos/audit/audit.csv",
        "  look at   runs/my photos/audit/report.html",
        "  run       runs/my photos",
        "  next      elr apply 'runs/my photos' decisions.csv --out corrected.csv",
    ]
    last = elr("audit", photos, "--out", "my out").err.splitlines()[-1]
    assert last == "  next      elr apply 'my out' decisions.csv --out corrected.csv"
    outcome = elr("audit", photos, "--json", "--quiet", "--fail-above", 0.05)
    assert outcome.code == 3
    assert json.loads(outcome.out)["run"] == "runs/my photos"
    assert len(outcome.err.splitlines()) == 1


@pytest.mark.parametrize(("number", "name", "code"), [(2, "SIGINT", 130), (15, "SIGTERM", 143)])
def test_an_interruption_names_the_command_that_goes_on(
    elr, photos, monkeypatch, number, name, code
):
    def stop(*_, **__):
        raise Interrupted(number, "elr train --resume r && elr audit r")

    monkeypatch.setattr("elrcli.audit.quick.run_for_audit", stop)
    outcome = elr("audit", photos, "--out", "my out", "--overwrite", "-e", 2)
    command = "elr audit photos --out 'my out' -e 2"  # --overwrite would begin again
    assert outcome == (code, "", f"error: stopped by {name}. Continue with: {command}\n")
    outcome = elr("audit", photos)
    assert outcome.err.endswith("elr train --resume r && elr audit r\n")
    gate = ["--fail-above", 0.1, "--no-report", "--format", "jsonl"]
    outcome = elr("audit", photos, "-e", 2, *gate, "--truth-column", "real")
    words = "--format jsonl --fail-above 0.1 --no-report"
    assert outcome.err.endswith(f"elr train --resume r && elr audit r {words}\n")
    Path("t.csv").write_text("path,real\ncat/1.png,cat\ndog/1.png,cat\n")
    outcome = elr("audit", photos, "--truth", "t.csv", "--truth-column", "real")
    assert outcome.err.endswith("elr audit r --truth t.csv --truth-column real\n")


@pytest.mark.parametrize(
    ("stop", "name", "code"),
    [(KeyboardInterrupt(), "SIGINT", 130), (SystemExit(143), "SIGTERM", 143)],
)
def test_a_stop_while_ranking_names_the_command_that_goes_on(
    elr, run, photos, monkeypatch, stop, name, code
):
    def audit_run(*_, **__):
        raise stop

    monkeypatch.setattr("elrcli.audit.run.audit_run", audit_run)
    outcome = elr("audit", run, "--threshold", 0.7)
    command = "elr audit runs/a --threshold 0.7"
    assert outcome == (code, "", f"error: stopped by {name}. Continue with: {command}\n")
    outcome = elr("audit", photos, "--threshold", 0.7)
    command = "elr audit 'runs/my photos' --threshold 0.7"
    assert outcome == (code, "", f"error: stopped by {name}. Continue with: {command}\n")


def test_another_exit_while_ranking_stays_what_it_is(elr, run, monkeypatch):
    def audit_run(*_, **__):
        raise SystemExit(7)

    monkeypatch.setattr("elrcli.audit.run.audit_run", audit_run)
    assert elr("audit", run) == (7, "", "")
