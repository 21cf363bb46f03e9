from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

import elrcli
from elrcli.config import TrainConfig
from elrcli.engine import tune as search
from elrcli.engine.observer import Observer
from elrcli.engine.tune import (
    Candidate,
    Trial,
    TuneResult,
    choose,
    draw_pairs,
    plan_epochs,
    shortened,
    tune,
)
from elrcli.errors import ConfigError, DataError, Interrupted, RunError, TrainingError
from elrcli.run import RunFolder, write_text
from tests.engine.conftest import TINY

DEFAULT = Candidate(3.0, 0.7, 0.001)
GRID = {"lambdas": (1.0, 3.0), "betas": (0.7,), "lrs": (0.01, 0.02)}


def test_settings_are_apart_by_factors():
    assert DEFAULT.distance(DEFAULT) == 0
    assert DEFAULT.distance(Candidate(7.0, 0.7, 0.001)) == pytest.approx(math.log(2))
    assert DEFAULT.distance(Candidate(3.0, 0.9, 0.003)) == pytest.approx(2 * math.log(3))


def test_the_nearest_to_the_defaults_within_one_standard_error_is_picked():
    best = Candidate(1.0, 0.7, 0.001)
    choice = choose({DEFAULT: 0.77, best: 0.80, Candidate(7.0, 0.7, 0.001): 0.79}, DEFAULT, 100)
    assert (choice.pick, choice.best, choice.within) == (DEFAULT, best, 3)
    assert choice.standard_error == pytest.approx(0.04, abs=0.001)  # sqrt(.8 * .2 / 100)


def test_what_is_worse_by_more_is_not_picked():
    best = Candidate(1.0, 0.7, 0.001)
    assert choose({DEFAULT: 0.75, best: 0.80}, DEFAULT, 100).pick == best
    assert choose({DEFAULT: 0.77, best: 0.80}, DEFAULT, 10_000).pick == best


def test_a_perfect_share_has_an_error_too():
    best = Candidate(1.0, 0.7, 0.001)
    assert choose({DEFAULT: 0.95, best: 1.0}, DEFAULT, 20).pick == DEFAULT


def test_a_search_costs_a_quarter_of_its_grid():
    """6 pairs of lambda and beta, 3 rates, 16 epochs: 18 * 16 / 4 = 72 epochs."""
    assert plan_epochs(6, 3, 16) == (2, 11)  # 3 * 2 + 6 * 11 = 72
    for pairs, rates, epochs in ((6, 2, 16), (6, 3, 15), (9, 3, 40), (20, 2, 120)):
        short, long = plan_epochs(pairs, rates, epochs)
        assert rates * short + pairs * long <= pairs * rates * epochs / 4


def test_runs_that_would_be_too_short_to_compare_are_longer():
    assert plan_epochs(6, 1, 15) == (2, 5)  # a third of the epochs
    assert plan_epochs(6, 3, 2) == (2, 2)
    assert plan_epochs(6, 3, 1) == (1, 1)
    assert plan_epochs(2, 9, 16)[1] == 16  # and never longer than the training itself


def test_a_draw_keeps_what_is_nearest_to_the_defaults():
    pairs = [Candidate(lam, beta, 0.1) for lam in (1.0, 3.0, 7.0) for beta in (0.7, 0.9)]
    drawn = draw_pairs(pairs, DEFAULT, 3, seed=0)
    assert len(drawn) == 3
    assert Candidate(3.0, 0.7, 0.1) in drawn
    assert drawn == draw_pairs(pairs, DEFAULT, 3, seed=0)
    assert {*drawn} != {*draw_pairs(pairs, DEFAULT, 3, seed=1)}
    assert draw_pairs(pairs, DEFAULT, 99, seed=0) == pairs


def test_the_schedule_is_squeezed():
    config = TrainConfig(data=Path("d"), epochs=40, warmup=4, milestones=(0.5, 20, 30), lam_ramp=7)
    short = shortened(config, 20)
    assert (short.epochs, short.warmup, short.milestones) == (20, 2.0, (0.5, 10.0, 15.0))
    assert (short.restart_epochs, short.lam_ramp) == (5.0, 4)


@pytest.fixture
def config(shapes) -> TrainConfig:
    return TrainConfig(**{"data": shapes, **TINY, "epochs": 8, "val_fraction": 0.25})


@pytest.fixture
def trained(monkeypatch) -> list[TrainConfig]:
    """Replace training by a formula: the rate 0.01 and lambda 1 are best, long runs better."""
    calls: list[TrainConfig] = []

    def fit(settings: TrainConfig, path: Path, **_: object) -> RunFolder:
        calls.append(settings)
        reached = 0.5 + settings.epochs / 100 - settings.lam / 50 - 10 * settings.lr
        rows = [f"{epoch},{reached}" for epoch in range(1, settings.epochs + 1)]
        write_text(path / "metrics.csv", "\n".join(["epoch,val_agreement", *rows]))
        return RunFolder(path)

    monkeypatch.setattr(search, "fit", fit)
    return calls


