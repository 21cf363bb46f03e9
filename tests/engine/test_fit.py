from __future__ import annotations

import csv
import functools
import gc
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from elrcli import plots
from elrcli.config import TrainConfig
from elrcli.data.cache import ENTRY
from elrcli.data.loader import Batch, RowLoader
from elrcli.data.samples import load_samples
from elrcli.engine import training as module
from elrcli.engine.automatic import (
    automatic_batch_size,
    automatic_ema_decay,
    automatic_mixup_alpha,
    automatic_sop_start,
)
from elrcli.engine.checkpoints import load_checkpoint, save_checkpoint, take_snapshot
from elrcli.engine.device import Runtime
from elrcli.engine.distributed import Group
from elrcli.engine.fit import _joint_runtime, fit, resume
from elrcli.engine.learner import Learner
from elrcli.engine.metrics import METRIC_COLUMNS
from elrcli.engine.observer import Observer, TrainingPlan
from elrcli.engine.optimizers import build_optimizer
from elrcli.engine.schedules import set_learning_rate
from elrcli.engine.unreadable import too_many_unreadable
from elrcli.errors import DataError, Interrupted, ModelError, RunError, TrainingError
from elrcli.files import json_text, write_text
from elrcli.methods.single import SingleNetwork
from elrcli.methods.table import TableChoice
from elrcli.models import create_network
from elrcli.run import RunFolder
from tests.engine.conftest import TINY
from tests.shapes import write_shapes

CURVES_SVG = plots.curves_svg  # a fixture puts another in its place
TIMING = ("images_per_second", "wait_share", "seconds")
FILES = {
    "checkpoint",
    "classes.json",
    "config.json",
    "curves.svg",
    "features.safetensors",
    "lock",
    "manifest.csv",
    "metrics.csv",
    "model.safetensors",
    "unreadable.csv",
}
Train = Callable[..., RunFolder]


class Recorder(Observer):
    def __init__(self) -> None:
        self.plans: list[TrainingPlan] = []
        self.rows: list[Mapping[str, float]] = []
        self.notes: list[str] = []
        self.stages: list[tuple[str, int, int | None]] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    def training_started(self, plan: TrainingPlan) -> None:
        self.plans.append(plan)

    def progress(self, stage: str, done: int, total: int | None) -> None:
        self.stages.append((stage, done, total))

    def epoch_finished(self, metrics: Mapping[str, float]) -> None:
        self.rows.append(metrics)


