"""What works on this machine. Loads nothing heavy itself: even torch may be what does not work."""

from __future__ import annotations

import dataclasses
import importlib
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import elrcli
from elrcli.errors import first_line

OK, WARNING, PROBLEM = "ok", "warning", "problem"
# What training needs, by the name of its package, each after what it needs itself.
PACKAGES = {
    "numpy": "numpy",
    "torch": "torch",
    "torchvision": "torchvision",
    "timm": "timm",
    "pillow": "PIL",
    "opencv": "cv2",
    "albumentations": "albumentations",
    "safetensors": "safetensors",
}
SHOWN = ("torch", "torchvision", "timm", "numpy", "pillow")
REMEDIES = {
    "torchvision": "Install torch and torchvision together: each fits one version of the other.",
    "opencv": "Install opencv-python-headless in the place of opencv-python.",
}


@dataclass(frozen=True)
class Check:
    """What one check found. Only a `problem` keeps a training from working."""

    name: str
    status: str  # ok, warning or problem
    finding: str
    remedy: str | None = None  # of a warning or a problem
    facts: Mapping[str, Any] = field(default_factory=dict)  # plain values; sizes in bytes

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class DoctorReport:
    """All checks, and where and in which precision a training would run."""

    checks: tuple[Check, ...]
    device: str | None = None
    precision: str | None = None  # what `auto` takes

    @property
    def can_train(self) -> bool:
        """Tell whether a training can work here."""
        return all(check.status != PROBLEM for check in self.checks)

    @property
    def has_weights(self) -> bool:
        """Tell whether there are pretrained weights, or nothing says that none can be fetched."""
        facts = {check.name: check.facts for check in self.checks}
        cache, hub = facts.get("weights cache", {}), facts.get("weights online", {})
        is_reached = not cache.get("offline", False) and hub.get("answers", True)
        return is_reached or bool(cache.get("backbones"))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        return {
            "can_train": self.can_train,
            "device": self.device,
            "precision": self.precision,
            "checks": [check.to_dict() for check in self.checks],
        }


def examine(device: str = "auto", *, online: bool = False) -> DoctorReport:
    """Try out what a training on `device` would need; only `online` contacts the network.

    Where a package does not load, nothing else is tried.
    """
    first = (program_check(), packages_check())
    if first[-1].status == PROBLEM:
        return DoctorReport(first)
    from elrcli.engine import machine

    device_check, runtime = machine.device_check(device)
    checks = [*first, device_check, *machine.gpu_checks(device, runtime)]
    if runtime is not None:
        precision = machine.precision_check(device, runtime)
        checks.append(precision)
        if runtime.device.type != "cpu":
            checks.append(machine.gpu_memory_check(runtime.device))
        if runtime.device.type == "cuda" and precision.status == OK:
            checks.append(machine.graphs_check(runtime))
    checks += [
        machine.memory_check(),
        *machine.shared_memory_checks(),
        machine.cores_check(),
        machine.compile_check(runtime),
        machine.image_check(),
        machine.weights_check(),
        *([machine.online_check()] if online else []),
        machine.extras_check(),
        machine.runs_check(),
    ]
    if runtime is None:
        return DoctorReport(tuple(checks))
    return DoctorReport(tuple(checks), str(runtime.device), runtime.precision)


def program_check() -> Check:
    """Name the program, Python and the system."""
    python, system = platform.python_version(), f"{platform.system()} {platform.machine()}"
    facts = {"elr": elrcli.__version__, "python": python, "system": system}
    return Check("elr", OK, f"{elrcli.__version__}, Python {python}, {system}", None, facts)


def packages_check() -> Check:
    """Load the packages that training needs."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # no network access on import
    versions: dict[str, str] = {}
    for name, module in PACKAGES.items():
        try:
            versions[name] = str(importlib.import_module(module).__version__)
        except Exception as error:  # a package that does not fit the others raises nearly anything
            remedy = REMEDIES.get(name, f"Install it again: pip install --force-reinstall {name}")
            problem = f"{name} does not load: {first_line(error)}"
            return Check("packages", PROBLEM, problem, remedy, versions)
    finding = ", ".join(f"{name} {versions[name]}" for name in SHOWN)
    return Check("packages", OK, finding, None, versions)
