"""The presets, pinned to the tables of the paper."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import elrcli
from elrcli.config import TrainConfig
from elrcli.errors import ConfigError
from elrcli.presets import PRESETS, with_preset
from tests.shapes import write_shapes

# beta, lambda, epochs, milestones, factor at each, rate, weight decay, batch
STEPS = {
    "cifar10-sym": (0.7, 3, 120, (40, 80), 0.01, 0.02, 1e-3, 128),
    "cifar10-asym": (0.9, 1, 120, (40, 80), 0.01, 0.02, 1e-3, 128),
    "cifar100": (0.9, 7, 150, (80, 120), 0.01, 0.02, 1e-3, 128),
    "cifar10-sym-plus": (0.7, 3, 200, (150,), 0.1, 0.02, 5e-4, 128),
    "cifar10-asym-plus": (0.9, 1, 200, (150,), 0.1, 0.02, 5e-4, 128),
    "cifar100-plus": (0.9, 7, 250, (200,), 0.1, 0.02, 5e-4, 128),
    "clothing1m": (0.7, 3, 10, (5,), 0.01, 0.001, 1e-3, 64),
    "clothing1m-plus": (0.7, 3, 15, (7,), 0.1, 0.002, 1e-3, 64),
    "webvision": (0.7, 3, 120, (40, 80), 0.01, 0.02, 5e-4, 32),
    "webvision-plus": (0.7, 3, 100, (50,), 0.1, 0.02, 5e-4, 32),
}
# beta, lambda; the rest is the same for all
STARS = {"cifar10-sym-star": (0.7, 3), "cifar10-asym-star": (0.9, 1), "cifar100-star": (0.9, 7)}
# network, from pretrained weights, size, augmentation, balanced
DATA = {
    "cifar": ("cifar_resnet34", False, 32, "light", False),
    "cifar-plus": ("cifar_preact_resnet18", False, 32, "light", False),
    "clothing1m": ("resnet50", True, 224, "crop", True),
    "webvision": ("inception_resnet_v2", False, 227, "crop", False),
}
# decay of the average, steps of its ramp, steps of lambda's ramp, labels weighed by targets
PLUS = {
    "cifar10-sym-plus": (0.997, 40_000, 0, False),
    "cifar10-asym-plus": (0.997, 40_000, 0, False),
    "cifar100-plus": (0.997, 40_000, 40_000, True),
    "clothing1m-plus": (0.9999, 0, 0, False),
    "webvision-plus": (0.997, 0, 0, False),
}


# Side of the images and other settings that make two epochs bearable on a CPU; 8 pixels for all
# others. ELR+ on four copies of InceptionResNetV2 would write gigabytes.
TRIAL = {
    "clothing1m": (16, {"pretrained": False}),
    "clothing1m-plus": (16, {"pretrained": False}),
    "webvision": (75, {}),
    "webvision-plus": (16, {"backbone": "resnet10t"}),
}


def resolved(name: str) -> TrainConfig:
    return TrainConfig(data=Path("d"), **PRESETS[name])


def test_every_preset_is_pinned_below():
    assert PRESETS.keys() == STEPS.keys() | STARS.keys()
    assert PLUS.keys() == {name for name in PRESETS if name.endswith("-plus")}


@pytest.mark.parametrize("name", STEPS)
def test_settings_of_the_tables(name):
    config = resolved(name)
    assert config.schedule == "step"
    assert STEPS[name] == (
        config.beta,
        config.lam,
        config.epochs,
        config.milestones,
        config.step_factor,
        config.lr,
        config.weight_decay,
        config.batch_size,
    )


@pytest.mark.parametrize("name", STARS)
def test_star_is_a_cosine_from_two_hundredths_to_a_thousandth_every_ten_epochs(name):
    config = resolved(name)
    assert (config.beta, config.lam) == STARS[name]
    assert (config.schedule, config.restart_epochs, config.epochs) == ("restarts", 10, 150)
    assert config.lr == 0.02
    assert config.lr * config.min_lr == pytest.approx(0.001)
    assert (config.weight_decay, config.batch_size) == (1e-3, 128)


@pytest.mark.parametrize("name", PRESETS)
def test_network_and_images(name):
    config = resolved(name)
    data = name.split("-")[0].rstrip("01")
    key = {"cifar": "cifar-plus" if name in PLUS else "cifar", "clothing1m": "clothing1m"}
    assert DATA[key.get(data, data)] == (
        config.backbone,
        config.pretrained,
        config.image_size,
        config.augment,
        config.balanced,
    )
    assert (config.optimizer, config.warmup, config.flip) == ("sgd", 0, True)
    assert config.val_fraction == 0.1
    assert config.method == ("elr-plus" if name in PLUS else "elr")
    assert bool(config.mixup) == bool(config.ema) == (name in PLUS)


@pytest.mark.parametrize("name", PLUS)
def test_averages_and_ramps_of_elr_plus(name):
    config = resolved(name)
    assert config.mixup_alpha == 1
    assert PLUS[name] == (config.ema_decay, config.ema_ramp, config.lam_ramp, config.weigh_labels)


def test_the_table_of_the_documentation():
    text = (Path(__file__).parent.parent / "docs/training.md").read_text("utf-8")
    described = {}
    for line in text.splitlines():
        cells = [cell.strip(" `") for cell in line.strip("|").split("|")]
        if cells[0] in PRESETS:
            described[cells[0]] = cells[1:]
    assert described.keys() == PRESETS.keys()
    for name, (network, beta, lam, epochs, rate, decay, batch) in described.items():
        config = resolved(name)
        assert network.removesuffix(", pretrained").strip("`") == config.backbone
        assert network.endswith("pretrained") == config.pretrained
        numbers = (config.beta, config.lam, config.epochs, config.weight_decay, config.batch_size)
        assert tuple(map(float, (beta, lam, epochs, decay, batch))) == numbers
        lr = f"{config.lr:g}"
        if config.schedule == "step":
            places = " and ".join(f"{milestone:g}" for milestone in config.milestones)
            assert rate == f"{lr}, / {1 / config.step_factor:g} at {places}"
        else:
            assert rate == f"{lr} to {config.lr * config.min_lr:g} every 10"


def test_settings_win_over_the_preset():
    settings = with_preset("cifar100", {"lam": 1.0, "seed": 7})
    assert (settings["lam"], settings["seed"], settings["beta"]) == (1.0, 7, 0.9)
    assert PRESETS["cifar100"]["lam"] == 7


def test_without_lambda_its_ramp_is_left_out():
    assert "lam_ramp" in PRESETS["cifar100-plus"]
    assert "lam_ramp" not in with_preset("cifar100-plus", {"lam": 0.0})


def test_weights_win_over_a_start_from_scratch():
    config = TrainConfig(data=Path("d"), **with_preset("cifar10-sym", {"weights": "w.pth"}))
    assert config.pretrained
    assert config.weights == Path("w.pth")
    assert with_preset("cifar10-sym", {"weights": None})["pretrained"] is False


@pytest.mark.parametrize("name", PRESETS)
def test_what_nothing_uses_without_its_part_is_left_out(name):
    settings = {"method": "ce", "mixup": False, "ema": False}
    config = TrainConfig(data=Path("d"), **with_preset(name, settings))
    assert not any((config.averages, config.mixes, config.has_elr_term))
    assert (config.epochs, config.beta) == (PRESETS[name]["epochs"], PRESETS[name]["beta"])


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("method", ["elr", "elr-plus", "elr-halves", "ce", "gce", "sl", "sop"])
def test_every_method_can_be_had_with_every_preset(name, method):
    config = TrainConfig(data=Path("d"), **with_preset(name, {"method": method}))
    assert (config.method, config.lr) == (method, PRESETS[name]["lr"])


@pytest.mark.parametrize(
    ("value", "option"),
    [("ema_decay", "--ema-decay"), ("mixup_alpha", "--mixup-alpha"), ("lam", "--lambda")],
)
def test_what_is_given_is_never_left_out(value, option):
    settings = {"method": "ce", "mixup": False, "ema": False, value: 0.9}
    with pytest.raises(ConfigError, match=option):
        TrainConfig(data=Path("d"), **with_preset("cifar100-plus", settings))


def test_a_method_of_another_type_is_refused_with_the_other_settings():
    settings = with_preset("cifar100", {"method": 3})
    with pytest.raises(ConfigError, match="--method"):
        TrainConfig(data=Path("d"), **settings)


def test_another_schedule_leaves_out_the_values_of_the_presets():
    for name in ("cifar10-sym", "cifar10-sym-star"):
        for schedule in "cosine", "constant":
            settings = with_preset(name, {"schedule": schedule})
            assert TrainConfig(data=Path("d"), **settings).schedule == schedule
    kept = with_preset("cifar10-sym", {"schedule": "step"})
    assert kept["milestones"] == PRESETS["cifar10-sym"]["milestones"]


def test_another_optimiser_leaves_out_the_rate_of_the_presets():
    settings = with_preset("cifar10-sym", {"optimizer": "adamw"})
    config = TrainConfig(data=Path("d"), **settings)
    assert (config.lr, config.weight_decay, config.batch_size) == (None, None, 128)
    assert with_preset("cifar10-sym", {"optimizer": "adamw", "lr": 0.5})["lr"] == 0.5
    assert with_preset("cifar10-sym", {"optimizer": "sgd"})["lr"] == 0.02


def test_an_unknown_preset_is_refused_with_the_nearest():
    with pytest.raises(ConfigError) as caught:
        with_preset("cifar10-symm", {})
    assert str(caught.value) == (
        "--preset cifar10-symm: no such preset. Did you mean 'cifar10-sym'?"
    )
    with pytest.raises(ConfigError, match=r"no such preset\. Choose one of cifar10-sym, .*plus\.$"):
        with_preset("zzz", {})
    with pytest.raises(ConfigError, match=r"\. Choose one of webvision, webvision-plus\.$"):
        with_preset("webv", {})


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Callable[[int], Path]:
    """Make a folder of so many images of four classes, once."""
    folder = tmp_path_factory.mktemp("presets")

    def make(images: int) -> Path:
        if not (folder / str(images)).exists():
            classes = ("bar", "circle", "square", "triangle")
            write_shapes(folder / str(images), images // 4, classes, size=32, flip_share=0.2)
        return folder / str(images)

    return make


def trains(name: str, images: Path, out: Path) -> None:
    """Train two epochs and check that the run has the settings of the preset."""
    size, changes = TRIAL.get(name, (8, {}))
    changes = {"epochs": 2, "image_size": size, "workers": 0, "device": "cpu", **changes}
    run = elrcli.train(images, out=out, preset=name, for_audit=False, **changes)
    try:
        assert [row["epoch"] for row in run.metrics()] == [1, 2]
        config = run.train_config()
        wanted = PRESETS[name] | changes
        assert {field: getattr(config, field) for field in wanted} == wanted
        assert run.model_file.is_file()
    finally:
        shutil.rmtree(run.path)  # up to a gigabyte of weights


@pytest.mark.parametrize("name", ["cifar10-sym", "cifar100-plus", "clothing1m"])
def test_a_preset_trains(name, shapes, tmp_path):
    trains(name, shapes(24), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains_on_500_images(name, shapes, tmp_path):
    trains(name, shapes(500), tmp_path / "run")
