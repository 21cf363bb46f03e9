from __future__ import annotations

import subprocess
import sys

import pytest

import elrcli

HEAVY = ("torch", "timm", "albumentations", "numpy", "PIL", "sklearn", "matplotlib", "jinja2")


def modules_after(code: str) -> set[str]:
    """Return the modules that a fresh interpreter has loaded after `code`."""
    code += "\nimport sys; print('\\nMODULES', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split("\nMODULES ")[1].split())


def test_public_names_are_pinned():
    assert elrcli.__all__ == [
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


@pytest.mark.parametrize("name", elrcli.__all__)
def test_every_public_name_exists(name):
    assert getattr(elrcli, name) is not None


def test_no_public_name_hides_a_module():
    """`elrcli.audit` must be the package, whatever was imported first."""
    code = "import importlib.util as u, elrcli\n"
    code += "print([n for n in elrcli.__all__ if u.find_spec(f'elrcli.{n}')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        elrcli.trian  # noqa: B018


def test_import_is_light():
    assert not modules_after("import elrcli; elrcli.TrainConfig").intersection(HEAVY)


def test_help_is_light():
    code = "import sys\nfrom elrcli.cli.app import main\nsys.argv = ['elr', '--help']\n"
    code += "try:\n    main()\nexcept SystemExit:\n    pass"
    assert not modules_after(code).intersection(HEAVY)


def test_a_wrong_setting_is_refused_before_torch_is_loaded():
    code = "import elrcli\ntry:\n    elrcli.train('data', epochs=0)\n"
    code += "except elrcli.ConfigError:\n    pass"
    assert not modules_after(code).intersection(HEAVY)
