from __future__ import annotations

import csv
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

import elrcli
from elrcli.config import TrainConfig
from elrcli.data.manifest import Manifest, manifest_text
from elrcli.data.samples import load_samples
from elrcli.engine import tune as search
from elrcli.engine.metrics import Diverged
from elrcli.engine.observer import Observer
from elrcli.engine.tune import (
    Candidate,
    Trial,
    TuneResult,
    choose,
    plan_epochs,
    search_fraction,
    shortened,
    tune,
)
from elrcli.errors import (
    ConfigError,
    DataError,
    Interrupted,
    OutOfMemory,
    RunError,
    TrainingError,
)
from elrcli.run import RunFolder
from tests.engine.conftest import TINY

DEFAULT = Candidate(3.0, 0.7, 0.001)
GRID = {"lambdas": (1.0, 3.0), "betas": (0.7,), "lrs": (0.01, 0.02)}


def test_settings_are_apart_by_factors():
    assert DEFAULT.distance(DEFAULT) == 0
    assert DEFAULT.distance(Candidate(7.0, 0.7, 0.001)) == pytest.approx(math.log(2))
    assert DEFAULT.distance(Candidate(3.0, 0.9, 0.003)) == pytest.approx(2 * math.log(3))


@pytest.mark.parametrize(
    ("lam", "beta", "other", "picked"),
    [(1, 0.7, 0.9, 3), (3, 0.7, 0.9, 7), (7, 0.7, 0.9, 7), (3, 0.7, 0.7, 3), (3, 0.9, 0.7, 1)],
)
def test_another_beta_has_the_lambda_that_makes_up_for_it(lam, beta, other, picked):
    at = Candidate(lam, beta, 0.01)
    assert at.with_betas((beta, other), (1, 3, 7)) == [at, Candidate(picked, other, 0.01)]


def marks(text: str) -> np.ndarray:
    return np.array([mark == "1" for mark in text])


def test_the_nearest_to_the_defaults_within_one_standard_error_is_picked():
    """The best is right on 5 images where the default is wrong, the default on 4: 1 <= sqrt(9)."""
    best = Candidate(1.0, 0.7, 0.001)
    choice = choose(
        {DEFAULT: marks("0000011110"), best: marks("1111100000") | marks("0000000001")}, DEFAULT
    )
    assert choice == (DEFAULT, best, 2, 2)


def test_what_is_worse_by_more_is_not_picked():
    """Right on 4 more images, on none less: 4 > sqrt(4)."""
    best = Candidate(1.0, 0.7, 0.001)
    choice = choose({DEFAULT: marks("000011"), best: marks("111111")}, DEFAULT)
    assert choice == (best, best, 1, 2)


def test_only_images_that_every_run_could_read_are_compared(config, tmp_path, trained, monkeypatch):
    """An image that one run could not read counts for none of them."""
    texts = iter(["1" * 10, "-" * 4 + "1" * 6, "0000111111", "1111111111"])
    monkeypatch.setattr(search, "_marks_text", lambda run, manifest: next(texts) + "\n")
    result = tune(config, tmp_path / "t", **GRID)
    assert [trial.agreement for trial in result.trials] == [1.0, 1.0, 0.6, 1.0]
    assert [choice.within for choice in result.choices.values()] == [2, 1]


def test_what_a_kill_left_of_the_first_file_is_no_obstacle(config, tmp_path, trained):
    (tmp_path / "t").mkdir()
    (tmp_path / "t/.tune.json.abc").write_text("{")
    assert tune(config, tmp_path / "t", **GRID).pick == Candidate(1.0, 0.7, 0.01)


def test_a_folder_with_something_else_is_refused(config, tmp_path, trained):
    (tmp_path / "t").mkdir()
    (tmp_path / "t/locksmith.txt").touch()
    with pytest.raises(RunError, match="not empty and not a search"):
        tune(config, tmp_path / "t", **GRID)


def test_without_leeway_the_best_is_picked():
    best = Candidate(7.0, 0.9, 0.001)
    one_more = {DEFAULT: marks("0111"), best: marks("1111")}
    assert choose(one_more, DEFAULT, 0.0) == (best, best, 1, 2)
    alike = {DEFAULT: marks("0111"), best: marks("1110")}
    assert choose(alike, DEFAULT, 0.0) == (DEFAULT, DEFAULT, 2, 2)


