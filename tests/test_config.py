from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from elrcli.config import Reading, TrainConfig, check_names, option_name, read_toml, setting_types
from elrcli.errors import ConfigError
from elrcli.files import read_json_object, readable_json

METHODS = ("elr", "elr-plus", "elr-halves", "ce", "gce", "sl", "sop")


def make(**settings: object) -> TrainConfig:
    return TrainConfig(**{"data": Path("d"), **settings})


def test_defaults_of_the_contract():
    config = make()
    assert (config.backbone, config.method, config.lam, config.beta) == ("resnet50", "elr", 3, 0.7)
    assert (config.val_fraction, config.augment, config.precision) == (0.1, "light", "auto")
    assert config.batch_size is config.lr is config.weights is None


def test_data_is_read_by_default_as_a_training_reads_it():
    assert TrainConfig(data=Path("photos")).reading == Reading()


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().lam = 1.0  # type: ignore[misc]


def test_replace_checks_again():
    config = make()
    assert config.replace(lam=1).lam == 1.0
    assert config.lam == 3.0
    with pytest.raises(ConfigError, match=r"--lambda -1.0: must be at least 0\."):
        config.replace(lam=-1)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epochs", 0, "--epochs 0: must be at least 1."),
        ("epochs", 10_001, "--epochs 10001: must be at most 10000."),
        pytest.param("epochs", 10**400, "must be at most 10000.", id="huge"),
        ("epochs", 2.0, "--epochs 2.0: expected a whole number."),
        ("epochs", True, "--epochs True: expected a whole number."),
        ("epochs", None, "--epochs needs a value."),
        ("beta", 1.0, "--beta 1.0: must be at most 0.9999."),
        ("beta", math.nan, "--beta nan: must be at least 0."),
        ("lr", math.inf, "--lr inf: must be finite."),
        pytest.param("lr", 10**400, "--lr inf: must be finite.", id="huge rate"),
        pytest.param("lr", -(10**400), "--lr -inf: must be at least 0.", id="minus huge"),
        ("lr", "fast", "--lr 'fast': expected a number."),
        ("lr", False, "--lr False: expected a number."),
        ("mixup", 1, "--mixup 1: expected true or false."),
        ("method", "mse", "--method 'mse': choose one of elr, elr-plus,"),
        ("optimizer", 3, "--optimizer 3: expected text."),
        ("weights", 3, "--weights 3: expected a path."),
        ("milestones", "40,b", "--milestones '40,b': expected numbers, such as 40,80."),
        ("milestones", 5, "--milestones 5: expected numbers, such as 40,80."),
        ("milestones", [10**400], "expected numbers"),
        ("milestones", (-1.0,), "--milestones -1.0: must be at least 0."),
        ("image_size", 7, "--image-size 7: must be at least 8."),
        ("seed", 2**32, "--seed 4294967296: must be at most"),
        ("data", None, "--data needs a value."),
        ("batch_size", 0, "--batch-size 0: must be at least 1."),
        ("batch_size", "16", "--batch-size '16': expected a whole number or auto."),
        ("batch_size", True, "--batch-size True: expected a whole number or auto."),
        ("epochs", "auto", "--epochs 'auto': expected a whole number."),
    ],
)
def test_a_bad_value_is_named(name, value, message):
    with pytest.raises(ConfigError) as caught:
        make(**{name: value})
    assert message in str(caught.value)


def test_values_take_the_type_of_their_setting():
    config = make(data="folder", lam=3, schedule="step", milestones="40,80", weights="w.pth")
    assert config.data == Path("folder")
    assert type(config.lam) is float
    assert config.milestones == (40.0, 80.0)
    assert config.weights == Path("w.pth")


def test_numbers_may_be_of_numpy():
    config = make(epochs=np.int64(3), lam=np.int64(2), beta=np.float32(0.5))
    assert (config.epochs, config.lam, config.beta) == (3, 2.0, 0.5)
    assert json.loads(json.dumps(config.to_dict()))["epochs"] == 3
    with pytest.raises(ConfigError, match="expected a whole number"):
        make(epochs=np.bool_(True))


