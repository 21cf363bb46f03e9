"""The network of a finished run for other programs: an ONNX graph, or weights for timm."""

from __future__ import annotations

import importlib
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import elrcli
from elrcli.config import TrainConfig
from elrcli.engine.checkpoints import write_tensors
from elrcli.engine.predict import Predictor
from elrcli.errors import ConfigError, ModelError, RunError, first_line
from elrcli.files import atomic_path, json_text, read_json_object, write_text
from elrcli.models import (
    Preprocessing,
    is_from_timm,
    members,
    plain_attention,
    timm_config,
)
from elrcli.run import RunFolder

FORMATS = ("onnx", "safetensors")
PACKAGES = ("onnx", "onnxruntime", "onnxscript")  # the extra `onnx`
LARGEST_ONNX = (1 << 31) - (1 << 20)  # bytes of weights; protobuf ends at 2 GiB
TOLERANCE = 1e-3  # of a probability, between the graph and the network
CHECKED_BATCHES = (1, 3)  # images at once; the graph is traced with 2


def export_run(
    run_path: Path, out: Path | None = None, *, format: str | None = None, overwrite: bool = False
) -> Path:
    """Write the network of a run in another form and return the file.

    Without `format` the suffix of `out` picks it; without both it is onnx. Beside weights for
    timm a `config.json` is written. Raises RunError where a file is in the way.
    """
    run = RunFolder.open(run_path)
    kind = export_format(out, format)
    file = out if out is not None else run.export_folder / f"model.{kind}"
    config = run.train_config()
    _check_free(file, overwrite)
    if kind == "onnx":
        check_packages()
    else:
        _check_config_free(file.parent / "config.json", overwrite)
        problem = _not_for_timm(config)
        if problem is not None:
            raise ModelError(f"{run_path}: {problem}, which timm cannot load. Use --format onnx.")
    predictor = Predictor.load(run_path, device="cpu", precision="fp32")
    if kind == "onnx":
        remedy = "Train another --backbone" if _not_for_timm(config) else "Use --format safetensors"
        _write_onnx(predictor, config.backbone, file, remedy)
    else:
        _write_for_timm(predictor, config.backbone, file)
    return file


def export_format(out: Path | None, format: str | None) -> str:
    """Return the format: as named, by the suffix, or onnx."""
    suffix = None if out is None else out.suffix.lower().removeprefix(".")
    if format is None and suffix is not None and suffix not in FORMATS:
        raise ConfigError(f"{out}: unknown kind of export. End the name in .onnx or .safetensors.")
    kind = format or suffix or "onnx"
    if kind not in FORMATS:
        raise ConfigError(f"--format {kind}: choose one of {', '.join(FORMATS)}.")
    if suffix is not None and suffix != kind:
        raise ConfigError(f"{out}: --format {kind} needs a name that ends in .{kind}.")
    return kind


def _not_for_timm(config: TrainConfig) -> str | None:
    """Return what makes a run more than one plain timm network."""
    if config.networks > 1:
        return f"{config.method} trains two networks"
    if config.small_input:
        return "--small-input has changed the first layer"
    if not is_from_timm(config.backbone):
        return f"{config.backbone} is a network of elr"
    return None


def _check_free(file: Path, overwrite: bool) -> None:
    if file.is_dir():
        raise RunError(f"{file}: is a folder. Choose another --out.")
    if file.exists() and not overwrite:
        raise RunError(f"{file}: exists. Add --overwrite, or choose another --out.")


def _check_config_free(file: Path, overwrite: bool) -> None:
    """Raise RunError where a `config.json` is not one of an export that may be replaced."""
    _check_free(file, overwrite)
    if file.exists():
        try:
            is_export = "pretrained_cfg" in read_json_object(file)
        except ConfigError:
            is_export = False
        if not is_export:
            raise RunError(f"{file}: belongs to something else. Choose another folder for --out.")


def check_packages() -> None:
    """Raise ConfigError where a package of the extra `onnx` is missing."""
    try:
        for name in PACKAGES:
            importlib.import_module(name)
    except ImportError:
        raise ConfigError(
            "--format onnx: a package is missing. Install it: pip install 'elr[onnx]'"
        ) from None