def test_one_image_is_no_difference():
    best = Candidate(1.0, 0.7, 0.001)
    assert choose({DEFAULT: marks("0111"), best: marks("1111")}, DEFAULT).pick == DEFAULT


def test_a_search_costs_a_quarter_of_its_grid():
    """3 * 2 * 3 settings of 16 epochs: a quarter is 72 = 3 * 2 + 4 * 16 + 2."""
    assert plan_epochs({"lr": 3, "lam": 3, "beta": 2}, 16) == (2, 16, 70)
    for lr, lam, beta, epochs in ((2, 3, 2, 16), (3, 5, 4, 15), (3, 3, 2, 40)):
        _, _, planned = plan_epochs({"lr": lr, "lam": lam, "beta": beta}, epochs)
        assert planned <= lr * lam * beta * epochs / 4


def test_runs_that_would_be_too_short_to_compare_are_longer():
    assert plan_epochs({"lr": 1, "lam": 3, "beta": 1}, 16) == (2, 8, 24)
    assert plan_epochs({"lr": 3, "lam": 1, "beta": 1}, 16)[2] == 3 * 2
    assert plan_epochs({"lr": 3, "lam": 3, "beta": 2}, 1) == (1, 1, 7)


@pytest.mark.parametrize(
    ("asked", "images", "share"),
    [(0.1, 100, 0.3), (0.1, 2_000, 0.25), (0.1, 50_000, 0.1), (0.5, 100, 0.5), (0.0, 100, 0.0)],
)
def test_few_images_are_compared_by_more_of_them(asked, images, share):
    assert search_fraction(asked, images) == pytest.approx(share)


def test_the_search_holds_out_more_than_the_training(config, tmp_path, trained):
    config = config.replace(val_fraction=0.1)
    result = tune(config, tmp_path / "t", **GRID)
    assert {call.val_fraction for call in trained} == {0.3}
    assert result.val_images == len(load_samples(trained[0]).rows("val")) == 7  # of 24
    assert result.config.val_fraction == 0.1


def test_a_validation_split_of_the_data_is_taken_as_it_is(config, tmp_path, trained):
    for number, image in enumerate(sorted(config.data.rglob("*.png"))):
        copy = tmp_path / "data" / ("train" if number % 6 else "val") / image.parent.name
        copy.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, copy)
    result = tune(config.replace(data=tmp_path / "data", val_fraction=0.1), tmp_path / "t", **GRID)
    assert result.val_images == 4


def test_the_schedule_is_squeezed():
    config = TrainConfig(data=Path("d"), epochs=40, warmup=4, lam_ramp=7)
    short = shortened(config.replace(schedule="step", milestones=(0.5, 20, 30)), 20)
    assert (short.epochs, short.warmup, short.milestones) == (20, 2.0, (0.5, 10.0, 15.0))
    assert short.lam_ramp == 4
    assert shortened(config.replace(schedule="restarts"), 20).restart_epochs == 5.0


@pytest.fixture
def config(shapes) -> TrainConfig:
    return TrainConfig(**{"data": shapes, **TINY, "epochs": 8, "val_fraction": 0.25})


@pytest.fixture
def trained(monkeypatch) -> list[TrainConfig]:
    """Replace training by a formula: rate 0.01 and lambda 1 are best, and long runs better."""
    calls: list[TrainConfig] = []

    def fit(settings: TrainConfig, path: Path, samples: Manifest, **_: object) -> RunFolder:
        assert manifest_text(samples) == manifest_text(load_samples(settings))
        calls.append(settings)
        return RunFolder(path)

    def marks_text(run: RunFolder, manifest: Manifest) -> str:
        right = 130 + calls[-1].epochs - 2 * int(calls[-1].lam) - round(1000 * calls[-1].lr)
        return "1" * right + "0" * (150 - right) + "-"

    monkeypatch.setattr(search, "fit", fit)
    monkeypatch.setattr(search, "_marks_text", marks_text)
    return calls