def test_the_batch_size_is_a_number_or_auto(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('batch-size = "auto"\n')
    config = make(**read_toml(file))
    assert config.batch_size == "auto"
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.replace(batch_size=3).batch_size == 3


def test_weights_and_no_pretrained_exclude_each_other():
    with pytest.raises(ConfigError, match="--weights and --no-pretrained exclude each other"):
        make(weights=Path("w.pth"), pretrained=False)


def test_sop_is_had_without_mixup():
    assert make(method="sop", ema=True, mixup=False).averages
    with pytest.raises(ConfigError, match=r"^--method sop: cannot be had with --mixup\.$"):
        make(method="sop", mixup=True)


@pytest.mark.parametrize(
    ("name", "only"),
    [
        ("sl_alpha", "sl"),
        ("sl_beta", "sl"),
        ("sop_lr_u", "sop"),
        ("sop_lr_v", "sop"),
        ("sop_start", "sop"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_a_setting_of_one_method_is_refused_by_the_others(name, only, method):
    if method == only:
        assert getattr(make(method=method, **{name: 0.5}), name) == 0.5
        return
    with pytest.raises(ConfigError) as caught:
        make(method=method, **{name: 0.5})
    assert str(caught.value) == f"{option_name(name)}: only --method {only} uses it. Leave it out."


@pytest.mark.parametrize("other", ["mixup", "ema"])
def test_two_halves_are_had_without_mixup_and_averages(other):
    config = make(method="elr-halves")
    with pytest.raises(ConfigError, match=r"^--method elr-halves: cannot be had with --mixup"):
        config.replace(**{other: True})
    assert getattr(make(method="elr", **{other: True}), other)


@pytest.mark.parametrize(
    ("method", "networks", "has_term"),
    [
        ("elr", 1, True),
        ("elr-plus", 2, True),
        ("elr-halves", 2, True),
        ("ce", 1, False),
        ("gce", 1, False),
        ("sl", 1, False),
        ("sop", 1, False),
    ],
)
def test_what_a_method_consists_of(method, networks, has_term):
    config = make(method=method)
    assert (config.networks, config.has_elr_term) == (networks, has_term)


@pytest.mark.parametrize("method", METHODS)
def test_only_elr_plus_mixes_and_averages_by_itself(method):
    config = make(method=method)
    assert config.mixes is config.averages is (method == "elr-plus")


@pytest.mark.parametrize("method", ["elr", "elr-plus", "ce"])
@pytest.mark.parametrize("given", [True, False])
def test_what_is_said_of_mixup_and_averages_counts(method, given):
    config = make(method=method, mixup=given, ema=not given)
    assert (config.mixes, config.averages) == (given, not given)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "ce", "lam": 7}, "--lambda: the loss has no ELR term."),
        ({"method": "ce", "lam_ramp": 5}, "--lambda-ramp: the loss has no ELR term."),
        ({"lam": 0, "lam_ramp": 5}, "--lambda-ramp: the loss has no ELR term."),
        ({"ema_ramp": 5}, "--ema-ramp: there is no weight average."),
        ({"method": "elr-plus", "ema": False, "ema_ramp": 5}, "--ema-ramp: there is no"),
        ({"method": "elr-halves", "ema_ramp": 5}, "--ema-ramp: there is no weight average."),
        ({"weigh_labels": True, "ema": True}, "--weigh-labels: no labels are mixed."),
        ({"method": "elr-plus", "mixup": False, "weigh_labels": True}, "--weigh-labels: no"),
        ({"milestones": (40.0, 80.0)}, "--milestones: only --schedule step uses it."),
        ({"schedule": "restarts", "step_factor": 0.1}, "--step-factor: only --schedule step"),
        ({"schedule": "step", "restart_epochs": 5}, "--restart-epochs: only --schedule restarts"),
        ({"freeze": "backbone", "layer_decay": 0.5}, "--layer-decay: --freeze backbone fixes"),
        ({"schedule": "step", "warmup": 0, "min_lr": 0.1}, "--min-lr: --schedule step has it in"),
        ({"schedule": "constant", "warmup": 0, "min_lr": 0}, "--min-lr: --schedule constant"),
        ({"clip_grad": 0}, "--clip-grad 0: nothing would be learned."),
        ({"lr": 0}, "--lr 0: nothing would be learned."),
    ],
)
def test_what_would_do_nothing_is_refused(settings, message):
    with pytest.raises(ConfigError) as caught:
        make(**settings)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "settings",
    [
        {"lam_ramp": 5},
        {"method": "elr-halves", "lam_ramp": 5},
        {"schedule": "step", "milestones": [40.0, 80.0], "step_factor": 0.1},
        {"schedule": "restarts", "restart_epochs": 5.0},
        {"clip_grad": 0.1},
        {"method": "elr-plus", "lam_ramp": 5, "ema_ramp": 5, "weigh_labels": True},
        {"method": "ce", "mixup": True, "weigh_labels": True, "ema": True, "ema_ramp": 5},
    ],
)
def test_what_does_something_is_taken(settings):
    found = make(**settings).to_dict()
    assert {name: found[name] for name in settings} == settings


