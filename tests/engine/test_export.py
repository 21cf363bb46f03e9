"""Exported networks are asked for predictions by other programs: onnxruntime and timm."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import timm
import timm.data
import torch
from PIL import Image

import elrcli
from elrcli.config import TrainConfig
from elrcli.data.images import read_image
from elrcli.engine.export import Classifier, _cause, export_format, export_run, largest_difference
from elrcli.engine.fit import fit
from elrcli.engine.predict import Predictor, predict_images
from elrcli.errors import ConfigError, ModelError, NotWritten, RunError
from elrcli.files import json_text, write_text
from elrcli.models import Preprocessing
from elrcli.run import RunFolder
from tests.engine.conftest import TINY


@pytest.fixture
def files(shapes) -> list[Path]:
    return sorted(shapes.rglob("*.png"))


def predicted(run: RunFolder, files: list[Path]) -> np.ndarray:
    """Return probabilities [B, K] as `elr predict` gives them."""
    found = predict_images(run.path, files, device="cpu", precision="fp32")
    return np.stack([prediction.probabilities for prediction in found])


def changed(run: RunFolder, **settings: Any) -> RunFolder:
    config = run.config()
    config["settings"].update(settings)
    write_text(run.config_file, json_text(config))
    return run


@pytest.fixture
def no_exporter(monkeypatch) -> None:
    def export(*_: object, **__: object) -> None:
        raise AssertionError("the exporter was called")

    monkeypatch.setattr("torch.onnx.export", export)


# --- ONNX ---


def ask_graph(file: Path, pixels: np.ndarray) -> np.ndarray:
    """Return what a graph says about images uint8 [B, S, S, 3]."""
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    images = pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255
    (probabilities,) = session.run(None, {"images": images})
    return np.asarray(probabilities)


def check_graph(run: RunFolder, file: Path, files: list[Path]) -> None:
    pixels = np.stack([read_image(image, 32) for image in files])
    for count in (1, 2, 7, len(files)):
        np.testing.assert_allclose(
            ask_graph(file, pixels[:count]), predicted(run, files[:count]), atol=1e-5
        )


def test_two_networks_are_one_graph_that_predicts_as_elr_does(
    shapes, files, tmp_path, capfd, monkeypatch
):
    """The one real export among the quick tests: it takes many seconds, whatever the network."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    settings = TINY | {"method": "elr-halves", "epochs": 1}
    run = fit(TrainConfig(data=shapes, **settings), tmp_path / "run")
    capfd.readouterr()
    file = export_run(run.path)
    assert file == run.path / "export" / "model.onnx"
    assert [path.name for path in file.parent.iterdir()] == ["model.onnx"]
    assert capfd.readouterr() == ("", "")
    check_graph(run, file, files)

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (images,), (probabilities,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(float)", ["N", 3, 32, 32])
    assert (probabilities.name, probabilities.shape) == ("probabilities", ["N", 3])
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["classes"]) == ["circle", "square", "triangle"]
    assert json.loads(facts["preprocessing"])["image_size"] == 32
    assert facts["backbone"] == "test_resnet"
    assert facts["elr"] == elrcli.__version__

    # The graph is compared with the network that it came from: another one is told apart.
    predictor = Predictor.load(run.path, device="cpu")
    same = Classifier(predictor.network, predictor.preprocessing)
    assert largest_difference(file, same, 32) < 1e-5
    other = Preprocessing(32, (9.0, 9.0, 9.0), predictor.preprocessing.std)
    assert largest_difference(file, Classifier(predictor.network, other), 32) > 1e-3

    # What differs is not written, and what was there stays.
    before = file.read_bytes()
    monkeypatch.setattr("torch.onnx.export", lambda *_, **__: Copy(before))
    monkeypatch.setattr("elrcli.engine.export.largest_difference", lambda *_: float("nan"))
    with pytest.raises(ModelError, match=r"other probabilities than the network, by up to nan\."):
        export_run(run.path, overwrite=True)
    assert [path.name for path in file.parent.iterdir()] == ["model.onnx"]
    assert file.read_bytes() == before


class Copy:
    """What the exporter returns, as far as it is used: here with the bytes of another export."""

    def __init__(self, content: bytes) -> None:
        self.model = self
        self.metadata_props: dict[str, str] = {}
        self._content = content

    def save(self, path: Path) -> None:
        path.write_bytes(self._content)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"small_input": True, "ema": True},
        {"backbone": "test_vit", "image_size": 64},
        {"backbone": "cifar_preact_resnet18"},
    ],
    ids=["small-input", "vit", "own network"],
)
def test_graphs_of_other_networks(train, files, tmp_path, settings):
    run = train(epochs=1, **settings)
    file = export_run(run.path, tmp_path / "m.onnx")
    size = run.config()["preprocessing"]["image_size"]
    pixels = np.stack([read_image(image, size) for image in files])
    np.testing.assert_allclose(ask_graph(file, pixels), predicted(run, files), atol=1e-4)