def test_one_setting_after_the_other(config, tmp_path, trained):
    result = tune(config, tmp_path / "t", lambdas=(1.0, 3.0), betas=(0.7, 0.5), lrs=(0.01, 0.02))
    assert [(call.epochs, call.lr, call.lam, call.beta) for call in trained] == [
        (2, 0.01, 3.0, 0.7),  # with lambda and beta of the defaults
        (2, 0.02, 3.0, 0.7),
        (4, 0.01, 1.0, 0.7),  # (8 * 8 / 4 - 2 * 2) / 3 epochs
        (4, 0.01, 3.0, 0.7),
        (4, 0.01, 1.0, 0.5),  # lambda 1, beta 0.7 has been trained with
    ]
    assert result.pick == Candidate(1.0, 0.7, 0.01)
    assert result.config == config.replace(lam=1.0, beta=0.7, lr=0.01)
    assert [(names, each.within, each.compared) for names, each in result.choices.items()] == [
        (("lr",), 1, 2),
        (("lam",), 1, 2),
        (("lam", "beta"), 2, 2),
    ]
    assert result.trials[0] == Trial(Candidate(3.0, 0.7, 0.01), 2, 116 / 150)
    assert (result.val_images, result.cost) == (7, 16 / 64)
    with (tmp_path / "t/trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    assert rows[0] == {
        "lambda": "3",
        "beta": "0.7",
        "lr": "0.01",
        "epochs": "2",
        "val_agreement": "0.773333",
    }


def test_the_grid_around_the_automatic_rate(config, tmp_path, trained):
    result = tune(config, tmp_path / "t")
    assert [call.lr for call in trained[:3]] == [0.006, 0.02, 0.06]
    pairs = [(1.0, 0.7), (3.0, 0.7), (7.0, 0.7), (3.0, 0.9)]  # lambda 1 is best, 3 goes with 0.9
    assert [(call.lam, call.beta) for call in trained[3:]] == pairs
    steps = result.to_dict()["steps"]
    assert [list(step["pick"]) for step in steps] == [["lr"], ["lambda"], ["lambda", "beta"]]


def test_runs_of_one_length_are_trained_once(config, tmp_path, trained):
    result = tune(config.replace(epochs=2), tmp_path / "t", **GRID)
    assert len(trained) == len(result.trials) == 3
    assert list(result.choices) == [("lr",), ("lam",)]  # there is one beta


def test_a_finished_search_is_not_trained_again(config, tmp_path, trained):
    first = tune(config, tmp_path / "t", **GRID)
    assert len(trained) == 4
    assert tune(config.replace(workers=1), tmp_path / "t", **GRID) == first.__class__(
        **{**vars(first), "config": first.config.replace(workers=1)}
    )
    assert len(trained) == 4
    tune(config, tmp_path / "t", **GRID, overwrite=True)
    assert len(trained) == 8


def test_another_search_does_not_go_on(config, tmp_path, trained, shapes):
    tune(config, tmp_path / "t", **GRID)
    for changed, grid, problem in (
        (config.replace(epochs=9), GRID, "has other settings"),
        (config, {**GRID, "lambdas": (1.0, 5.0)}, "has another grid"),
    ):
        with pytest.raises(RunError, match=problem):
            tune(changed, tmp_path / "t", **grid)
    (tmp_path / "t/tune.json").write_text("{")
    with pytest.raises(RunError, match="not valid JSON"):
        tune(config, tmp_path / "t", **GRID)


def test_changed_data_are_noticed(config, tmp_path, trained, monkeypatch):
    tune(config, tmp_path / "t", **GRID)
    monkeypatch.setattr(search, "manifest_text", lambda manifest: "another list")
    with pytest.raises(RunError, match="the data has changed"):
        tune(config, tmp_path / "t", **GRID)


def test_a_folder_with_other_things_is_left_alone(config, tmp_path, trained):
    (tmp_path / "trials").mkdir()
    for name in ("notes.txt", "trials/notes.txt", "tune.json"):
        (tmp_path / name).write_text("{}")
        for overwrite in (False, True):
            with pytest.raises(RunError, match="not empty and not a search"):
                tune(config, tmp_path, **GRID, overwrite=overwrite)
    assert (tmp_path / "trials/notes.txt").is_file()
    with pytest.raises(RunError, match="is a file"):
        tune(config, tmp_path / "notes.txt", **GRID)