def test_a_config_survives_json():
    config = make(root=Path("r"), schedule="step", milestones=(0.5, 40), lr=0.1, mixup=True, seed=7)
    again = TrainConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config


def test_from_dict_names_the_place():
    with pytest.raises(ConfigError, match=r"^here: --lr 'x': expected a number\.$"):
        TrainConfig.from_dict({"data": "d", "lr": "x"}, "here")
    with pytest.raises(ConfigError, match=r"^here: no 'data' given"):
        TrainConfig.from_dict({}, "here")
    with pytest.raises(ConfigError, match=r"unknown setting 'epoch'\. Did you mean 'epochs'\?"):
        TrainConfig.from_dict({"data": "d", "epoch": 3}, "here")


def test_check_names_has_no_hint_where_nothing_is_near():
    with pytest.raises(ConfigError, match=r"^f: unknown setting 'zzzzz'\.$"):
        check_names({"zzzzz": 1}, "f")


def test_option_names():
    assert option_name("lam") == "--lambda"
    assert option_name("head_lr_scale") == "--head-lr-scale"
    with pytest.raises(KeyError):
        option_name("nothing")


def test_setting_types_are_plain():
    types = setting_types()
    assert types["batch_size"] is int
    assert types["weights"] is Path
    assert types["milestones"] is tuple
    assert types["truth_column"] is str


def test_every_setting_has_a_help_text_a_panel_and_a_name_for_none():
    for spec in dataclasses.fields(TrainConfig):
        if spec.name == "data":
            continue
        assert spec.metadata["help"].endswith("."), spec.name
        assert spec.metadata["panel"], spec.name
        assert (spec.default is None) == (spec.metadata["auto"] is not None), spec.name


def test_toml(tmp_path):
    file = tmp_path / "c.toml"
    lines = "lambda = 5", "lambda-ramp = 9", "batch-size = 32", "head_lr_scale = 2.0"
    file.write_text("\n".join([*lines, 'milestones = [1, "2"]']))
    values = read_toml(file)
    assert values == {
        "lam": 5,
        "lam_ramp": 9,
        "batch_size": 32,
        "head_lr_scale": 2.0,
        "milestones": [1, "2"],
    }
    assert make(**values, schedule="step").milestones == (1.0, 2.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"lr = ", "not valid TOML"),
        (b"\xff = 1", "not valid TOML"),
        pytest.param(b"x = " + b"[" * 5000, "not valid TOML", id="deep"),
        (b"epoch = 3", "unknown setting 'epoch'. Did you mean 'epochs'?"),
        (b"batch-size = 8\nbatch_size = 9", "'batch_size' is there in another spelling too."),
        (b"lambda = 1\nlam = 2", "'lam' is there in another spelling too."),
        (b"a-b = 1\na_b = 2", "'a_b' is there in another spelling too."),
    ],
)
def test_bad_toml_is_named(tmp_path, content, message):
    file = tmp_path / "c.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_toml(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_toml(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_json_object(tmp_path / "none.json")


@pytest.mark.parametrize(
    "content", ["{", pytest.param("[" * 100_000, id="deep"), "\x00", "NaN", "[1]"]
)
def test_bad_json_is_refused(tmp_path, content):
    file = tmp_path / "c.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"c\.json: (not valid JSON|expected one JSON object)"):
        read_json_object(file)


def test_numbers_of_a_list_stay_on_one_line():
    content = {"rows": [[1, 2.5], [None, -1e-7]], "names": ["a [\n", "b"], "none": []}
    text = readable_json(content, indent=2)
    assert json.loads(text) == content
    assert "    [1, 2.5],\n    [null, -1e-07]\n" in text
    assert len(text.splitlines()) == 11