class Stopper(Observer):
    """Sends one signal to this process in the middle of an epoch."""

    def __init__(self, stage: str, number: int = signal.SIGINT) -> None:
        self.stage = stage
        self.number = number
        self.has_sent = False

    def progress(self, stage: str, done: int, total: int | None) -> None:
        if stage == self.stage and not self.has_sent:
            self.has_sent = True
            os.kill(os.getpid(), self.number)


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Return the leaves of a nested state by dotted name."""
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {name: value}
    return {k: v for key, part in items for k, v in flat(part, f"{name}.{key}").items()}


def results(run: RunFolder) -> dict[str, Any]:
    """Return everything that a run decided: last state, model and metrics, without times."""
    state = load_checkpoint(run.checkpoint_folder) | {
        "model": safetensors.torch.load_file(run.model_file),
        "csv": [{k: v for k, v in row.items() if k not in TIMING} for row in run.metrics()],
        "text": [run.manifest_file.read_text(), run.unreadable_file.read_text()],
    }
    return {k: v for k, v in flat(state).items() if not k.endswith(TIMING)}


def assert_same(one: RunFolder, other: RunFolder) -> None:
    """Both runs came to bitwise the same results."""
    first, second = results(one), results(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, Tensor):
            same = torch.equal(value.nan_to_num(-7.0), second[name].nan_to_num(-7.0))
        else:
            same = value == second[name]
        assert same, name


def weights(run: RunFolder, epoch: int) -> dict[str, Tensor]:
    """Return the trained network of a checkpoint."""
    state = safetensors.torch.load_file(run.checkpoint_folder / f"{epoch:06d}.safetensors")
    prefix = "method.network."
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def changed(run: RunFolder, first: int, last: int) -> set[str]:
    before, after = weights(run, first), weights(run, last)
    return {name for name in before if not before[name].equal(after[name])}


# --- the run folder ---


def test_the_files_of_a_run(shared_run):
    assert {path.name for path in shared_run.path.iterdir()} == FILES
    kept = sorted(path.name for path in shared_run.checkpoint_folder.iterdir())
    assert kept == ["000001.safetensors", "000002.safetensors"]
    assert shared_run.unreadable_file.read_text() == "path,reason\n"
    assert shared_run.curves_file.read_text().startswith("<?xml")


def test_config_json_holds_resolved_settings_and_versions(shared_run, shapes):
    config = shared_run.config()
    assert set(config) == {"elr", "settings", "data_root", "preprocessing", "versions"}
    assert config["data_root"] == str(shapes)
    assert config["preprocessing"]["image_size"] == 32
    assert config["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    settings = shared_run.train_config()
    assert (settings.lr, settings.weight_decay, settings.batch_size) == (0.02, 0.001, 8)
    assert shared_run.classes() == ("circle", "square", "triangle")


def test_metrics_have_one_row_per_epoch(shared_run):
    with shared_run.metrics_file.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == list(METRIC_COLUMNS)
    assert len(rows) == 2
    first, last = shared_run.metrics()
    assert (first["epoch"], last["epoch"]) == (1, 2)
    assert first["changed"] is None
    assert last["changed"] is not None
    assert last["loss"] == pytest.approx(last["loss_ce"] + last["loss_elr"], rel=1e-3)
    assert last["lr"] == pytest.approx(0.02 * 0.01)  # cosine, lowest factor
    assert last["clean_right"] is None


def test_the_observer_hears_the_plan_and_every_epoch(train):
    heard = Recorder()
    run = train(observer=heard, batch_size=None, epochs=2)
    (plan,) = heard.plans
    assert (plan.train_images, plan.val_images, plan.test_images) == (22, 2, 0)
    assert (plan.batch_size, plan.batches, plan.first_epoch) == (16, 2, 0)
    assert plan.parameters == sum(
        t.numel() for n, t in weights(run, 2).items() if "num_b" not in n and "running" not in n
    )
    assert [row["epoch"] for row in heard.rows] == [1, 2]
    assert ("epoch 2/2", 22, 22) in heard.stages
    assert ("val", 2, 2) in heard.stages
    assert heard.notes == []


def test_the_default_place_is_named_after_data_and_backbone(shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = fit(TrainConfig(**{"data": shapes, **TINY, "epochs": 1}))
    assert re.fullmatch(r"runs/shapes-test_resnet-\d{8}-\d{6}", str(run.path))


@pytest.mark.parametrize(("augment", "held"), [("light", [24]), ("standard", [2, 22])])
def test_the_look_for_an_audit_caches_nothing_that_training_does_not(train, augment, held):
    run = train(epochs=1, cache="disk", augment=augment)
    entries = [np.fromfile(file, ENTRY) for file in run.cache_folder.glob("*.index")]
    assert sorted(int((of["end"] > 0).sum()) for of in entries) == held


def test_an_existing_run_is_replaced_only_when_asked(train):
    train(epochs=1)
    with pytest.raises(RunError, match="Add --overwrite"):
        train(epochs=1)
    with pytest.raises(RunError, match="Add --overwrite"):  # before the data is looked for
        train(epochs=1, data=Path("nowhere"))
    assert len(train(epochs=1, seed=3, overwrite=True).metrics()) == 1


@pytest.mark.parametrize(("images", "size"), [(2, 16), (320, 16), (640, 32), (10**6, 64)])
def test_automatic_batch_size_leaves_twenty_steps(images, size):
    assert automatic_batch_size(images) == size


@pytest.mark.parametrize(("steps", "decay"), [(0, 0.5), (20, 0.5), (400, 0.95), (10**6, 0.997)])
def test_the_automatic_average_remembers_a_twentieth_of_the_steps(steps, decay):
    assert automatic_ema_decay(steps) == pytest.approx(decay)


@pytest.mark.parametrize(("epochs", "alpha"), [(1, 0.1), (40, 0.2), (200, 1), (400, 1)])
def test_short_trainings_mix_less(epochs, alpha):
    assert automatic_mixup_alpha(epochs) == pytest.approx(alpha)


@pytest.mark.parametrize(("epochs", "start"), [(400, 1e-8), (40, 1e-8), (20, 10**-4.5), (1, 0.067)])
def test_the_corrections_of_sop_start_from_more_in_short_trainings(epochs, start):
    assert automatic_sop_start(epochs) == pytest.approx(start, rel=0.01)


def test_the_automatic_start_of_sop_is_kept_with_the_run(train):
    assert train(method="sop", epochs=1).train_config().sop_start == automatic_sop_start(1)
    assert train("given", method="sop", epochs=1, sop_start=0.5).train_config().sop_start == 0.5
    assert train("ce", method="ce", epochs=1).train_config().sop_start is None


def test_automatic_averages_and_mixup_are_kept_with_the_run(train):
    """22 images in steps of 8: three an epoch."""
    config = train(method="elr-plus", epochs=20).train_config()
    assert config.ema_decay == pytest.approx(1 - 20 / 60)
    assert config.mixup_alpha == pytest.approx(0.1)
    given = {"ema_decay": 0.5, "mixup_alpha": 3.0}
    config = train("given", method="elr-plus", epochs=1, **given).train_config()
    assert (config.ema_decay, config.mixup_alpha) == (0.5, 3.0)
    config = train("neither", epochs=1).train_config()
    assert (config.ema_decay, config.mixup_alpha) == (None, None)


def test_it_learns(train):
    run = train(epochs=6, augment="none", val_fraction=0.25)
    last = run.metrics()[-1]
    assert last["train_agreement"] > 0.9
    assert last["target_agreement"] > 0.9
    assert last["val_loss"] < math.log(3)


# --- labels, splits and true labels ---


@pytest.fixture
def table(tmp_path) -> Path:
    """24 images with a quarter of the labels wrong, true labels, and a test split."""
    truth = write_shapes(tmp_path / "images", flip_share=0.25)
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split", "real"])
        for number, (path, name) in enumerate(truth.items()):
            split = "test" if number % 6 == 0 else "val" if number % 6 == 1 else "train"
            writer.writerow([path, path.split("/")[0], split, name])
    return tmp_path / "labels.csv"


def test_true_labels_are_reported_and_add_up(train, table):
    run = train(data=table, root=table.parent / "images", truth_column="real")
    first, last = run.metrics()
    for row in (first, last):
        assert row["clean_right"] + row["clean_other"] == pytest.approx(1, abs=1e-5)
        wrong = [row[f"wrong_{kind}"] for kind in ("right", "memorised", "other")]
        assert sum(wrong) == pytest.approx(1, abs=1e-5)
        assert 0 <= row["val_accuracy_true"] <= 1
    assert first["test_agreement"] is None  # the test split is looked at once, at the end
    assert 0 <= last["test_accuracy_true"] <= 1


def test_true_labels_never_train(train, table):
    settings = {"data": table, "root": table.parent / "images"}
    one = train("one", **settings)
    lines = table.read_text().splitlines()
    lines[3] = lines[3].rpartition(",")[0] + ",hexagon"  # which no label says
    table.write_text("\n".join(lines))
    heard = Recorder()
    other = train("other", **settings, truth_column="real", observer=heard)
    message = "1 true labels name a class that no label has: counted as wrong"
    assert heard.notes == [message]
    for name, tensor in weights(one, 2).items():
        assert tensor.equal(weights(other, 2)[name]), name


def test_every_split_has_targets_and_a_record(train, table):
    run = train(data=table, root=table.parent / "images")
    state = load_checkpoint(run.checkpoint_folder)
    manifest = run.manifest()
    visits = {split: state["record"]["visits"][manifest.rows(split)] for split in ("train", "val")}
    assert set(visits["train"].tolist()) == set(visits["val"].tolist()) == {2}
    assert set(state["record"]["visits"][manifest.rows("test")].tolist()) == {1}
    targets = state["method"]["loss.targets"].sum(dim=1)
    torch.testing.assert_close(targets[manifest.rows("train")], torch.full((16,), 1 - 0.7**2))
    torch.testing.assert_close(targets[manifest.rows("test")], torch.full((4,), 0.3))


def test_without_a_validation_split(train):
    run = train(val_fraction=0.0, epochs=1)
    assert run.metrics()[0]["val_loss"] is None
    assert len(run.manifest().rows("train")) == 24


def test_a_class_of_one_image_stays_in_training(train, tmp_path):
    write_shapes(tmp_path / "data", per_class=4)
    write_shapes(tmp_path / "data", per_class=1, classes=("rare",))
    run = train(data=tmp_path / "data", epochs=1, val_fraction=0.5)
    manifest = run.manifest()
    (row,) = [i for i, path in enumerate(manifest.paths) if path.startswith("rare/")]
    assert row in manifest.rows("train")


def test_a_class_without_training_images_is_named(train, tmp_path):
    for split in ("train", "val"):
        write_shapes(tmp_path / "data" / split, per_class=4)
    write_shapes(tmp_path / "data" / "val", per_class=1, classes=("rare",))
    heard = Recorder()
    run = train(data=tmp_path / "data", observer=heard, epochs=1)
    assert heard.notes == ["no training image of 'rare': cannot be learned"]
    assert run.classes() == ("circle", "rare", "square", "triangle")
    assert load_checkpoint(run.checkpoint_folder)["record"]["visits"].tolist() == [1] * 25


def test_classes_that_look_alike_are_named(train, tmp_path):
    write_shapes(tmp_path / "data", per_class=4, classes=("circle", "Circle", "square"))
    heard = Recorder()
    train(data=tmp_path / "data", observer=heard, epochs=1)
    named = "'Circle', 'circle'"
    assert heard.notes == [f"classes that differ only in case or Unicode form: {named}"]


def test_images_in_no_class_folder_are_named(train, tmp_path):
    data = tmp_path / "data"
    write_shapes(data, per_class=4)
    (data / "loose.png").touch()
    heard = Recorder()
    run = train(data=data, observer=heard, epochs=1)
    assert heard.notes == [f"{data}: images in no class folder, left out: 1"]
    assert len(run.manifest()) == 12


def test_too_few_training_images_are_refused(train, shapes, tmp_path):
    lines = ["path,label,split", "circle/0000.png,a,train", "circle/0003.png,b,val"]
    (tmp_path / "l.csv").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"too few training images\. At least 2 are needed"):
        train(data=tmp_path / "l.csv", root=shapes)


# --- images that cannot be read ---


@pytest.fixture
def damaged(tmp_path) -> Path:
    write_shapes(tmp_path / "data")
    (tmp_path / "data" / "square" / "0004.png").write_bytes(b"no image")
    return tmp_path / "data"


@pytest.mark.parametrize("val_fraction", [0.0, 0.34])
def test_an_unreadable_image_is_named_and_left_out(train, damaged, val_fraction):
    heard = Recorder()
    run = train(data=damaged, observer=heard, val_fraction=val_fraction)
    assert run.unreadable_file.read_text().splitlines()[1].startswith("square/0004.png,")
    assert "1 images could not be read" in heard.notes[0]
    row = list(run.manifest().paths).index("square/0004.png")
    state = load_checkpoint(run.checkpoint_folder)
    visits = state["record"]["visits"].tolist()
    assert visits == [0 if i == row else 2 for i in range(24)]
    assert not state["method"]["loss.targets"][row].any()
    assert state["unreadable"] == [[row, run.unreadable_file.read_text().split(",", 2)[-1].strip()]]


def test_what_a_balanced_training_meets_last_is_listed_too(train, uneven):
    bad = sorted((uneven / "circle").iterdir())[:9]  # of which an epoch draws eight at most
    for path in bad:
        path.write_bytes(b"no image")
    run = train(data=uneven, balanced=True, epochs=1, val_fraction=0.0, max_unreadable=0.9)
    with run.unreadable_file.open() as file:
        listed = [row["path"] for row in csv.DictReader(file)]
    assert listed == [f"circle/{path.name}" for path in bad]
    assert len(load_checkpoint(run.checkpoint_folder)["unreadable"]) == 9


def test_data_that_is_away_in_the_last_look_does_not_end_the_run(train, shapes, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    run = train(data=data)
    features = run.features_file.read_bytes()
    run.features_file.unlink()
    data.rename(tmp_path / "away")
    with pytest.raises(DataError) as caught:
        resume(run.path)
    assert "24 images that training has read cannot be read any more. Bring" in str(caught.value)
    assert not run.unreadable_file.read_text().count("\n") > 1
    assert not run.features_file.exists()
    (tmp_path / "away").rename(data)
    resume(run.path)
    assert run.features_file.read_bytes() == features


def test_a_single_image_left_in_a_batch_does_not_stop_training(train, damaged):
    run = train(data=damaged, val_fraction=0.0, batch_size=2)
    assert all(tensor.isfinite().all() for tensor in weights(run, 2).values())


def test_batches_of_one(train):
    run = train(batch_size=1, epochs=1)
    assert changed(run, 0, 1) >= {"fc.weight", "layer1.0.conv1.weight"}
    assert not any("running" in name for name in changed(run, 0, 1))


def test_a_batch_without_any_readable_image_makes_no_step(train, damaged):
    run = train(data=damaged, val_fraction=0.0, batch_size=1, ema=True, epochs=1)
    state = load_checkpoint(run.checkpoint_folder)["method"]
    assert int(state["average._extra_state"]) == 23  # of 24 batches


def test_if_no_image_can_be_read_the_first_is_named(train, tmp_path):
    write_shapes(tmp_path / "data", per_class=2)
    for path in (tmp_path / "data").rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"no training image can be read\. circle/000\d\.png: "):
        train(data=tmp_path / "data", max_unreadable=1.0)


def test_readable_validation_images_alone_are_not_enough(train, tmp_path):
    for split in ("train", "val"):
        write_shapes(tmp_path / "data" / split, per_class=2)
    for path in (tmp_path / "data" / "train").rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"no training image can be read\. train/circle/"):
        train(data=tmp_path / "data", max_unreadable=1.0)


@pytest.mark.parametrize(
    ("unreadable", "images", "share", "too_many"),
    [
        (0, 100, 0.0, False),
        (1, 100, 0.0, True),
        (1, 4, 0.05, False),  # one alone is never too many
        (2, 4, 0.05, True),
        (5, 100, 0.05, False),
        (6, 100, 0.05, True),
        (100, 100, 1.0, False),
    ],
)
def test_how_many_unreadable_images_are_too_many(unreadable, images, share, too_many):
    assert too_many_unreadable(unreadable, images, share) is too_many


def test_too_many_unreadable_images_end_the_run_and_are_listed(train, damaged, tmp_path):
    bad = ["circle/0000.png", "square/0004.png", "triangle/0002.png"]
    for name in bad:
        (damaged / name).write_bytes(b"no image")
    with pytest.raises(DataError) as caught:
        train(data=damaged, val_fraction=0.0, max_unreadable=0.1)
    assert "3 or more of 24 training images cannot be read; --max-unreadable is 0.1. " in str(
        caught.value
    )
    lines = (tmp_path / "run" / "unreadable.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == bad
    run = train("more", data=damaged, val_fraction=0.0, max_unreadable=0.125)  # 3 of 24
    assert len(run.metrics()) == 2


def test_after_the_images_are_mended_the_run_goes_on(train, damaged, tmp_path):
    (damaged / "square" / "0001.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="2 or more of 24"):
        train(data=damaged, val_fraction=0.0)
    for number in (1, 4):
        shutil.copy(damaged / "square" / "0007.png", damaged / "square" / f"000{number}.png")
    run = resume(tmp_path / "run")
    assert len(run.metrics()) == 2
    assert run.unreadable_file.read_text() == "path,reason\n"


# --- the same again ---


def test_the_same_seed_gives_the_same_run(train, shared_run):
    assert_same(train(), shared_run)


def test_another_seed_gives_another_run(train, shared_run):
    run = train(seed=1)
    assert not weights(run, 2)["fc.weight"].equal(weights(shared_run, 2)["fc.weight"])


@pytest.mark.parametrize("settings", [{"workers": 2}, {"cache": "ram"}, {"cache": "disk"}])
def test_loading_does_not_change_the_result(train, shared_run, settings):
    assert_same(train(**settings), shared_run)


def test_cross_entropy_is_elr_of_weight_zero(train):
    one, other = train("ce", method="ce"), train("zero", lam=0.0)
    assert_same(one, other)
    assert one.metrics()[-1]["loss_elr"] == 0


@pytest.mark.parametrize("method", ["ce", "gce", "sl", "sop"])
def test_every_method_keeps_targets(train, method):
    run = train(method=method)
    targets = load_checkpoint(run.checkpoint_folder)["method"]["loss.targets"]
    torch.testing.assert_close(targets.sum(dim=1), torch.full((24,), 0.51))  # 1 - 0.7 ** 2
    assert run.metrics()[-1]["loss_elr"] == 0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": "adamw", "accumulate": 2},
        {"mixup": True, "ema": True, "augment": "strong"},
        {"method": "sop", "sop_lr_u": 1e5, "ema": True},
        {"method": "elr-halves", "optimizer": "adamw", "lam_ramp": 5},
        {"method": "elr-plus", "optimizer": "adamw", "lam_ramp": 5, "ema_ramp": 7},
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(train, tmp_path, settings):
    whole = train("whole", epochs=3, **settings)
    with pytest.raises(Interrupted):
        train("stopped", epochs=3, **settings, observer=Stopper("epoch 2/3"))
    heard = Recorder()
    resumed = resume(tmp_path / "stopped", observer=heard)
    assert heard.plans[0].first_epoch == 1
    assert [row["epoch"] for row in heard.rows] == [2, 3]
    assert_same(resumed, whole)
    assert {path.name for path in resumed.path.iterdir()} == FILES


def test_resume_remembers_unreadable_images(train, damaged, tmp_path):
    whole = train("whole", data=damaged)
    with pytest.raises(Interrupted):
        train("stopped", data=damaged, observer=Stopper("epoch 2/2"))
    assert_same(resume(tmp_path / "stopped"), whole)


def test_resuming_a_finished_run_trains_nothing(run_copy, shared_run):
    heard = Recorder()
    resume(run_copy.path, observer=heard)
    assert heard.rows == heard.stages == []
    assert heard.notes == [f"{run_copy.path}: finished before, nothing left to train"]
    assert_same(run_copy, shared_run)


def test_resume_finishes_a_run_that_ended_before_its_last_files(run_copy, shared_run):
    run_copy.model_file.unlink()
    run_copy.curves_file.unlink()
    resume(run_copy.path)
    assert {path.name for path in run_copy.path.iterdir()} == FILES
    assert_same(run_copy, shared_run)


# --- balanced epochs ---


@pytest.fixture
def uneven(tmp_path) -> Path:
    """24 circles, 16 squares, 8 triangles."""
    folder = tmp_path / "uneven"
    truth = write_shapes(folder, per_class=24)
    for name, kept in (("square", 16), ("triangle", 8)):
        for path in sorted(path for path in truth if path.startswith(name))[kept:]:
            (folder / path).unlink()
    return folder


def test_a_balanced_epoch_shows_as_many_images_of_each_class(train, uneven):
    heard = Recorder()
    settings = {"data": uneven, "val_fraction": 0.0, "batch_size": None, "epochs": 2}
    run = train(balanced=True, **settings, observer=heard)
    plan = heard.plans[0]
    assert (plan.train_images, plan.batches, plan.batch_size) == (48, 2, 16)  # 2 of 12 make 24
    steps = [(done, total) for stage, done, total in heard.stages if stage == "epoch 1/2"]
    assert steps == [(12, 24), (24, 24)]
    labels = torch.from_numpy(run.manifest().labels).long()
    state = load_checkpoint(run.checkpoint_folder)
    visits = state["record"]["visits"]
    for number, images in enumerate((24, 16, 8)):
        of_class = visits[labels == number]
        assert len(of_class) == images
        assert of_class.sum() == 2 * 8
        assert of_class.max() <= 2
    drawn = ~state["record"]["given_prob"][:, 1].isnan()  # in the second epoch
    assert 0 < drawn.sum() == 24 < (visits > 0).sum()
    agrees = (state["record"]["prediction"] == labels)[drawn].float().mean()
    assert heard.rows[1]["train_agreement"] == pytest.approx(float(agrees))
    targets = state["method"]["loss.targets"]
    # A row that was not drawn keeps its target: 1 - beta ** visits says how often it was moved.
    torch.testing.assert_close(targets.sum(dim=1), 1 - 0.7 ** visits.float())
    assert bool((visits == 0).any())
    assert not bool(targets[visits == 0].any())


def test_a_balanced_run_resumes_as_it_would_have_gone_on(train, uneven, tmp_path):
    settings = {"data": uneven, "balanced": True, "epochs": 3}
    whole = train("whole", **settings)
    with pytest.raises(Interrupted):
        train("stopped", **settings, observer=Stopper("epoch 2/3"))
    assert_same(resume(tmp_path / "stopped"), whole)


# --- settings ---


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw"},
        {"clip_grad": 1.0},
        {"layer_decay": 0.7, "head_lr_scale": 10.0},
        {"mixup": True},
        {"mixup": True, "weigh_labels": True},
        {"ema": True, "ema_ramp": 2},
        {"lam_ramp": 2},
        {"method": "gce", "mixup": True, "ema": True},
        {"method": "sl", "sl_alpha": 6.0, "sl_beta": 0.1},
        {"method": "sl", "precision": "bf16"},
        {"method": "sop"},
        {"method": "sop", "precision": "bf16"},
        {"small_input": True},
        {"schedule": "step", "milestones": (0.5,)},
        {"schedule": "restarts", "restart_epochs": 0.5},
        {"schedule": "constant", "warmup": 0.0},
        {"augment": "none"},
        {"augment": "standard", "flip": False},
        {"augment": "crop"},
        {"augment": "strong"},
        {"precision": "bf16"},
        {"precision": "bf16", "mixup": True},
    ],
    ids=str,
)
def test_every_setting_trains(train, settings):
    run = train(epochs=1, **settings)
    (row,) = run.metrics()
    assert math.isfinite(row["loss"])
    assert "layer1.0.conv1.weight" in changed(run, 0, 1)
    assert all(tensor.isfinite().all() for tensor in weights(run, 1).values())


def test_freezing_norms_keeps_their_weights_and_statistics(train):
    moved = changed(train(epochs=1, freeze="norm"), 0, 1)
    assert not any("bn" in name or "running" in name for name in moved)
    assert {"conv1.0.weight", "fc.weight"} <= moved


def test_freezing_the_backbone_trains_only_the_head(train):
    assert changed(train(epochs=1, freeze="backbone"), 0, 1) == {"fc.weight", "fc.bias"}


def test_a_gradient_clipped_to_nothing_moves_nothing(train):
    run = train(epochs=1, clip_grad=1e-60, weight_decay=0.0, freeze="norm")
    assert changed(run, 0, 1) == set()


def test_two_networks_are_clipped_each_by_itself(train, monkeypatch):
    clip = torch.nn.utils.clip_grads_with_norm_
    norms: list[float] = []

    def watched(parameters: list[nn.Parameter], limit: float, norm: Tensor) -> None:
        clip(parameters, limit, norm)
        gradients = [p.grad for p in parameters if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    monkeypatch.setattr("torch.nn.utils.clip_grads_with_norm_", watched)
    train(epochs=1, method="elr-plus", clip_grad=0.01, batch_size=8, val_fraction=0.0)
    assert norms == pytest.approx([0.01] * 2 * 3, rel=1e-3)


def test_milestones_beyond_the_run_are_said(train):
    heard = Recorder()
    train("late", epochs=1, schedule="step", milestones=(40.0, 80.0), observer=heard)
    train("some", epochs=1, schedule="step", milestones=(0.5, 80.0), observer=heard)
    assert heard.notes == ["the first of --milestones is beyond the last epoch: --lr stays"]


@pytest.mark.parametrize(("batch_size", "accumulate"), [(6, 2), (8, 3), (8, 4)])
def test_accumulated_batches_equal_larger_ones(train, batch_size, accumulate):
    """24 images without BatchNorm: 2 x 6 make a batch of 12; 3 x 8, also where 4 are asked for."""
    settings = {"backbone": "test_vit", "val_fraction": 0.0, "epochs": 1}
    larger = 12 if accumulate == 2 else 24
    one = weights(train("one", **settings, batch_size=larger), 1)
    other = weights(train("other", **settings, batch_size=batch_size, accumulate=accumulate), 1)
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, atol=1e-5, rtol=1e-4)


def test_the_weight_average_is_what_predicts(train):
    run = train(ema=True, ema_decay=0.9)
    state = load_checkpoint(run.checkpoint_folder)["method"]
    model = safetensors.torch.load_file(run.model_file)
    for name, tensor in model.items():
        assert tensor.equal(state[f"average.network.{name}"]), name
    assert not model["fc.weight"].equal(weights(run, 2)["fc.weight"])
    assert int(state["average._extra_state"]) == 6


def test_fp16_on_the_cpu_is_refused_before_anything_is_written(train, tmp_path):
    with pytest.raises(ModelError, match="--precision fp16"):
        train(precision="fp16")
    assert not (tmp_path / "run").exists()


def test_an_image_size_that_cannot_work_is_refused_before_anything_is_written(train, tmp_path):
    with pytest.raises(ModelError, match="--image-size 33"):
        train(backbone="test_vit", image_size=33)
    assert not (tmp_path / "run").exists()


def compile_with(monkeypatch, backend: object) -> None:
    compile_ = functools.partialmethod(nn.Module.compile, backend=backend)
    monkeypatch.setattr(nn.Module, "compile", compile_)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiled_network_trains_and_saves_the_same_names(train, shared_run, monkeypatch):
    compile_with(monkeypatch, "eager")  # traces as the real one, without minutes of C++
    run = train(compile=True, epochs=1)
    names = safetensors.torch.load_file(shared_run.model_file).keys()
    assert safetensors.torch.load_file(run.model_file).keys() == names
    assert "fc.weight" in changed(run, 0, 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiler_that_fails_is_named(train, monkeypatch):
    def refuse(*arguments: object) -> None:
        raise OSError("no C++ compiler")

    compile_with(monkeypatch, refuse)
    with pytest.raises(TrainingError, match=r"^--compile failed \(.*\)\. Leave it out\.$"):
        train(compile=True, epochs=1)


# --- two networks, each on one half ---


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_two_compiled_networks_train_and_leave_features(train, monkeypatch):
    compile_with(monkeypatch, "eager")
    run = train(compile=True, epochs=1, method="elr-halves")
    assert run.features_file.is_file()
    assert {"networks.0.fc.weight", "networks.1.fc.weight"} <= changed(run, 0, 1)


def test_two_networks_train_and_judge_each_other(train):
    heard = Recorder()
    run = train(method="elr-halves", observer=heard)
    moved = changed(run, 1, 2)
    for number in (0, 1):
        assert {f"networks.{number}.fc.weight", f"networks.{number}.conv1.0.weight"} <= moved
    state = load_checkpoint(run.checkpoint_folder)
    record = state["record"]
    torch.testing.assert_close(record["held_out_sum"].sum(dim=1), torch.full((24,), 2.0))
    rows = run.manifest().rows("train")
    assert not record["held_out_sum"][rows].allclose(record["prob_sum"][rows])
    rows = run.manifest().rows("val")
    assert record["held_out_sum"][rows].equal(record["prob_sum"][rows])  # nobody trains on them
    owner = state["method"]["owner"][run.manifest().rows("train")]
    assert abs(int(owner.sum()) - len(owner) / 2) <= 1.5  # three classes, each up to one
    (plan,) = heard.plans
    assert plan.parameters == 2 * sum(
        p.numel() for p in create_network("test_resnet", 3).parameters()
    )
    assert run.features_file.is_file()


def test_the_model_of_two_networks_holds_both(train, shared_run):
    run = train(method="elr-halves", epochs=1)
    names = safetensors.torch.load_file(shared_run.model_file)
    model = safetensors.torch.load_file(run.model_file)
    assert set(model) == {f"networks.{number}.{name}" for number in (0, 1) for name in names}
    trained = weights(run, 1)
    assert all(tensor.equal(trained[name]) for name, tensor in model.items())


def test_two_networks_train_on_batches_of_one(train):
    moved = changed(train(method="elr-halves", batch_size=1, epochs=1), 0, 1)
    assert {"networks.0.fc.weight", "networks.1.fc.weight"} <= moved
    assert not any("running" in name for name in moved)


def test_a_network_without_images_in_a_batch_makes_no_step(train, shapes, tmp_path):
    """Two batches of one image, one for each network."""
    rows = ["circle/0000.png,a,train", "circle/0003.png,a,train", "square/0001.png,b,val"]
    (tmp_path / "l.csv").write_text("\n".join(["path,label,split", *rows]))
    data = {"data": tmp_path / "l.csv", "root": shapes}
    run = train(**data, method="elr-halves", batch_size=1, optimizer="adamw", epochs=1)
    state = load_checkpoint(run.checkpoint_folder)
    assert sorted(state["method"]["owner"][:2].tolist()) == [0, 1]
    assert {int(entries["step"]) for entries in state["optimizer"].values()} == {1}


def test_freezing_the_backbone_trains_both_heads(train):
    moved = changed(train(method="elr-halves", freeze="backbone", epochs=1), 0, 1)
    assert moved == {f"networks.{i}.fc.{kind}" for i in (0, 1) for kind in ("weight", "bias")}


# --- two networks that teach each other ---


def test_elr_plus_trains_both_networks_their_averages_and_tables(train, shared_run):
    run = train(method="elr-plus")
    state = load_checkpoint(run.checkpoint_folder)
    model = safetensors.torch.load_file(run.model_file)
    names = safetensors.torch.load_file(shared_run.model_file)
    assert set(model) == {f"networks.{number}.{name}" for number in (0, 1) for name in names}
    before = load_checkpoint(shared_run.checkpoint_folder)["method"]
    for number, name in enumerate(("first", "second")):
        own = {k.removeprefix(f"{name}."): v for k, v in state["method"].items() if name in k}
        for weight in names:  # what predicts are the networks, not their averages
            assert model[f"networks.{number}.{weight}"].equal(own[f"network.{weight}"])
        assert not own["network.fc.weight"].equal(own["average.network.fc.weight"])
        assert not own["network.fc.weight"].equal(before["network.fc.weight"])
        assert int(own["_extra_state"]) == int(own["average._extra_state"]) == 6  # 2 x 3 batches
    rows = run.manifest().rows("train")
    tables = [state["method"][f"{name}.loss.targets"] for name in ("first", "second")]
    for table in tables:
        torch.testing.assert_close(table.sum(dim=1), torch.full((24,), 0.51))  # 1 - 0.7 ** 2
    assert not tables[0][rows].allclose(tables[1][rows])
    assert "held_out_sum" not in state["record"]  # nobody judges what it did not train on
    settings = run.train_config()
    assert settings.mixup is settings.ema is True


@pytest.mark.parametrize("settings", [{"batch_size": 1}, {"precision": "bf16"}, {"accumulate": 2}])
def test_elr_plus_trains_with(train, settings):
    run = train(method="elr-plus", epochs=1, **settings)
    state = load_checkpoint(run.checkpoint_folder)["method"]
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_elr_plus_without_mixup_and_averages(train):
    run = train(method="elr-plus", epochs=1, mixup=False, ema=False)
    state = load_checkpoint(run.checkpoint_folder)["method"]
    assert not any("average" in name for name in state)
    settings = run.train_config()
    assert settings.mixup is settings.ema is False


# --- when it cannot go on ---


def test_a_loss_that_is_no_number_names_the_way_out(train, tmp_path):
    with pytest.raises(TrainingError, match="Train again with a lower --lr, --clip-grad 1"):
        train(lr=1e30, warmup=0.0)
    run = RunFolder.open(tmp_path / "run")
    state = load_checkpoint(run.checkpoint_folder)
    assert state["epoch"] == 0
    assert all(t.isfinite().all() for n, t in flat(state["method"]).items())
    assert not run.model_file.exists()


def test_a_weight_that_is_no_number_is_noticed_in_the_last_step(train):
    with pytest.raises(TrainingError, match="a weight is no longer a finite number"):
        train(lr=1e38, warmup=0.0, epochs=1, batch_size=64, schedule="constant", head_lr_scale=1000)


def explode(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Let so many predictions for held-out images be no numbers."""
    left = [None] * times
    predict = SingleNetwork.predict

    def exploded(self: SingleNetwork, images: Tensor) -> Tensor:
        logits = predict(self, images)
        return logits * math.nan if left and left.pop() is None else logits

    monkeypatch.setattr(SingleNetwork, "predict", exploded)


