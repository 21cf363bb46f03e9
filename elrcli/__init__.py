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
    from elrcli.audit.result import AuditResult
    from elrcli.config import TrainConfig
    from elrcli.demo import run_demo
    from elrcli.engine.doctor import DoctorReport
    from elrcli.engine.evaluate import Evaluation
    from elrcli.engine.observer import Observer, TrainingPlan
    from elrcli.engine.tune import TuneResult
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
    "AuditResult",
    "ConfigError",
    "DataError",
    "DoctorReport",
    "ELRLoss",
    "ElrError",
    "Evaluation",
    "Interrupted",
    "ModelError",
    "Observer",
    "OutOfMemory",
    "RunError",
    "RunFolder",
    "TrainConfig",
    "TrainingError",
    "TrainingPlan",
    "TuneResult",
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
    "AuditResult": "elrcli.audit.result",
    "DoctorReport": "elrcli.engine.doctor",
    "ELRLoss": "elrcli.methods.elr",
    "Evaluation": "elrcli.engine.evaluate",
    "Observer": "elrcli.engine.observer",
    "RunFolder": "elrcli.run",
    "TrainConfig": "elrcli.config",
    "TrainingPlan": "elrcli.engine.observer",
    "TuneResult": "elrcli.engine.tune",
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
