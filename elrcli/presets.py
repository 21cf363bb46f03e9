"""Settings of the tables of Liu et al. 2020 (ELR, arXiv:2007.00151), by name.

The name says the data, then the kind of noise where it matters, then the variant: `star` is ELR
with a cosine that restarts, `plus` is ELR+. What the paper leaves to its code is set as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elrcli.errors import ConfigError, did_you_mean

Settings = dict[str, Any]


def _steps(epochs: int, milestones: tuple[float, ...], factor: float) -> Settings:
    return {
        "epochs": epochs,
        "schedule": "step",
        "milestones": milestones,
        "step_factor": factor,
    }


_SGD: Settings = {"method": "elr", "optimizer": "sgd", "warmup": 0.0, "flip": True}
_CIFAR: Settings = _SGD | {
    "backbone": "cifar_resnet34",
    "pretrained": False,
    "image_size": 32,
    "augment": "light",
    "val_fraction": 0.1,
    "batch_size": 128,
    "lr": 0.02,
    "weight_decay": 0.001,
}
_CLOTHING1M: Settings = _SGD | {
    "backbone": "resnet50",
    "pretrained": True,
    "image_size": 224,
    "augment": "crop",
    "balanced": True,
    "batch_size": 64,
    "weight_decay": 0.001,
}
_WEBVISION: Settings = _SGD | {
    "backbone": "inception_resnet_v2",
    "pretrained": False,
    "image_size": 227,
    "augment": "crop",
    "batch_size": 32,
    "lr": 0.02,
    "weight_decay": 0.0005,
}
_SYMMETRIC: Settings = {"beta": 0.7, "lam": 3.0}
_ASYMMETRIC: Settings = {"beta": 0.9, "lam": 1.0}
_HUNDRED: Settings = {"beta": 0.9, "lam": 7.0}
_SHORT = _steps(120, (40.0, 80.0), 0.01)
_LONG = _steps(150, (80.0, 120.0), 0.01)
_STAR: Settings = {  # from .02 to .001 and back, every ten epochs
    "epochs": 150,
    "schedule": "restarts",
    "restart_epochs": 10.0,
    "min_lr": 0.05,
}
_PLUS: Settings = {
    "method": "elr-plus",
    "mixup": True,
    "mixup_alpha": 1.0,
    "ema": True,
    "ema_decay": 0.997,
}
_CIFAR_PLUS: Settings = (
    _CIFAR
    | _PLUS
    | {"backbone": "cifar_preact_resnet18", "weight_decay": 0.0005, "ema_ramp": 40_000}
)

PRESETS: Mapping[str, Settings] = {
    "cifar10-sym": _CIFAR | _SYMMETRIC | _SHORT,
    "cifar10-asym": _CIFAR | _ASYMMETRIC | _SHORT,
    "cifar100": _CIFAR | _HUNDRED | _LONG,
    "cifar10-sym-star": _CIFAR | _SYMMETRIC | _STAR,
    "cifar10-asym-star": _CIFAR | _ASYMMETRIC | _STAR,
    "cifar100-star": _CIFAR | _HUNDRED | _STAR,
    "cifar10-sym-plus": _CIFAR_PLUS | _SYMMETRIC | _steps(200, (150.0,), 0.1),
    "cifar10-asym-plus": _CIFAR_PLUS | _ASYMMETRIC | _steps(200, (150.0,), 0.1),
    "cifar100-plus": _CIFAR_PLUS
    | _HUNDRED
    | _steps(250, (200.0,), 0.1)
    | {"lam_ramp": 40_000, "weigh_labels": True},
    "clothing1m": _CLOTHING1M | _SYMMETRIC | {"lr": 0.001} | _steps(10, (5.0,), 0.01),
    "clothing1m-plus": _CLOTHING1M
    | _PLUS
    | _SYMMETRIC
    | {"lr": 0.002, "ema_decay": 0.9999}
    | _steps(15, (7.0,), 0.1),
    "webvision": _WEBVISION | _SYMMETRIC | _SHORT,
    "webvision-plus": _WEBVISION | _PLUS | _SYMMETRIC | _steps(100, (50.0,), 0.1),
}


def with_preset(name: str, settings: Mapping[str, Any]) -> Settings:
    """Return the preset of that name with `settings` on top.

    What nothing uses then is left out: where training starts with weights that are given, values
    of averages, mixup or the ELR term without that part, what a method has no place for, and those
    of another schedule or optimiser. Raises ConfigError for an unknown name.
    """
    if name not in PRESETS:
        begun = [preset for preset in PRESETS if preset.startswith(name)]
        hint = "" if begun else did_you_mean(name, list(PRESETS))
        hint = hint or f" Choose one of {', '.join(begun or PRESETS)}."
        raise ConfigError(f"--preset {name}: no such preset.{hint}")
    preset = PRESETS[name]
    both = {**preset, **settings}
    method = str(both["method"])  # a wrong one is refused with the other settings
    averages, mixing = ("ema_decay", "ema_ramp"), ("mixup_alpha", "weigh_labels")
    shape = ("milestones", "step_factor", "restart_epochs", "min_lr")
    unused: set[str] = set()
    for without, values in (
        (both.get("weights") is not None, ("pretrained",)),
        (both.get("ema") is False, averages),
        (method == "elr-halves", ("ema", *averages)),
        (both.get("mixup") is False, mixing),
        (method in ("elr-halves", "sop"), ("mixup", *mixing)),
        (not method.startswith("elr"), ("lam", "lam_ramp")),
        (both.get("lam") == 0, ("lam_ramp",)),
        (both["schedule"] != preset["schedule"], shape),
        (both["optimizer"] != preset["optimizer"], ("lr", "weight_decay")),
    ):
        if without:
            unused.update(values)
    return {key: value for key, value in both.items() if key in settings or key not in unused}
