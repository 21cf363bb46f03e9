from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from elrcli import api
from elrcli.cli.app import app
from elrcli.cli.train import closing_lines
from elrcli.config import TrainConfig
from elrcli.presets import PRESETS
from elrcli.run import RunFolder

# option, value typed, field of TrainConfig, value in the resolved settings
TRAIN_OPTIONS = [
    ("--root", "pics", "root", "pics"),
    ("--path-column", "file", "path_column", "file"),
    ("--label-column", "class", "label_column", "class"),
    ("--split-column", "part", "split_column", "part"),
    ("--truth-column", "true", "truth_column", "true"),
    ("--follow-links", None, "follow_links", True),
    ("--no-follow-links", None, "follow_links", False),
    ("--val-fraction", "0.25", "val_fraction", 0.25),
    ("--max-unreadable", "0.2", "max_unreadable", 0.2),
    ("--balanced", None, "balanced", True),
    ("--no-balanced", None, "balanced", False),
    ("--backbone", "resnet18", "backbone", "resnet18"),
    ("-b", "resnet18", "backbone", "resnet18"),
    ("--pretrained", None, "pretrained", True),
    ("--no-pretrained", None, "pretrained", False),
    ("--weights", "w.safetensors", "weights", "w.safetensors"),
    ("--small-input", None, "small_input", True),
    ("--no-small-input", None, "small_input", False),
    ("--freeze", "norm", "freeze", "norm"),
    ("--method", "ce", "method", "ce"),
    ("--method", "elr-plus", "method", "elr-plus"),
    ("--method", "gce", "method", "gce"),
    ("--lambda", "1.5", "lam", 1.5),
    ("--beta", "0.9", "beta", 0.9),
    ("--mixup", None, "mixup", True),
    ("--no-mixup", None, "mixup", False),
    ("--ema", None, "ema", True),
    ("--no-ema", None, "ema", False),
    ("--epochs", "3", "epochs", 3),
    ("-e", "3", "epochs", 3),
    ("--batch-size", "16", "batch_size", 16),
    ("--batch-size", "auto", "batch_size", "auto"),
    ("--optimizer", "adamw", "optimizer", "adamw"),
    ("--lr", "1e-3", "lr", 0.001),
    ("--weight-decay", "0", "weight_decay", 0.0),
    ("--schedule", "step", "schedule", "step"),
    ("--warmup", "0", "warmup", 0.0),
    ("--min-lr", "0", "min_lr", 0.0),
    ("--layer-decay", "0.75", "layer_decay", 0.75),
    ("--head-lr-scale", "10", "head_lr_scale", 10.0),
    ("--clip-grad", "1", "clip_grad", 1.0),
    ("--on-nan", "retry", "on_nan", "retry"),
    ("--accumulate", "2", "accumulate", 2),
    ("--image-size", "64", "image_size", 64),
    ("--augment", "strong", "augment", "strong"),
    ("--flip", None, "flip", True),
    ("--no-flip", None, "flip", False),
    ("--cache", "ram", "cache", "ram"),
    ("--workers", "0", "workers", 0),
    ("--device", "cuda:1", "device", "cuda:1"),
    ("--precision", "bf16", "precision", "bf16"),
    ("--table", "top-k", "table", "top-k"),
    ("--table-device", "host", "table_device", "host"),
    ("--compile", None, "compile", True),
    ("--no-compile", None, "compile", False),
    ("--cuda-graphs", None, "cuda_graphs", True),
    ("--no-cuda-graphs", None, "cuda_graphs", False),
    ("--sync-bn", None, "sync_bn", True),
    ("--no-sync-bn", None, "sync_bn", False),
    ("--checkpoint-minutes", "0.5", "checkpoint_minutes", 0.5),
    ("--tensorboard", None, "tensorboard", True),
    ("--no-tensorboard", None, "tensorboard", False),
    ("--seed", "7", "seed", 7),
]