def _facts(predictor: Predictor, backbone: str) -> dict[str, str]:
    """Return what somebody needs to use the network, as texts."""
    prepared = predictor.preprocessing
    preprocessing = {
        "image_size": prepared.image_size,
        "channels": "RGB",
        "resize": "short side to image_size, bilinear",
        "crop": "centre",
        "mean": prepared.mean,
        "std": prepared.std,
    }
    return {
        "elr": elrcli.__version__,
        "backbone": backbone,
        "classes": json.dumps(predictor.classes),
        "preprocessing": json.dumps(preprocessing),
    }


# --- weights for timm ---


def _write_for_timm(predictor: Predictor, backbone: str, file: Path) -> None:
    """Write the weights, and beside them the `config.json` that timm and its hub expect."""
    network = predictor.network
    config = timm_config(backbone, predictor.classes, predictor.preprocessing)
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    description = file.parent / "config.json"
    is_new = not description.exists()
    write_text(description, json_text(config))
    try:
        write_tensors(file, tensors, {"format": "pt"} | _facts(predictor, backbone))
    except BaseException:  # Ctrl-C, too: the same command must be possible again
        if is_new:
            description.unlink()
        raise


# --- ONNX ---


class Classifier(nn.Module):
    """From pixels to probabilities: normalisation, network and softmax."""

    mean: Tensor  # [1, 3, 1, 1]
    std: Tensor

    def __init__(self, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        for name in ("mean", "std"):
            values = torch.tensor(getattr(preprocessing, name)).view(1, 3, 1, 1)
            self.register_buffer(name, values)

    def forward(self, images: Tensor) -> Tensor:
        """Return probabilities [B, K] of images [B, 3, S, S] with RGB values in 0..1."""
        probabilities: Tensor = self.network((images - self.mean) / self.std).softmax(dim=1)
        return probabilities


def _write_onnx(predictor: Predictor, backbone: str, file: Path, remedy: str) -> None:
    """Write the graph of all networks of a run, after it was compared with them."""
    size = predictor.preprocessing.image_size
    classifier = Classifier(predictor.network, predictor.preprocessing).eval()
    weights = sum(t.numel() * t.element_size() for t in classifier.state_dict().values())
    if weights > LARGEST_ONNX:
        raise ModelError(
            f"{backbone}: {weights / 1e9:.1f} GB of weights, and an ONNX file holds 2. {remedy}."
        )
    for part in members(predictor.network):
        plain_attention(part)
    try:
        program = _traced(classifier, size)
    except Exception as error:  # the exporter raises many unrelated kinds
        raise ModelError(
            f"{backbone}: cannot be exported to ONNX ({_cause(error)}). {remedy}."
        ) from None
    program.model.metadata_props.update(_facts(predictor, backbone))
    with atomic_path(file) as temporary:
        with _silent():
            program.save(temporary)
        difference = largest_difference(temporary, classifier, size)
        if not difference <= TOLERANCE:  # nor where it is no number
            raise ModelError(
                f"{backbone}: the ONNX graph gives other probabilities than the network, by up to"
                f" {difference:.2g}. {remedy}."
            )


def _traced(classifier: nn.Module, size: int) -> Any:
    with _silent():
        return torch.onnx.export(
            classifier,
            (torch.zeros(2, 3, size, size),),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("N")},),
            input_names=["images"],
            output_names=["probabilities"],
            external_data=False,
            verbose=False,
        )


@torch.no_grad()
def largest_difference(file: Path, classifier: nn.Module, size: int) -> float:
    """Return how far the probabilities of graph and network are apart on images of noise."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    random_numbers = np.random.default_rng(0)
    differences = []
    for count in CHECKED_BATCHES:
        images = random_numbers.random((count, 3, size, size), dtype=np.float32)
        (found,) = session.run(["probabilities"], {"images": images})
        expected = classifier(torch.from_numpy(images)).numpy()
        differences.append(np.abs(found - expected).max())
    return float(np.max(differences))


@contextmanager
def _silent() -> Iterator[None]:
    """Keep warnings and log lines of the exporter from the user: none of them can be mended."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _cause(error: BaseException) -> str:
    """Return the first line of the error that all others came from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)