def test_short_runs_choose_the_rate_and_longer_ones_the_rest(config, tmp_path, trained):
    result = tune(config, tmp_path / "t", **GRID)
    assert [(call.epochs, call.lam, call.lr) for call in trained] == [
        (2, 3.0, 0.01),  # with lambda and beta of the defaults
        (2, 3.0, 0.02),
        (3, 1.0, 0.02),  # 6 images say little, and 0.02 is the automatic rate of sgd
        (3, 3.0, 0.02),
    ]
    assert result.trials[0] == Trial(Candidate(3.0, 0.7, 0.01), 2, pytest.approx(0.36))
    assert result.choice.best == Candidate(1.0, 0.7, 0.02)
    assert result.choice.pick == Candidate(3.0, 0.7, 0.02)
    assert result.config == config.replace(lam=3.0, beta=0.7, lr=0.02)
    assert (result.val_images, result.cost) == (6, 10 / 32)
    with (tmp_path / "t/trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    assert rows[0] == {
        "lambda": "3",
        "beta": "0.7",
        "lr": "0.01",
        "epochs": "2",
        "val_agreement": "0.36",
    }


def test_the_grid_around_the_automatic_rate(config, tmp_path, trained):
    tune(config, tmp_path / "t")
    assert [call.lr for call in trained[:3]] == [0.006, 0.02, 0.06]
    assert [(call.lam, call.beta) for call in trained[3:]] == [
        (lam, beta) for lam in (1.0, 3.0, 7.0) for beta in (0.7, 0.9)
    ]
    trained.clear()
    tune(config, tmp_path / "u", trials=2)
    assert len(trained) == 3 + 2


def test_runs_of_one_length_are_trained_once(config, tmp_path, trained):
    result = tune(config.replace(epochs=2), tmp_path / "t", **GRID)
    assert len(trained) == len(result.trials) == 3


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
    (tmp_path / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(RunError, match="not empty and not a search"):
            tune(config, tmp_path, **GRID, overwrite=overwrite)
    with pytest.raises(RunError, match="is a file"):
        tune(config, tmp_path / "notes.txt", **GRID)


def test_what_cannot_be_searched(config, tmp_path):
    for changes, grid, problem in (
        ({"method": "ce"}, GRID, "--method ce: has no lambda"),
        ({}, {**GRID, "trials": 0}, "--trials 0: must be at least 1"),
        ({}, {"lambdas": (1.0,), "betas": (0.7,), "lrs": (0.01,)}, "one setting is no choice"),
        ({}, {**GRID, "lrs": (0.0,)}, "above 0"),
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
            raise TrainingError("the loss became nan")
        return train(settings, path, **options)

    monkeypatch.setattr(search, "fit", fit)
    result = tune(config, tmp_path / "t", **{**GRID, "lambdas": (3.0, 5.0)})
    assert result.choice.pick == Candidate(3.0, 0.7, 0.01)
    failed = [trial.candidate for trial in result.trials if trial.agreement is None]
    assert failed == [Candidate(3.0, 0.7, 0.02), Candidate(5.0, 0.7, 0.01)]
    with pytest.raises(TrainingError, match="no run could be trained"):
        tune(config, tmp_path / "u", **{**GRID, "lambdas": (5.0,)})


class Stop(Observer):
    """Stops the work in an epoch of a run, as a signal would."""

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def progress(self, stage: str, done: int, total: int | None) -> None:
        if stage == self.stage:
            raise Interrupted("stopped", 2)


def test_an_interrupted_search_goes_on(config, tmp_path, monkeypatch):
    """Real trainings: the finished run is read, the half-done one resumed, the rest trained."""
    small = config.replace(epochs=4)
    grid = {**GRID, "lrs": (0.02,)}  # nothing for short runs to choose
    whole = tune(small, tmp_path / "whole", **grid)
    assert [trial.epochs for trial in whole.trials] == [2, 2]

    with pytest.raises(Interrupted, match=f"^stopped Continue.* same command, --out {tmp_path}/t$"):
        tune(small, tmp_path / "t", **grid, observer=Stop("run 2 of 2, epoch 2/2"))
    folders = sorted((tmp_path / "t/trials").iterdir())
    states = [(folder / "checkpoint").is_dir() for folder in folders]
    assert states == [False, True]
    assert not (folders[0] / "model.safetensors").exists()
    assert not (folders[0] / "features.safetensors").exists()
    calls = counted(monkeypatch)
    again = tune(small, tmp_path / "t", **grid)
    assert calls == {"fit": 0, "resume": 1}
    assert again.trials == whole.trials
    assert len({(folder / "manifest.csv").read_text() for folder in folders}) == 1


def test_a_run_that_was_killed_before_its_first_checkpoint_is_trained(
    config, tmp_path, monkeypatch, trained
):
    tune(config, tmp_path / "t", **GRID)
    killed = next((tmp_path / "t/trials").glob("3-epochs*"))
    (killed / "metrics.csv").unlink()
    (killed / ".config.json.abc").write_text("half")
    tune(config, tmp_path / "t", **GRID)
    assert len(trained) == 5


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
    assert result.to_dict()["pick"] == {"lambda": 3, "beta": 0.7, "lr": 0.02}
    with pytest.raises(ConfigError, match="searches 'lam'"):
        elrcli.tune(shapes, lam=1.0)
    with pytest.raises(ConfigError, match="nothing to try"):
        elrcli.tune(shapes, lambdas=[])
