from __future__ import annotations

import json
from pathlib import Path

import pytest

from elrcli.cli.tune import train_command
from elrcli.config import TrainConfig
from elrcli.engine.tune import Candidate, Choice, Trial, TuneResult
from elrcli.errors import SAME_COMMAND, Interrupted
from elrcli.files import readable_json

DEFAULT, OTHER = Candidate(3.0, 0.7, 0.001), Candidate(1.0, 0.7, 0.003)
CALLS: list[dict[str, object]] = []  # what the search was called with


@pytest.fixture(autouse=True)
def _found(tmp_path, monkeypatch) -> None:
    """A search that finds DEFAULT and OTHER equally good."""
    monkeypatch.chdir(tmp_path)

    def tune(config, out, **options):
        CALLS.append({"config": config, "out": out} | options)
        trials = [Trial(DEFAULT, 2, 0.5), Trial(OTHER, 2, 0.525), Trial(DEFAULT, 8, 0.71)]
        return TuneResult(
            folder=out or Path("runs/photos-tune"),
            config=config.replace(lam=3.0, beta=0.7, lr=0.001),
            trials=[*trials, Trial(OTHER, 8, 0.72), Trial(Candidate(7.0, 0.7, 0.003), 2, None)],
            pick=DEFAULT,
            choices={
                ("lr",): Choice(DEFAULT, DEFAULT, 1, 3),
                ("lam",): Choice(DEFAULT, OTHER, 2, 2),
            },
            val_images=100,
            cost=0.25,
        )

    monkeypatch.setattr("elrcli.engine.tune.tune", tune)
    monkeypatch.setattr("elrcli.api._check_there", lambda *_: None)


def test_table_pick_and_command_on_stdout(elr):
    outcome = elr("tune", "my photos", "--epochs", 16, "--no-flip")
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines() == [
        "Share of 100 validation labels predicted, after",
        "lambda  beta     lr  2 epochs  8 epochs",
        "     3   0.7  0.001     50.0%     71.0%  pick",
        "     1   0.7  0.003     52.5%     72.0%",
        "     7   0.7  0.003    failed",
        "",
        "lr 0.001: the best of 3.",
        "lambda 3: the nearest to the defaults, for 2 of 2 cannot be told apart;"
        " lambda 1 is ahead.",
        "The search took as much training as 25% of its grid.",
        "",
        "elr train 'my photos' --lambda 3 --beta 0.7 --epochs 16 --lr 0.001 --no-flip",
    ]


def test_json_on_stdout(elr):
    for quiet in ("--quiet", "-q"):
        outcome = elr("tune", "photos", "--json", quiet, "--out", "t")
        assert outcome.err == ""
        found = json.loads(outcome.out)
        assert found["pick"] == {"lambda": 3.0, "beta": 0.7, "lr": 0.001}
        assert found["steps"] == [
            {"pick": {"lr": 0.001}, "best": {"lr": 0.001}, "within": 1, "compared": 3},
            {"pick": {"lambda": 3.0}, "best": {"lambda": 1.0}, "within": 2, "compared": 2},
        ]
        assert (found["val_images"], found["cost"]) == (100, 0.25)
        assert found["folder"] == "t"
        assert found["command"] == "elr train photos --lambda 3 --beta 0.7 --lr 0.001"
        other = {"lambda": 1.0, "beta": 0.7, "lr": 0.003}
        assert found["trials"][1] == other | {"epochs": 2, "val_agreement": 0.525}


def test_the_grid_reaches_the_search(elr):
    grid = ("--lambdas", "1,5", "--betas", "0.5", "--lrs", "1e-3,1e-4")
    elr("tune", "photos", *grid, "-o", "t", "--overwrite")
    call = CALLS[-1]
    assert (call["lambdas"], call["betas"], call["lrs"]) == ((1.0, 5.0), (0.5,), (0.001, 0.0001))
    assert (call["out"], call["overwrite"]) == (Path("t"), True)
    elr("tune", "photos")
    call = CALLS[-1]
    assert not {"lambdas", "betas", "lrs"}.intersection(call)
    assert call["overwrite"] is False
    assert call["out"] is None


@pytest.mark.parametrize("typed", [("--lambdas", "a"), ("--betas", "")])
def test_a_wrong_grid_is_a_usage_error(elr, typed):
    outcome = elr("tune", "photos", *typed)
    assert outcome.code == 2
    assert f"Invalid value for '{typed[0]}'" in outcome.err