# the same for options that are refused without another one, which comes last
TOGETHER = [
    ("--lambda-ramp", "50", "lam_ramp", 50, "--method elr-plus"),
    ("--ema-ramp", "40000", "ema_ramp", 40000, "--ema"),
    ("--ema-decay", "0.9", "ema_decay", 0.9, "--ema"),
    ("--mixup-alpha", "0.2", "mixup_alpha", 0.2, "--mixup"),
    ("--weigh-labels", None, "weigh_labels", True, "--mixup"),
    ("--no-weigh-labels", None, "weigh_labels", False, "--mixup"),
    ("--milestones", "40,80", "milestones", [40.0, 80.0], "--schedule step"),
    ("--step-factor", "0.1", "step_factor", 0.1, "--schedule step"),
    ("--restart-epochs", "5", "restart_epochs", 5.0, "--schedule restarts"),
    ("--sl-alpha", "6", "sl_alpha", 6.0, "--method sl"),
    ("--sl-beta", "0.1", "sl_beta", 0.1, "--method sl"),
    ("--sop-lr-u", "1", "sop_lr_u", 1.0, "--method sop"),
    ("--sop-lr-v", "100", "sop_lr_v", 100.0, "--method sop"),
    ("--sop-start", "0.01", "sop_start", 0.01, "--method sop"),
]


@pytest.mark.parametrize(("option", "value", "field", "expected"), TRAIN_OPTIONS)
def test_an_option_sets_its_field(elr, option, value, field, expected):
    typed = [option] if value is None else [option, value]
    outcome = elr("train", "data", *typed, "--show-config")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)[field] == expected


@pytest.mark.parametrize(("option", "value", "field", "expected", "other"), TOGETHER)
def test_an_option_sets_its_field_together_with_another(elr, option, value, field, expected, other):
    typed = [option] if value is None else [option, value]
    outcome = elr("train", "data", *typed, *other.split(), "--show-config")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)[field] == expected


@pytest.mark.parametrize(
    "option",
    [
        "--ema-ramp 5",
        "--ema-decay 0.9",
        "--weigh-labels",
        "--mixup-alpha 0.2",
        "--lambda-ramp 5 --lambda 0",
        "--sl-beta 2",
    ],
)
def test_an_option_that_does_nothing_is_refused(elr, option):
    outcome = elr("train", "data", *option.split())
    assert outcome.code == 1
    assert outcome.err.startswith(f"error: {option.split()[0]}: ")


def test_without_options_the_defaults_hold(elr):
    outcome = elr("train", "data", "--show-config")
    assert json.loads(outcome.out) == TrainConfig(data=Path("data")).to_dict()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--epochs", "0"),
        ("--batch-size", "0"),
        ("--batch-size", "2.5"),
        ("--batch-size", "automatic"),
        ("--beta", "1"),
        ("--method", "mse"),
        ("--lr", "fast"),
        ("--seed", "-1"),
        ("--milestones", "a,b"),
        ("--image-size", "7"),
    ],
)
def test_a_value_out_of_range_is_a_usage_error(elr, option, value):
    outcome = elr("train", "data", option, value)
    assert outcome.code == 2
    assert f"Invalid value for '{option}'" in outcome.err


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--epochs", "0", "0: must be at least 1."),
        ("--epochs", "1.5", "1.5: expected a whole number."),
        ("--val-fraction", "1", "1: must be at most 0.9."),
        ("--lr", "fast", "fast: expected a number."),
        ("--method", "mse", "'mse' is not one of 'elr', "),
    ],
)
def test_a_refused_value_is_explained_in_plain_words(elr, option, value, said):
    assert f": {said}" in elr("train", "data", option, value).err


