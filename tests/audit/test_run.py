"""The audit of a real, tiny run, through its files."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from elrcli.audit.run import TABLE_COLUMNS, audit_run
from elrcli.config import Reading, TrainConfig
from elrcli.data.manifest import Manifest
from elrcli.engine.distributed import Group
from elrcli.engine.fit import fit
from elrcli.engine.observer import Observer
from elrcli.errors import ConfigError, DataError, Interrupted, RunError
from elrcli.run import RunFolder
from tests.shapes import write_shapes


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, dict[str, str]]:
    """60 images a class, a fifth flipped, 12 epochs from scratch; one image cannot be read."""
    folder = tmp_path_factory.mktemp("audit")
    truth = write_shapes(folder / "shapes", per_class=60, size=48, flip_share=0.2)
    broken = sorted(truth)[0]
    (folder / "shapes" / broken).write_bytes(b"")
    config = TrainConfig(
        data=folder / "shapes",
        backbone="resnet10t",
        pretrained=False,
        image_size=48,
        epochs=12,
        workers=0,
    )
    return fit(config, folder / "run"), truth


@pytest.fixture(scope="module")
def truth_csv(trained: tuple[RunFolder, dict[str, str]]) -> Path:
    run, truth = trained
    path = run.path.parent / "truth.csv"
    rows = "".join(f"{name},{label}\n" for name, label in truth.items())
    path.write_text("path,real\n" + rows)
    return path


def test_images_that_no_epoch_drew_are_counted(tmp_path):
    truth = write_shapes(tmp_path / "shapes", per_class=20, size=32)
    for path in sorted(path for path in truth if path.startswith("square"))[4:]:
        (tmp_path / "shapes" / path).unlink()
    tiny = {"backbone": "resnet10t", "pretrained": False, "image_size": 32, "workers": 0}
    balanced = {"balanced": True, "val_fraction": 0.0, "epochs": 1}
    config = TrainConfig(data=tmp_path / "shapes", **balanced, **tiny)
    result = audit_run(fit(config, tmp_path / "run").path, report=False)
    assert len(result) == 3 * 4
    assert result.summary["cautions"][-1].startswith("32 of 44 images were drawn in no epoch of")


def test_images_that_a_stopped_run_has_not_reached_are_counted(tmp_path):
    class Stop(Observer):
        def progress(self, stage: str, done: int, total: int | None) -> None:
            if stage == "epoch 2/3":
                os.kill(os.getpid(), signal.SIGINT)

    for split in ("train", "test"):
        write_shapes(tmp_path / "shapes" / split, per_class=4, size=32)
    tiny = {"backbone": "resnet10t", "pretrained": False, "image_size": 32, "workers": 0}
    config = TrainConfig(data=tmp_path / "shapes", val_fraction=0.0, epochs=3, **tiny)
    with pytest.raises(Interrupted):
        fit(config, tmp_path / "run", observer=Stop())
    result = audit_run(tmp_path / "run", report=False)
    assert result.summary["cautions"][-1] == (
        "12 of 24 images have not been looked at yet and are not ranked. Continue with:"
        f" elr train --resume {tmp_path / 'run'}"
    )


def test_the_planted_errors_are_found_and_counted(trained, truth_csv, tmp_path):
    run, truth = trained
    result = audit_run(run.path, tmp_path, truth=truth_csv, truth_column="real", report=False)
    figures = result.summary["truth"]
    assert figures["ap"] >= 0.9
    assert figures["auroc"] >= 0.95
    errors = result.summary["estimated_errors"]
    assert errors["low"] <= figures["errors"] <= errors["high"]
    manifest = run.manifest()
    wrong = [
        truth[manifest.paths[row]] != manifest.classes[manifest.labels[row]]
        for row in result.rows[result.flagged]
    ]
    assert np.mean(wrong) >= 0.9
    assert sum(wrong) >= 0.6 * figures["errors"]


def test_the_table_has_every_readable_sample_once_most_suspicious_first(trained, tmp_path):
    run, truth = trained
    result = audit_run(run.path, tmp_path, report=False)
    with (tmp_path / "audit.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == TABLE_COLUMNS
    assert sorted(row["path"] for row in rows) == sorted(truth)[1:]
    assert [int(row["rank"]) for row in rows] == list(range(1, len(rows) + 1))
    for column in ("score", "error_probability"):
        values = [float(row[column]) for row in rows]
        assert values == sorted(values, reverse=True)
        assert 0 <= values[-1] <= values[0] <= 1
    assert {row["split"] for row in rows} == {"train", "val"}
    for row in rows:
        assert (row["flagged"] == "1") == (float(row["error_probability"]) >= 0.5)
        if row["flagged"] == "1":
            assert row["suggested"] != row["label"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["samples"] == len(rows) == len(result)
    assert [entry["path"] for entry in summary["unreadable"]] == [sorted(truth)[0]]
    assert summary["top_suspects"][0]["path"] == rows[0]["path"]
    np.testing.assert_allclose(np.sum(summary["noise_matrix"], axis=1), 1, atol=1e-4)


def test_a_higher_threshold_flags_fewer(trained, tmp_path):
    run, _ = trained
    low, high = (
        audit_run(run.path, tmp_path, threshold=value, report=False).summary["flagged"]
        for value in (0.3, 0.95)
    )
    assert high < low


def test_exemplars_carry_their_label_and_are_no_suspects(trained, tmp_path):
    run, _ = trained
    result = audit_run(run.path, tmp_path, report=False)
    labels = run.manifest().labels
    flagged = set(result.rows[result.flagged].tolist())
    assert set(result.exemplars) == {0, 1, 2}
    for label, rows in result.exemplars.items():
        assert len(rows) > 0
        assert (labels[rows] == label).all()
        assert not flagged & set(rows.tolist())


def test_other_data_is_ranked_by_predictions(trained, tmp_path):
    run, _ = trained
    truth = write_shapes(tmp_path / "new", per_class=10, size=48, flip_share=0.2, seed=9)
    result = audit_run(run.path, tmp_path / "out", data=tmp_path / "new", report=True)
    assert len(result) == len(truth) == 30
    assert (tmp_path / "out" / "report.html").is_file()
    assert not run.audit_folder.exists()


def test_other_data_leaves_the_audit_of_the_run_alone(trained, tmp_path, monkeypatch):
    run, _ = trained
    monkeypatch.chdir(tmp_path)
    write_shapes(tmp_path / "new", per_class=4, size=48, seed=9)
    result = audit_run(run.path, data=Path("new"), report=False)
    assert not run.audit_folder.exists()
    assert result.folder.parent == Path("runs")
    assert result.folder.name.startswith("new-audit-")
    assert (result.folder / "audit.csv").is_file()


def test_all_processes_name_the_folder_of_the_first(trained, tmp_path, monkeypatch):
    class SecondOfTwo(Group):
        def from_first(self, make):
            return tmp_path / "told"

    run, _ = trained
    write_shapes(tmp_path / "new", per_class=4, size=48, seed=9)
    monkeypatch.setattr("elrcli.audit.run.current_group", lambda: SecondOfTwo(rank=1))
    assert audit_run(run.path, data=tmp_path / "new").folder == tmp_path / "told"
    assert not (tmp_path / "told").exists()


def test_other_data_without_a_readable_image_are_named(trained, tmp_path):
    run, truth = trained
    for label in sorted({*truth.values()}):
        (tmp_path / "new" / label).mkdir(parents=True)
        (tmp_path / "new" / label / "1.png").touch()
    with pytest.raises(DataError, match=r"new: no image can be predicted\. circle/1\.png: "):
        audit_run(run.path, tmp_path / "out", data=tmp_path / "new")


def test_unknown_classes_in_other_data_are_refused(trained, tmp_path):
    run, _ = trained
    write_shapes(tmp_path / "new", per_class=2, classes=("circle", "star"), size=48)
    with pytest.raises(DataError, match="star"):
        audit_run(run.path, tmp_path / "out", data=tmp_path / "new")


def test_figures_are_of_the_samples_whose_true_label_is_known(trained, tmp_path):
    run, truth = trained
    path = tmp_path / "truth.csv"
    checked = dict(list(sorted(truth.items()))[1::3])
    rows = "".join(f"{name},{label}\n" for name, label in checked.items())
    path.write_text("path,true_label\n" + rows)
    result = audit_run(run.path, tmp_path / "out", report=False, truth=path)
    wrong = sum(name.split("/")[0] != label for name, label in checked.items())
    figures = result.summary["truth"]
    assert (figures["samples"], figures["errors"]) == (60, wrong)
    assert figures["ap"] > 0.8
    path.write_text("path,true_label\nno/1.png,circle\n")
    with pytest.raises(DataError, match="no true label of any sample, such as 'circle/"):
        audit_run(run.path, tmp_path / "out", report=False, truth=path)


@pytest.mark.parametrize("name", ["path", "file"])
def test_paths_of_the_truth_are_named_as_those_of_the_data(trained, tmp_path, name):
    run, truth = trained
    path = tmp_path / "truth.csv"
    path.write_text(
        f"{name},true_label\n" + "".join(f"{p},{label}\n" for p, label in truth.items())
    )
    options = {"report": False, "truth": path, "reading": Reading(path_column="file")}
    assert audit_run(run.path, tmp_path / "out", **options).summary["truth"]["errors"] > 0


def test_a_true_label_that_is_no_class_counts_as_wrong(trained, tmp_path):
    run, truth = trained
    path = tmp_path / "truth.csv"
    rows = [f"{name},{label if i else 'zebra'}\n" for i, (name, label) in enumerate(truth.items())]
    path.write_text("path,true_label\n" + "".join(rows) + "gone.png,none of these\n")
    heard: list[str] = []

    class Listener(Observer):
        def note(self, message: str) -> None:
            heard.append(message)

    before = sum(truth[path] != path.split("/")[0] for path in list(truth)[1:])
    result = audit_run(run.path, tmp_path / "out", report=False, truth=path, observer=Listener())
    assert result.summary["truth"]["errors"] in (before, before + 1)  # one image is unreadable
    assert "1 true labels name a class that no label has: counted as wrong" in heard
    path.write_text("path,true_label\n" + "".join(f"{name},7\n" for name in truth))
    with pytest.raises(DataError, match="no label in column 'true_label' is a class of the data"):
        audit_run(run.path, tmp_path / "out", report=False, truth=path)


def test_splits_in_the_truth_do_not_matter(trained, tmp_path):
    run, truth = trained
    path = tmp_path / "truth.csv"
    rows = "".join(f"{name},{label},fold 7\n" for name, label in truth.items())
    path.write_text(f"path,true_label,split\n{rows}")
    result = audit_run(run.path, tmp_path / "out", report=False, truth=path)
    assert result.summary["truth"]["errors"] > 0


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (
            "name,true_label",
            r":1: no column with the paths \(path\); there are: name, true_label\.",
        ),
        ("path,real", r":1: no column 'true_label'.* Name it with --truth-column\."),
    ],
)
def test_columns_of_the_truth_are_named_with_their_options(trained, tmp_path, header, message):
    path = tmp_path / "truth.csv"
    path.write_text(f"{header}\n")
    with pytest.raises(DataError, match=message):
        audit_run(trained[0].path, tmp_path, truth=path)
    with pytest.raises(DataError, match=r"is no CSV file\. Check --truth\."):
        audit_run(trained[0].path, tmp_path, truth=tmp_path)


@pytest.mark.parametrize("name", ["summary.json", "audit.csv", "report.html"])
def test_files_of_something_else_are_left_alone(trained, tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match=f"{name}: exists and is not of an audit"):
        audit_run(trained[0].path, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_files_of_an_earlier_audit_go(trained, tmp_path):
    audit_run(trained[0].path, tmp_path, report_images=1)
    audit_run(trained[0].path, tmp_path, format="jsonl", report=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audit.jsonl", "summary.json"]


@pytest.mark.parametrize(
    ("out", "format", "apply_to", "can_accept"),
    [
        ("run/audit", "csv", "run", True),
        ("run/audit", "jsonl", "run", False),
        ("other", "csv", "run", False),
        (".", "csv", ".", True),
    ],
)
def test_the_page_names_the_folder_to_apply_decisions_to(
    trained, tmp_path, monkeypatch, out, format, apply_to, can_accept
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(trained[0].path)
    told = []
    monkeypatch.setattr(
        "elrcli.audit.run.render_report", lambda *_, **options: told.append(options) or ""
    )
    monkeypatch.setattr("elrcli.audit.run.write_table", lambda *_: None)
    monkeypatch.setattr("elrcli.audit.run.write_text", lambda *_: None)
    audit_run(Path("run"), Path(out), format=format)
    assert told[0]["apply_to"] == Path(apply_to)
    assert told[0]["can_accept"] == can_accept


def test_images_that_were_moved_are_counted(trained, tmp_path, monkeypatch):
    class Listener(Observer):
        def __init__(self) -> None:
            self.notes: list[str] = []

        def note(self, message: str) -> None:
            self.notes.append(message)

    monkeypatch.setattr(Manifest, "file", lambda self, row: Path("moved", self.paths[row]))
    heard = Listener()
    audit_run(trained[0].path, tmp_path, report_images=7, observer=heard)
    shapes = trained[0].path.parent / "shapes"
    assert f"7 images of the review page are not in {shapes} any more" in heard.notes


def test_a_truth_column_needs_a_file(trained, tmp_path):
    with pytest.raises(ConfigError, match="needs --truth"):
        audit_run(trained[0].path, tmp_path, truth_column="real")


def test_a_checkpoint_without_evidence_is_named(trained, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained[0].path, copy)
    for path in (copy / "checkpoint").iterdir():
        path.unlink()
    with pytest.raises(RunError, match="checkpoint"):
        audit_run(copy)