def test_what_cannot_be_searched(config, tmp_path):
    for changes, grid, problem in (
        ({"method": "ce"}, GRID, "--method ce: has no lambda"),
        ({}, {"lambdas": (1.0,), "betas": (0.7,), "lrs": (0.01,)}, "one setting is no choice"),
        ({}, {**GRID, "lrs": (0.0,)}, "--lr 0: nothing would be learned"),
        ({}, {**GRID, "betas": (1.5,)}, "--beta 1.5: must be at most"),
    ):
        with pytest.raises(ConfigError, match=problem):
            tune(config.replace(**changes), tmp_path / "t", **grid)
    with pytest.raises(DataError, match="no validation images"):
        tune(config.replace(val_fraction=0.0), tmp_path / "t", **GRID)
    assert not (tmp_path / "t").exists()


def test_a_setting_that_cannot_be_trained_drops_out(config, tmp_path, trained, monkeypatch):
    train = search.fit

    def fit(settings: TrainConfig, path: Path, **options: object) -> RunFolder:
        if settings.lr > 0.01 or settings.lam == 5.0:
            raise Diverged("the loss became nan")
        return train(settings, path, **options)

    monkeypatch.setattr(search, "fit", fit)
    result = tune(config, tmp_path / "t", **{**GRID, "lambdas": (3.0, 5.0)})
    assert result.pick == Candidate(3.0, 0.7, 0.01)
    failed = [trial.candidate for trial in result.trials if trial.agreement is None]
    assert failed == [Candidate(3.0, 0.7, 0.02), Candidate(5.0, 0.7, 0.01)]
    with pytest.raises(TrainingError, match="no run could be trained"):
        tune(config, tmp_path / "u", **{**GRID, "lambdas": (5.0,)})


def test_what_is_no_fault_of_a_setting_ends_the_search(config, tmp_path, monkeypatch):
    def fit(*arguments: object, **options: object) -> RunFolder:
        raise TrainingError("--compile failed. Leave it out.")

    monkeypatch.setattr(search, "fit", fit)
    with pytest.raises(TrainingError, match="--compile failed"):
        tune(config, tmp_path / "t", **GRID)


def test_too_little_memory_ends_the_search(config, tmp_path, monkeypatch):
    def fit(*arguments: object, **options: object) -> RunFolder:
        raise OutOfMemory("cpu: out of memory")

    monkeypatch.setattr(search, "fit", fit)
    with pytest.raises(OutOfMemory, match="cpu: out of memory"):
        tune(config, tmp_path / "t", **GRID)


class Stop(Observer):
    """Stops the work in an epoch of a run, as a signal would."""

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def progress(self, stage: str, done: int, total: int | None) -> None:
        if stage == self.stage:
            raise Interrupted(2, "another command")


def test_an_interrupted_search_goes_on(config, tmp_path, monkeypatch):
    """Real trainings: the finished run is read, the half-done one resumed, the rest trained."""
    small = config.replace(epochs=4)
    grid = {**GRID, "lrs": (0.02,)}  # nothing for short runs to choose
    whole = tune(small, tmp_path / "whole", **grid)
    assert [trial.epochs for trial in whole.trials] == [2, 2]

    with pytest.raises(Interrupted, match=r"^stopped by SIGINT\. Continue with: the same command$"):
        tune(small, tmp_path / "t", **grid, observer=Stop("lambda 2 of 2, epoch 2/2"))
    folders = sorted((tmp_path / "t/trials").iterdir())
    assert not (folders[1] / "validation.txt").exists()
    states = [(folder / "checkpoint").is_dir() for folder in folders]
    assert states == [False, True]
    assert not (folders[0] / "model.safetensors").exists()
    assert not (folders[0] / "features.safetensors").exists()
    calls = counted(monkeypatch)
    again = tune(small, tmp_path / "t", **grid)
    assert calls == {"fit": 0, "resume": 1}
    assert again.trials == whole.trials
    assert len({(folder / "manifest.csv").read_text() for folder in folders}) == 1