def test_options_win_over_the_file(elr, tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('data = "pics"\nepochs = 3\nlambda = 1\nsmall-input = true\n')
    settings = json.loads(elr("train", "--config", file, "-e", 5, "--show-config").out)
    assert (settings["data"], settings["epochs"], settings["lam"]) == ("pics", 5, 1.0)
    assert settings["small_input"] is True
    # an option at its default value is an option all the same
    assert json.loads(elr("train", "--config", file, "-e", 15, "--show-config").out)["epochs"] == 15


def test_file_and_options_win_over_the_preset(elr, tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("lambda = 1\nepochs = 3\n")
    typed = ("--preset", "cifar100", "--config", file, "-e", 5, "--show-config")
    settings = json.loads(elr("train", "data", *typed).out)
    expected = TrainConfig(data=Path("data"), **PRESETS["cifar100"]).to_dict()
    assert settings == expected | {"lam": 1.0, "epochs": 5}
    # an option at its own default wins all the same
    outcome = elr("train", "data", "--preset", "cifar100", "--lambda", 3, "--show-config")
    assert json.loads(outcome.out)["lam"] == 3


def test_help_names_the_presets(elr):
    assert set(PRESETS) <= set(re.findall(r"[\w-]+", elr("train", "--help").out))


def test_an_unknown_preset_is_refused(elr):
    outcome = elr("train", "data", "--preset", "clothing", "--show-config")
    assert outcome == (
        1,
        "",
        "error: --preset clothing: no such preset. Choose one of clothing1m, clothing1m-plus.\n",
    )


def test_a_mistyped_setting_in_the_file_is_named(elr, tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("epoch = 3\n")
    outcome = elr("train", "data", "--config", file)
    assert outcome.code == 1
    assert outcome.err == f"error: {file}: unknown setting 'epoch'. Did you mean 'epochs'?\n"


def test_without_data_the_argument_is_asked_for(elr):
    outcome = elr("train")
    assert outcome.code == 2
    assert "name a folder or a CSV file" in outcome.err


@pytest.mark.parametrize(
    "others", [["data"], ["--lr", "1"], ["--preset", "cifar100"], ["--overwrite"]]
)
def test_resume_takes_no_other_setting(elr, others):
    outcome = elr("train", "--resume", "runs/a", *others)
    assert outcome.code == 2
    assert "continued with its own settings" in outcome.err


def test_resume_takes_settings_of_the_machine(elr, tmp_path, monkeypatch):
    calls = []

    def resume(run, *, observer, **settings):
        calls.append((run, settings))
        return RunFolder(tmp_path)

    monkeypatch.setattr(api, "resume", resume)
    options = ("--workers", "0", "--device", "auto", "--cache", "none")
    assert elr("train", "--resume", "runs/a", *options, "--quiet").code == 0
    assert calls == [(Path("runs/a"), {"workers": 0, "device": "auto", "cache": "none"})]


def test_what_is_typed_reaches_the_engine(elr, tmp_path, monkeypatch):
    calls = []

    def train_as(config, out, *, overwrite, observer):
        calls.append((config, out, overwrite))
        return RunFolder(tmp_path / "my run")

    monkeypatch.setattr("elrcli.api.train_as", train_as)
    outcome = elr("train", "data", "--out", "a", "--overwrite", "--quiet")
    assert outcome == (0, f"{tmp_path}/my run\n", "")
    outcome = elr("train", "data", "-o", "b", "-q")
    assert [call[1:] for call in calls] == [(Path("a"), True), (Path("b"), False)]
    outcome = elr("train", "data")
    assert calls[-1] == (TrainConfig(data=Path("data")), None, False)
    assert f"elr audit '{tmp_path}/my run'" in outcome.err  # ready to be pasted
    assert f"elr predict '{tmp_path}/my run' image.jpg" in outcome.err
    assert f"{tmp_path}/my run/curves.svg" in outcome.err


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("train no", "error: no: no such file or folder. Check the path.\n"),
        ("tune no", "error: no: no such file or folder. Check the path.\n"),
        ("evaluate no no", "error: no: no such folder."),
        ("train labels.csv --label-column kind", "no column 'kind'"),
        ("train labels.csv --out taken", "error: taken: is a file. Choose another --out.\n"),
    ],
)
def test_what_is_wrong_with_the_data_is_said_before_torch_is_loaded(tmp_path, typed, message):
    (tmp_path / "labels.csv").write_text("path,label\na.png,a\n")
    (tmp_path / "taken").touch()
    program = (
        "import sys; from elrcli.cli.app import main\n"
        "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules\n"
    )
    outcome = subprocess.run(
        [sys.executable, "-c", program, *typed.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.returncode == 1
    assert message in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_presets_are_completed():
    (option,) = (o for o in get_command(app).commands["train"].params if o.name == "preset")
    found = option.shell_complete(None, "cifar100")
    assert [item.value for item in found] == ["cifar100", "cifar100-star", "cifar100-plus"]


def test_resume_reaches_the_engine(elr, tmp_path, monkeypatch):
    calls = []

    def resume(run, *, observer):
        calls.append(run)
        return RunFolder(run)

    monkeypatch.setattr("elrcli.api.resume", resume)
    assert elr("train", "--resume", "runs/a").out == "runs/a\n"
    assert calls == [Path("runs/a")]


@pytest.mark.parametrize(
    ("agreement", "said"),
    [("0", ", 0.0% of the validation labels predicted"), ("", "")],
)
def test_the_closing_lines_say_what_was_measured(tmp_path, agreement, said):
    run = RunFolder(tmp_path)
    run.metrics_file.write_text(f"epoch,val_agreement,seconds\n1,{agreement},7\n")
    assert closing_lines(run)[1] == f"Trained 1 epoch in 0:07{said}."