def test_pixels_become_probabilities():
    """Both networks are the identity: softmax((x - mean) / std) of one pixel, by hand."""
    classifier = Classifier(torch.nn.Flatten(), Preprocessing(1, (0.5, 0.5, 0.0), (0.5, 0.25, 1.0)))
    found = classifier(torch.tensor([1.0, 0.5, 0.0]).view(1, 3, 1, 1))
    expected = torch.tensor([[1.0, 0.0, 0.0]]).softmax(dim=1)
    torch.testing.assert_close(found, expected)


def test_a_network_that_the_exporter_refuses_is_named(shared_run, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")

    def refuse(*_: object, **__: object) -> None:
        try:
            raise ValueError("no such operation\nand much more")
        except ValueError as error:
            raise RuntimeError("step 2 of 3") from error

    monkeypatch.setattr("torch.onnx.export", refuse)
    with pytest.raises(ModelError) as caught:
        export_run(shared_run.path, tmp_path / "m.onnx")
    assert str(caught.value) == (
        "test_resnet: cannot be exported to ONNX (no such operation). Use --format safetensors."
    )
    assert list(tmp_path.iterdir()) == []


def test_the_cause_of_an_error_without_words_is_its_kind():
    assert _cause(KeyError()) == "KeyError"


@pytest.mark.usefixtures("no_exporter")
def test_weights_beyond_two_gigabytes_are_refused(shared_run, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.setattr("elrcli.engine.export.LARGEST_ONNX", 1000)
    with pytest.raises(ModelError, match=r"GB of weights, and an ONNX file holds 2\. Use --format"):
        export_run(shared_run.path, tmp_path / "m.onnx")


@pytest.mark.usefixtures("no_exporter")
@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_without_a_package_the_extra_is_named(shared_run, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=r"Install it: pip install 'elr\[onnx\]'"):
        export_run(shared_run.path, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


# --- weights for timm ---


def test_timm_loads_the_weights_as_they_are(shared_run, files, tmp_path):
    file = export_run(shared_run.path, tmp_path / "photos.safetensors")
    by_path = timm.create_model("test_resnet", num_classes=3, checkpoint_path=str(file))
    by_state = timm.create_model("test_resnet", num_classes=3)
    by_state.load_state_dict(safetensors.torch.load_file(file))
    own = safetensors.torch.load_file(shared_run.model_file)
    for network in (by_path, by_state):
        assert network.state_dict().keys() == own.keys()
        assert all(torch.equal(network.state_dict()[name], own[name]) for name in own)


def check_folder(run: RunFolder, folder: Path, files: list[Path]) -> timm.data:
    """Compare `elr predict` with timm's network, weights and preparation of images."""
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    images = torch.stack([prepare(Image.open(file).convert("RGB")) for file in files])
    with torch.no_grad():
        found = network(images).softmax(dim=1).numpy()
    np.testing.assert_allclose(found, predicted(run, files), atol=1e-5)
    return network


def test_a_folder_is_all_that_timm_needs(shared_run, files, tmp_path):
    """Network, weights, classes and preparation of images: 32 pixels are not resized."""
    export_run(shared_run.path, tmp_path / "model.safetensors")
    network = check_folder(shared_run, tmp_path, files)
    assert network.pretrained_cfg["label_names"] == ["circle", "square", "triangle"]


def test_a_network_of_fixed_size_is_built_at_that_of_the_run(train, shapes, tmp_path):
    run = train(backbone="test_vit", image_size=64, epochs=1)
    image = tmp_path / "a.png"
    Image.effect_noise((64, 64), 90).convert("RGB").save(image)
    file = export_run(run.path, format="safetensors")
    assert file == run.path / "export" / "model.safetensors"
    assert json.loads((file.parent / "config.json").read_text())["model_args"] == {"img_size": 64}
    check_folder(run, file.parent, [image])


def test_weights_of_the_average_are_those_that_predict(train, files, tmp_path):
    run = train(ema=True, ema_decay=0.5)
    export_run(run.path, tmp_path / "model.safetensors")
    check_folder(run, tmp_path, files)


def test_the_weights_say_what_they_are(shared_run, tmp_path):
    file = export_run(shared_run.path, tmp_path / "m.safetensors")
    with safetensors.safe_open(file, framework="pt") as opened:
        facts = opened.metadata()
    stored = shared_run.config()["preprocessing"]
    assert facts["format"] == "pt"
    assert json.loads(facts["classes"]) == list(shared_run.classes())
    assert json.loads(facts["preprocessing"])["mean"] == list(stored["mean"])
    assert json.loads(facts["preprocessing"])["std"] == list(stored["std"])


def test_a_tag_of_pretrained_weights_is_no_part_of_the_architecture(run_copy, tmp_path):
    run = changed(run_copy, backbone="test_resnet.r160_in1k")
    export_run(run.path, tmp_path / "m.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "test_resnet"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"method": "elr-plus"}, "elr-plus trains two networks"),
        ({"method": "elr-halves"}, "elr-halves trains two networks"),
        ({"small_input": True}, "--small-input has changed the first layer"),
        ({"backbone": "cifar_resnet34"}, "cifar_resnet34 is a network of elr"),
    ],
)
def test_what_timm_cannot_load_is_refused(run_copy, tmp_path, settings, reason):
    run = changed(run_copy, **settings)
    with pytest.raises(ModelError) as caught:
        export_run(run.path, tmp_path / "m.safetensors")
    assert str(caught.value) == (
        f"{run.path}: {reason}, which timm cannot load. Use --format onnx."
    )
    assert not (tmp_path / "m.safetensors").exists()


# --- places ---


@pytest.mark.parametrize(
    ("out", "format", "expected"),
    [
        (None, None, "onnx"),
        (None, "safetensors", "safetensors"),
        ("a.safetensors", None, "safetensors"),
        ("A.ONNX", None, "onnx"),
        ("a.onnx", "onnx", "onnx"),
    ],
)
def test_the_format(out, format, expected):
    assert export_format(None if out is None else Path(out), format) == expected


@pytest.mark.parametrize(
    ("out", "format", "problem"),
    [
        ("a.pt", None, r"a\.pt: unknown kind of export\. End the name in \.onnx or \.safetensors"),
        ("a", None, "a: unknown kind of export"),
        ("a.onnx", "safetensors", r"needs a name that ends in \.safetensors"),
        ("a.pt", "onnx", r"--format onnx needs a name that ends in \.onnx"),
        (None, "tflite", "--format tflite: choose one of onnx, safetensors"),
    ],
)
def test_a_format_that_cannot_be_is_refused(out, format, problem):
    with pytest.raises(ConfigError, match=problem):
        export_format(None if out is None else Path(out), format)


@pytest.mark.usefixtures("no_exporter")
@pytest.mark.parametrize("name", ["m.onnx", "m.safetensors"])
def test_a_file_in_the_way_stays(shared_run, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(RunError, match=rf"{name}: exists\. Add --overwrite, or choose another"):
        export_run(shared_run.path, tmp_path / name)
    assert (tmp_path / name).read_text() == "mine"
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(RunError, match=rf"{name}: is a folder\. Choose another --out"):
        export_run(shared_run.path, tmp_path / name, overwrite=True)


def test_an_earlier_export_is_replaced_when_asked_for(shared_run, tmp_path):
    file = export_run(shared_run.path, tmp_path / "m.safetensors")
    own = safetensors.torch.load_file(shared_run.model_file)
    file.write_text("torn")
    export_run(shared_run.path, file, overwrite=True)
    assert safetensors.torch.load_file(file).keys() == own.keys()
    file.unlink()
    with pytest.raises(RunError, match=r"config\.json: exists\. Add --overwrite"):
        export_run(shared_run.path, file)


@pytest.mark.parametrize("is_new", [True, False])
def test_weights_that_cannot_be_written_leave_no_half(shared_run, tmp_path, monkeypatch, is_new):
    file, config = tmp_path / "m.safetensors", tmp_path / "config.json"
    if not is_new:
        export_run(shared_run.path, file)

    def refuse(*_: object) -> None:
        raise NotWritten(f"{file}: cannot be written (no space).")

    monkeypatch.setattr("elrcli.engine.export.write_tensors", refuse)
    with pytest.raises(NotWritten):
        export_run(shared_run.path, file, overwrite=True)
    assert file.exists() == config.exists() == (not is_new)


@pytest.mark.parametrize("content", ['{"model_type": "bert"}', "not json"])
def test_settings_of_something_else_are_never_replaced(shared_run, tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(RunError, match=r"config\.json: belongs to something else\. Choose another"):
        export_run(shared_run.path, tmp_path / "m.safetensors", overwrite=True)
    assert (tmp_path / "config.json").read_text() == content
    assert not (tmp_path / "m.safetensors").exists()


def test_a_run_is_never_replaced_by_its_export(run_copy):
    before = run_copy.config_file.read_bytes(), run_copy.model_file.read_bytes()
    with pytest.raises(RunError, match="belongs to something else"):
        export_run(run_copy.path, run_copy.model_file, overwrite=True)
    assert (run_copy.config_file.read_bytes(), run_copy.model_file.read_bytes()) == before


def test_a_run_without_a_model_is_refused(run_copy, tmp_path):
    run_copy.model_file.unlink()
    with pytest.raises(RunError, match=r"training has not finished\. Continue with: elr train"):
        export_run(run_copy.path, tmp_path / "m.safetensors")
    with pytest.raises(RunError, match=r"holds no config\.json"):
        export_run(tmp_path, tmp_path / "m.safetensors")


def test_overwriting_a_run_removes_its_exports(run_copy):
    export_run(run_copy.path, format="safetensors")
    RunFolder.create(run_copy.path, overwrite=True)
    assert not run_copy.export_folder.exists()