def test_a_run_that_was_killed_before_its_first_checkpoint_is_trained(config, tmp_path, trained):
    tune(config, tmp_path / "t", **GRID)
    killed = next((tmp_path / "t/trials").glob("4-epochs*"))
    (killed / "validation.txt").unlink()
    (killed / ".config.json.abc").write_text("half")
    tune(config, tmp_path / "t", **GRID)
    assert len(trained) == 5
    (killed / "validation.txt").unlink()
    (killed / "config.json").write_text("{}")
    (killed / "checkpoint").mkdir(exist_ok=True)  # without a file in it
    tune(config, tmp_path / "t", **GRID)
    assert len(trained) == 6


def test_a_second_search_in_the_folder_is_refused(config, tmp_path, trained):
    script = (
        "from pathlib import Path\nfrom elrcli.run import locked_folder\n"
        f"with locked_folder(Path({str(tmp_path)!r})):\n    print('held', flush=True)\n    input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=f"is in use by process {other.pid} on"):
            tune(config, tmp_path, overwrite=True, **GRID)
        other.communicate("\n")
    assert trained == []
    tune(config, tmp_path, **GRID)


@pytest.mark.parametrize(
    ("error", "name", "code"),
    [(KeyboardInterrupt(), "SIGINT", 130), (SystemExit(143), "SIGTERM", 143)],
)
def test_a_signal_between_two_runs_says_how_to_go_on(
    config, tmp_path, trained, monkeypatch, error, name, code
):
    def interrupted(*_: object) -> None:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(search, "_agreement", interrupted)
    with pytest.raises(Interrupted) as caught:
        tune(config, **GRID)
    place = next((tmp_path / "runs").iterdir()).relative_to(tmp_path)
    again = f"the same command --out {place}"
    assert str(caught.value) == f"stopped by {name}. Continue with: {again}"
    assert caught.value.exit_code == code


@pytest.mark.parametrize(("device", "goes_on"), [("cpu", True), ("cuda:9", False)])
def test_a_run_goes_on_only_on_its_device(config, tmp_path, trained, monkeypatch, device, goes_on):
    """A search may go on with another, and a run would not."""
    tune(config, tmp_path / "t", **GRID)
    stopped = next((tmp_path / "t/trials").glob("4-epochs*"))
    (stopped / "validation.txt").unlink()
    (stopped / "checkpoint").mkdir()
    (stopped / "checkpoint/000001.safetensors").touch()
    settings = config.replace(device=device).to_dict()
    (stopped / "config.json").write_text(json.dumps({"elr": "0", "settings": settings}))
    resumed = []
    monkeypatch.setattr(search, "resume", lambda run, **_: resumed.append(run))
    tune(config, tmp_path / "t", **GRID)
    assert resumed == ([stopped] if goes_on else [])


def test_validation_marks_follow_the_manifest(config, tmp_path):
    found = tune(
        config.replace(epochs=2), tmp_path / "t", lambdas=(1.0, 3.0), betas=(0.7,), lrs=(1,)
    )
    for trial, folder in zip(found.trials, sorted((tmp_path / "t/trials").iterdir()), strict=True):
        text = (folder / "validation.txt").read_text().strip()
        assert len(text) == 7
        assert trial.agreement == text.count("1") / 7
        assert RunFolder(folder).metrics()[-1]["val_agreement"] == pytest.approx(trial.agreement)


def counted(monkeypatch: pytest.MonkeyPatch) -> Mapping[str, int]:
    calls = {"fit": 0, "resume": 0}

    def counting(name: str) -> Callable[..., RunFolder]:
        original = getattr(search, name)

        def call(*arguments: object, **options: object) -> RunFolder:
            calls[name] += 1
            return original(*arguments, **options)

        return call

    for name in calls:
        monkeypatch.setattr(search, name, counting(name))
    return calls


def test_the_function_of_the_package(config, shapes, tmp_path, trained, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {**TINY, "epochs": 8, "val_fraction": 0.25}
    result = elrcli.tune(shapes, lambdas=[1, 3], betas=[0.7], lrs=[0.02], **settings)
    assert isinstance(result, TuneResult)
    assert result.folder.parent == Path("runs")
    assert result.folder.name.startswith("shapes-tune-")
    assert result.to_dict()["pick"] == {"lambda": 1, "beta": 0.7, "lr": 0.02}
    with pytest.raises(ConfigError, match="searches 'lam'"):
        elrcli.tune(shapes, lam=1.0)
    with pytest.raises(ConfigError, match="nothing to try"):
        elrcli.tune(shapes, lambdas=[])