# option, value typed, field, value
PASSED_ON = [
    ("--root", "pics", "root", Path("pics")),
    ("--path-column", "file", "path_column", "file"),
    ("--label-column", "class", "label_column", "class"),
    ("--split-column", "part", "split_column", "part"),
    ("--truth-column", "true", "truth_column", "true"),
    ("--follow-links", None, "follow_links", True),
    ("--no-follow-links", None, "follow_links", False),
    ("--val-fraction", "0.25", "val_fraction", 0.25),
    ("--max-unreadable", "0", "max_unreadable", 0.0),
    ("--balanced", None, "balanced", True),
    ("--no-balanced", None, "balanced", False),
    ("--backbone", "resnet18", "backbone", "resnet18"),
    ("-b", "resnet18", "backbone", "resnet18"),
    ("--pretrained", None, "pretrained", True),
    ("--no-pretrained", None, "pretrained", False),
    ("--weights", "w.safetensors", "weights", Path("w.safetensors")),
    ("--small-input", None, "small_input", True),
    ("--no-small-input", None, "small_input", False),
    ("--freeze", "norm", "freeze", "norm"),
    ("--method", "elr-halves", "method", "elr-halves"),
    ("--mixup", None, "mixup", True),
    ("--no-mixup", None, "mixup", False),
    ("--ema", None, "ema", True),
    ("--no-ema", None, "ema", False),
    ("--lambda-ramp", "50", "lam_ramp", 50),
    ("--epochs", "3", "epochs", 3),
    ("-e", "3", "epochs", 3),
    ("--batch-size", "16", "batch_size", 16),
    ("--batch-size", "auto", "batch_size", "auto"),
    ("--optimizer", "sgd", "optimizer", "sgd"),
    ("--weight-decay", "0", "weight_decay", 0.0),
    ("--schedule", "step", "schedule", "step"),
    ("--warmup", "0", "warmup", 0.0),
    ("--min-lr", "0", "min_lr", 0.0),
    ("--layer-decay", "0.75", "layer_decay", 0.75),
    ("--head-lr-scale", "10", "head_lr_scale", 10.0),
    ("--clip-grad", "1", "clip_grad", 1.0),
    ("--accumulate", "2", "accumulate", 2),
    ("--image-size", "64", "image_size", 64),
    ("--augment", "strong", "augment", "strong"),
    ("--flip", None, "flip", True),
    ("--no-flip", None, "flip", False),
    ("--cache", "ram", "cache", "ram"),
    ("--workers", "0", "workers", 0),
    ("--device", "cuda:1", "device", "cuda:1"),
    ("--precision", "bf16", "precision", "bf16"),
    ("--on-nan", "retry", "on_nan", "retry"),
    ("--checkpoint-minutes", "0", "checkpoint_minutes", 0.0),
    ("--cuda-graphs", None, "cuda_graphs", True),
    ("--no-cuda-graphs", None, "cuda_graphs", False),
    ("--sync-bn", None, "sync_bn", True),
    ("--no-sync-bn", None, "sync_bn", False),
    ("--table", "top-k", "table", "top-k"),
    ("--table-device", "host", "table_device", "host"),
    ("--compile", None, "compile", True),
    ("--no-compile", None, "compile", False),
    ("--seed", "7", "seed", 7),
]


# options that are refused without another one: option, field, value
TOGETHER = [
    (["--ema-ramp", "4000", "--ema"], "ema_ramp", 4000),
    (["--ema-decay", "0.9", "--ema"], "ema_decay", 0.9),
    (["--mixup-alpha", "0.2", "--mixup"], "mixup_alpha", 0.2),
    (["--weigh-labels", "--mixup"], "weigh_labels", True),
    (["--no-weigh-labels", "--mixup"], "weigh_labels", False),
]


@pytest.mark.parametrize(("typed", "field", "expected"), TOGETHER)
def test_options_that_need_each_other_reach_the_trainings(elr, typed, field, expected):
    assert elr("tune", "data", *typed).code == 0
    assert getattr(CALLS[-1]["config"], field) == expected


@pytest.mark.parametrize(("option", "value", "field", "expected"), PASSED_ON)
def test_an_option_reaches_the_trainings_and_the_command(elr, option, value, field, expected):
    typed = [option] if value is None else [option, value]
    outcome = elr("tune", "data", *typed, "--json")
    assert outcome.code == 0, outcome.err
    config = CALLS[-1]["config"]
    assert config == TrainConfig(data=Path("data"), **{field: expected})
    assert elr(*json.loads(outcome.out)["command"].split()[1:], "--show-config").out == (
        readable_json(config.replace(lam=3.0, beta=0.7, lr=0.001).to_dict(), indent=2) + "\n"
    )


@pytest.mark.parametrize(
    ("option", "value", "field", "expected", "schedule"),
    [
        ("--milestones", "40,80", "milestones", (40.0, 80.0), "step"),
        ("--step-factor", "0.1", "step_factor", 0.1, "step"),
        ("--restart-epochs", "5", "restart_epochs", 5.0, "restarts"),
    ],
)
def test_an_option_of_a_schedule_reaches_the_trainings(
    elr, option, value, field, expected, schedule
):
    outcome = elr("tune", "data", option, value, "--schedule", schedule, "--json")
    assert outcome.code == 0, outcome.err
    config = CALLS[-1]["config"]
    assert config == TrainConfig(data=Path("data"), schedule=schedule, **{field: expected})
    assert elr(*json.loads(outcome.out)["command"].split()[1:], "--show-config").out == (
        readable_json(config.replace(lam=3.0, beta=0.7, lr=0.001).to_dict(), indent=2) + "\n"
    )


def test_the_command_is_as_exact_as_the_search():
    config = TrainConfig(data=Path("d"), lr=0.00012345678, lam=2.5)
    assert train_command(config)[-1] == "0.00012345678"


def test_an_interrupted_search_names_the_command_that_goes_on(elr, monkeypatch):
    def tune(*arguments, **options):
        raise Interrupted(2, SAME_COMMAND)

    monkeypatch.setattr("elrcli.engine.tune.tune", tune)
    outcome = elr("tune", "my photos", "--overwrite", "--out", "t")
    assert outcome.code == 130
    again = "elr tune 'my photos' --out t"
    assert outcome.err == f"error: stopped by SIGINT. Continue with: {again}\n"


def test_an_interrupted_search_without_a_place_names_the_one_it_has(elr, monkeypatch):
    def tune(*arguments, **options):
        raise Interrupted(2, f"{SAME_COMMAND} --out runs/p")

    monkeypatch.setattr("elrcli.engine.tune.tune", tune)
    outcome = elr("tune", "my photos", "--epochs", 9)
    again = "elr tune 'my photos' --epochs 9 --out runs/p"
    assert outcome.err == f"error: stopped by SIGINT. Continue with: {again}\n"
