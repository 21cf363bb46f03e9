"""Train image classifiers on noisy labels and find the wrong labels.

The public names below are loaded on first use, so that `import elrcli` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elrcli.api import (
        apply_decisions,
        audit_labels,
        doctor,
        evaluate,
        export,
        list_backbones,
        make_noise,
        predict,
        resume,
        train,
        tune,
    )
    from elrcli.config import TrainConfig
    from elrcli.demo import run_demo
    from elrcli.engine.observer import Observer
    from elrcli.errors import (
        ConfigError,
        DataError,
        ElrError,
        Interrupted,
        ModelError,
        OutOfMemory,
        RunError,
        TrainingError,
    )
    from elrcli.methods.elr import ELRLoss
    from elrcli.run import RunFolder

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "DataError",
    "ELRLoss",
    "ElrError",
    "Interrupted",
    "ModelError",
    "Observer",
    "OutOfMemory",
    "RunError",
    "RunFolder",
    "TrainConfig",
    "TrainingError",
    "__version__",
    "apply_decisions",
    "audit_labels",
    "doctor",
    "evaluate",
    "export",
    "list_backbones",
    "make_noise",
    "predict",
    "resume",
    "run_demo",
    "train",
    "tune",
]

_HOMES = {
    "ELRLoss": "elrcli.methods.elr",
    "Observer": "elrcli.engine.observer",
    "RunFolder": "elrcli.run",
    "TrainConfig": "elrcli.config",
    "run_demo": "elrcli.demo",
    **dict.fromkeys(
        (
            "ConfigError",
            "DataError",
            "ElrError",
            "Interrupted",
            "ModelError",
            "OutOfMemory",
            "RunError",
            "TrainingError",
        ),
        "elrcli.errors",
    ),
    **dict.fromkeys(
        (
            "apply_decisions",
            "audit_labels",
            "doctor",
            "evaluate",
            "export",
            "list_backbones",
            "make_noise",
            "predict",
            "resume",
            "train",
            "tune",
        ),
        "elrcli.api",
    ),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value  # the next look-up is a plain one
    return value


def __dir__() -> list[str]:
    return __all__