def test_predictions_that_are_no_numbers_end_the_run(train, tmp_path, monkeypatch):
    explode(monkeypatch, 1)
    with pytest.raises(TrainingError) as caught:
        train()
    assert re.fullmatch(
        r"the prediction is no finite number in epoch 1, batch 1 \(\w+/\d+\.png, \w+/\d+\.png\)\."
        r" Train again with a lower --lr, --clip-grad 1 or --on-nan retry\. The state before the"
        r" epoch is saved\.",
        str(caught.value),
    )
    assert load_checkpoint(tmp_path / "run" / "checkpoint")["epoch"] == 0


def test_after_a_retry_no_prediction_and_target_is_left_of_it(train, monkeypatch):
    explode(monkeypatch, 1)
    heard = Recorder()
    run = train(on_nan="retry", observer=heard)
    assert len(heard.notes) == 1
    state = load_checkpoint(run.checkpoint_folder)
    assert state["method"]["loss.targets"].isfinite().all()
    assert state["record"]["prob_sum"].isfinite().all()
    assert state["record"]["visits"].tolist() == [2] * 24


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_first_step_that_is_left_out_leaves_no_trace(name, monkeypatch):
    monkeypatch.setattr(torch, "empty_like", lambda like, **_: torch.full_like(like, torch.nan))
    config = TrainConfig(data="d", optimizer=name, lr=0.1, weight_decay=0.0)
    layers = [nn.Linear(300, 300) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    for layer, left_out in zip(layers, (1, 0), strict=True):
        optimizer = build_optimizer(config, layer, torch.device("cpu"))
        set_learning_rate(optimizer, 0.1)
        for found in [1.0] * left_out + [0.0, 0.0]:
            for parameter in layer.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.found_inf = torch.tensor(found)
            optimizer.step()
    for one, other in zip(*(layer.parameters() for layer in layers), strict=True):
        assert one.equal(other)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_device_without_fused_steps_trains_alike(train, monkeypatch, optimizer):
    fused = train("fused", optimizer=optimizer)
    monkeypatch.setattr("elrcli.engine.optimizers.FUSED", ())
    plain = train("plain", optimizer=optimizer)
    for name, tensor in weights(fused, 2).items():
        torch.testing.assert_close(weights(plain, 2)[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fused", [("cpu",), ()])
def test_a_bad_gradient_moves_no_weight(train, monkeypatch, fused):
    monkeypatch.setattr("elrcli.engine.optimizers.FUSED", fused)
    steps: list[bool] = []
    take_step = Learner.step

    def watched(self: Learner, lr: float, number: int) -> None:
        before = [p.detach().clone() for p in self.network.parameters()]
        if number == 1:
            next(self.network.parameters()).grad.fill_(math.inf)
        take_step(self, lr, number)
        pairs = zip(before, self.network.parameters(), strict=True)
        steps.append(any(not old.equal(new) for old, new in pairs))

    monkeypatch.setattr(Learner, "step", watched)
    with pytest.raises(TrainingError, match="the gradient is no finite number in epoch 1, batch 2"):
        train(lr=0.1, warmup=0.0)
    assert steps == [True, False, True]


def test_gradients_that_are_never_finite_in_fp16_end_the_run(train, monkeypatch):
    monkeypatch.setattr(torch.amp.GradScaler, "get_scale", lambda self: 2.0**-11)
    with pytest.raises(TrainingError, match=r"hardly any gradient is a finite number in fp16 in e"):
        train()


def test_a_scaler_has_a_scale_before_its_first_gradient(shapes):
    """Where no image of the first batch can be read, others have a gradient all the same."""
    config = TrainConfig(**{"data": shapes, **TINY, "batch_size": 4, "lr": 0.1, "workers": 0})
    config = config.replace(weight_decay=0.0)
    manifest = load_samples(config)
    learner = Learner(
        config,
        create_network("test_resnet", 3, pretrained=False),
        manifest,
        np.arange(len(manifest)),
        Runtime(torch.device("cpu"), "fp16"),
        TableChoice(),
    )
    for parameter in learner.network.parameters():
        parameter.grad = torch.ones_like(parameter)
    learner._has_gradient = True
    learner.step(0.1, 0)
    assert learner.scaler.get_scale() == 2.0**16


def test_replays_end_with_the_training_however_it_ends(train, monkeypatch):
    ended: list[object] = []
    monkeypatch.setattr(module, "compute_again", lambda modules: ended.append(modules))
    monkeypatch.setattr(Learner, "is_finite", lambda self: False)
    with pytest.raises(TrainingError):
        train()
    assert len(ended) == 1


@pytest.mark.parametrize(
    ("own", "others", "common"),
    [
        ("bf16", ["bf16", "fp16"], "fp16"),
        ("fp16", ["fp16", "fp32"], "fp32"),
        ("bf16", ["bf16"], "bf16"),
    ],
)
def test_all_processes_compute_in_the_same_precision(monkeypatch, own, others, common):
    def choose(device: str, precision: str) -> Runtime:
        return Runtime(torch.device("cpu"), own if precision == "auto" else precision)

    monkeypatch.setattr("elrcli.engine.fit.choose_runtime", choose)
    monkeypatch.setattr(Group, "gather", lambda self, item: others)
    assert _joint_runtime(TrainConfig(data="d"), Group()).precision == common


def test_other_errors_stay_what_they_are(train, monkeypatch):
    def refuse(*arguments: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(SingleNetwork, "training_step", refuse)
    with pytest.raises(RuntimeError, match=r"^a defect$"):
        train()


# --- signals ---


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_a_checkpoint(train, tmp_path, number, code):
    with pytest.raises(Interrupted) as caught:
        train("a run", observer=Stopper("epoch 1/2", number))
    assert caught.value.exit_code == code
    command = f"Continue with: elr train --resume '{tmp_path / 'a run'}'"
    assert command in str(caught.value)
    assert load_checkpoint(tmp_path / "a run" / "checkpoint")["epoch"] == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_after_the_last_epoch_stops_the_look_at_all_images(train, tmp_path):
    with pytest.raises(Interrupted):
        train(epochs=1, observer=Stopper("features"))
    run = RunFolder.open(tmp_path / "run")
    assert run.model_file.is_file()
    assert not run.features_file.exists()
    resume(run.path)
    assert run.features_file.is_file()


@pytest.mark.parametrize("delay", [0.0, 0.03])
@pytest.mark.parametrize("kind", [TrainingError, RuntimeError])
def test_a_signal_that_also_kills_the_loaders_is_an_interruption(
    train, tmp_path, monkeypatch, kind, delay
):
    """SIGTERM to the process group: the loaders may die before this process hears of it."""

    def dies(self: RowLoader, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        if delay:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGTERM)).start()
        else:
            os.kill(os.getpid(), signal.SIGTERM)
        raise kind("DataLoader worker (pid 1) is killed by signal: Terminated.")

    monkeypatch.setattr(RowLoader, "epoch", dies)
    with pytest.raises(Interrupted) as caught:
        train()
    assert caught.value.exit_code == 143
    assert load_checkpoint(tmp_path / "run" / "checkpoint")["epoch"] == 0


def test_loaders_that_die_by_themselves_are_a_training_error(train, monkeypatch):
    def dies(self: RowLoader, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        raise TrainingError("A process that loads images died")

    monkeypatch.setattr(RowLoader, "epoch", dies)
    with pytest.raises(TrainingError, match="A process that loads images died"):
        train()


class KillsLoader(Observer):
    """Kills a loading process in the middle of a step, as the kernel does for lack of memory."""

    def progress(self, stage: str, done: int, total: int | None) -> None:
        if stage == "epoch 2/2" and done == 4:
            children = Path("/proc/thread-self/children").read_text().split()
            os.kill(int(children[-1]), signal.SIGKILL)
            time.sleep(0.2)  # an error that is raised at once comes here


def test_a_loader_that_is_killed_leaves_the_last_checkpoint(train, tmp_path):
    settings = {"batch_size": 2, "workers": 2}
    with pytest.raises(TrainingError, match="A process that loads images died, mostly for lack"):
        train("killed", observer=KillsLoader(), **settings)
    assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
    assert_same(resume(tmp_path / "killed"), train("whole", **settings))


GROUP_SCRIPT = """
import sys, time
from pathlib import Path
import torch
from elrcli.config import TrainConfig
from elrcli.engine.fit import fit
from elrcli.engine.observer import Observer
from elrcli.errors import Interrupted
from tests.engine.conftest import TINY

class Waiter(Observer):
    def progress(self, stage, done, total):
        if stage == "epoch 2/9":
            print("ready", flush=True)
            time.sleep(2)  # the loaders are gone when the loop looks again

torch.set_num_threads(1)
config = TrainConfig(**{"data": Path(sys.argv[1]), **TINY, "workers": 2, "epochs": 9})
try:
    fit(config, Path(sys.argv[2]), observer=Waiter())
except Interrupted as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_sigterm_to_the_whole_process_group(shapes, tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", GROUP_SCRIPT, shapes, tmp_path / "run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout.readline() == "ready\n"
        os.killpg(process.pid, signal.SIGTERM)
        out, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    assert "Continue with: elr train --resume" in out
    assert "Traceback" not in errors
    state = load_checkpoint(tmp_path / "run" / "checkpoint")
    assert (state["epoch"], state["part"]["batches"]["train"]) == (1, 1)


# --- a damaged or hostile run folder ---


def _without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.pop(name)


def _with(name: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.update({name: value})


@pytest.mark.parametrize(
    "damage",
    [
        _without("epoch"),
        _without("method"),
        _without("scaler"),
        _with("epoch", "two"),
        _with("epoch", 10**9),
        _with("method", 3),
        _with("method", {}),
        _with("record", {"prob_sum": torch.zeros(24, 3)}),
        _with("optimizer", [1, 2]),
        _with("optimizer", {0: 3}),
        _with("optimizer", {0: {"momentum_buffer": torch.zeros(7)}}),
        _with("optimizer", {0: {"momentum_buffer": "text"}}),
        _with("optimizer", {"weights": {"momentum_buffer": torch.zeros(7)}}),
        _with("metrics", 5),
        _with("metrics", [{"loss": 1.0}]),
        _with("metrics", [{"epoch": 1, "loss": "low"}]),
        _with("unreadable", [[24, "out of range"]]),
        _with("unreadable", [["row", "reason"]]),
        _with("unreadable", 1),
        _without("part"),
        _with("part", {}),
        _with("part", 3),
        lambda state: state["record"].update(prob_sum=torch.zeros(5, 3)),
        lambda state: state["record"].update(prob_sum=torch.zeros(24, 17)),
        lambda state: state["method"].update({"loss.targets": torch.zeros(24, 4)}),
        lambda state: state["method"].update({"network.fc.bias": [1.0]}),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_a_run_error(run_copy, damage):
    state = load_checkpoint(run_copy.checkpoint_folder)
    damage(state)
    save_checkpoint(run_copy.checkpoint_folder, 3, take_snapshot(state))
    with pytest.raises(RunError, match=r"checkpoint: does not fit the run \(.*\)\. Train again\."):
        resume(run_copy.path)


@pytest.mark.parametrize("name", ["batch_size", "lr", "weight_decay", "workers"])
def test_settings_that_were_never_resolved_are_a_run_error(run_copy, name):
    config = run_copy.config()
    config["settings"][name] = None
    write_text(run_copy.config_file, json_text(config))
    with pytest.raises(RunError, match="holds automatic settings"):
        resume(run_copy.path)


def test_workers_of_a_resumed_run_may_be_chosen_anew(run_copy):
    (run_copy.path / "model.safetensors").unlink()
    resume(run_copy.path, {"workers": None})
    assert run_copy.is_finished()


@pytest.mark.parametrize("part", [{"ema": True}, {"mixup": True}, {"method": "sop"}])
def test_parts_of_a_method_without_a_value_are_a_run_error(run_copy, part):
    config = run_copy.config()
    config["settings"] |= part
    write_text(run_copy.config_file, json_text(config))
    with pytest.raises(RunError, match="holds automatic settings"):
        resume(run_copy.path)


@pytest.mark.parametrize(
    ("part", "value", "error"),
    [
        ("settings", {"data": "d", "backbone": ["resnet50"]}, RunError),
        ("preprocessing", None, RunError),
        ("data_root", None, RunError),
    ],
)
def test_a_config_that_does_not_fit_is_a_run_error(run_copy, part, value, error):
    config = run_copy.config()
    config[part] = value
    run_copy.config_file.write_text(json.dumps(config))
    with pytest.raises(error, match=r"config\.json"):
        resume(run_copy.path)


@pytest.mark.parametrize(("seconds", "expected"), [(0.0, [1, 2, 3]), (1e9, [3])])
def test_curves_are_drawn_while_training(train, monkeypatch, seconds, expected):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_CURVES", seconds)
    drawn = []
    original = plots.curves_svg
    monkeypatch.setattr(plots, "curves_svg", lambda rows: drawn.append(len(rows)) or original(rows))
    train(epochs=3)
    assert drawn == expected


def test_nothing_of_a_picture_stays_in_memory(train, monkeypatch):
    figures = weakref.WeakSet()
    original = plots.svg
    monkeypatch.setattr(plots, "svg", lambda figure: figures.add(figure) or original(figure))
    monkeypatch.setattr(plots, "curves_svg", CURVES_SVG)
    gc.disable()
    try:
        train(epochs=2)
    finally:
        gc.enable()
    assert len(figures) == 0
