from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from elrcli.data.images import read_image
from elrcli.engine.inference import predict_batches
from elrcli.engine.observer import Observer
from elrcli.engine.predict import Predictor, predict_images, stored_preprocessing
from elrcli.errors import ConfigError, ModelError, OutOfMemory, RunError
from elrcli.files import json_text, write_text
from elrcli.models import create_network
from elrcli.run import RunFolder
from tests.memory import memory_for


@pytest.fixture
def files(shapes) -> list[Path]:
    return sorted(shapes.rglob("*.png"))


def change(run: RunFolder, part: str, **values: object) -> None:
    config = run.config()
    config[part].update(values)
    write_text(run.config_file, json_text(config))


def test_probabilities_are_those_of_the_saved_network(shared_run, files):
    """Image -> (pixel / 255 - mean) / std -> network -> softmax, by hand."""
    network = create_network("test_resnet", 3).eval()
    network.load_state_dict(safetensors.torch.load_file(shared_run.model_file))
    stored = shared_run.config()["preprocessing"]
    pixels = torch.from_numpy(read_image(files[5], 32)).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(stored[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        expected = network((pixels - mean) / std).softmax(dim=1)[0].numpy()
    (prediction,) = predict_images(shared_run.path, [files[5]], device="cpu")
    np.testing.assert_allclose(prediction.probabilities, expected, atol=1e-5)
    assert prediction.path == str(files[5])
    assert prediction.error is None


def test_two_networks_predict_by_the_mean_of_their_logits(train, files):
    run = train(method="elr-halves", epochs=1)
    state = safetensors.torch.load_file(run.model_file)
    stored = run.config()["preprocessing"]
    pixels = torch.from_numpy(read_image(files[5], 32)).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(stored[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    logits = []
    for prefix in ("networks.0.", "networks.1."):
        network = create_network("test_resnet", 3).eval()
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        network.load_state_dict(own)
        logits.append(network((pixels - mean) / std).detach())
    assert not torch.allclose(*logits)
    expected = ((logits[0] + logits[1]) / 2).softmax(dim=1)[0].numpy()
    (prediction,) = predict_images(run.path, [files[5]], device="cpu")
    np.testing.assert_allclose(prediction.probabilities, expected, atol=1e-5)


@pytest.mark.parametrize(("batch_size", "workers"), [(64, None), (5, 0), (7, 2)])
def test_predictions_come_in_the_order_given(shared_run, files, batch_size, workers):
    order = [*reversed(files), files[3], files[3]]
    found = list(
        predict_images(shared_run.path, order, device="cpu", batch_size=batch_size, workers=workers)
    )
    assert [prediction.path for prediction in found] == [str(file) for file in order]
    np.testing.assert_array_equal(found[-1].probabilities, found[-2].probabilities)
    assert all(math.isclose(p.probabilities.sum(), 1, abs_tol=1e-5) for p in found)


def test_an_unreadable_file_keeps_its_place(shared_run, files, tmp_path):
    (tmp_path / "text.png").write_bytes(b"no image")
    order = [files[0], tmp_path / "text.png", files[1], tmp_path / "none.png"]
    found = list(predict_images(shared_run.path, order, device="cpu"))
    assert [prediction.path for prediction in found] == [str(file) for file in order]
    assert [prediction.error is None for prediction in found] == [True, False, True, False]
    assert found[1].probabilities is None


@pytest.mark.parametrize("workers", [0, 2])
def test_a_prediction_that_is_no_number_is_none(run_copy, files, tmp_path, workers):
    state = safetensors.torch.load_file(run_copy.model_file)
    state["fc.weight"][0] = math.nan
    safetensors.torch.save_file(state, run_copy.model_file)
    (tmp_path / "text.png").write_bytes(b"no image")
    order = [files[0], tmp_path / "text.png", files[1]]
    found = list(predict_images(run_copy.path, order, device="cpu", workers=workers))
    assert [prediction.path for prediction in found] == [str(file) for file in order]
    assert [prediction.probabilities for prediction in found] == [None] * 3
    assert found[0].error == found[2].error == "the prediction is not a finite number"


def test_the_others_of_a_batch_keep_their_predictions(shared_run, files, monkeypatch):
    expected = list(predict_images(shared_run.path, files[:4], device="cpu"))

    def batches(*arguments):
        for probs, batch in predict_batches(*arguments):
            spoilt = probs.clone()
            spoilt[1] = torch.nan
            yield spoilt, batch

    monkeypatch.setattr("elrcli.engine.predict.predict_batches", batches)
    found = list(predict_images(shared_run.path, files[:4], device="cpu"))
    assert [prediction.error is None for prediction in found] == [True, False, True, True]
    for place in (0, 2, 3):
        np.testing.assert_array_equal(found[place].probabilities, expected[place].probabilities)


def test_nothing_readable_and_nothing_at_all(shared_run, tmp_path):
    (prediction,) = predict_images(shared_run.path, [tmp_path / "none.png"], device="cpu")
    assert prediction.error
    assert list(predict_images(shared_run.path, [], device="cpu")) == []


@pytest.mark.parametrize(("batch_size", "workers"), [(0, 0), (-3, 0), (4, -1)])
def test_sizes_that_cannot_be_are_refused(shared_run, files, batch_size, workers):
    with pytest.raises(ConfigError, match=r"^--(batch-size|workers) -?\d: must be at least \d\.$"):
        list(predict_images(shared_run.path, files, batch_size=batch_size, workers=workers))


def test_progress_is_told(shared_run, files):
    class Watcher(Observer):
        seen: list[tuple[str, int, int | None]] = []  # noqa: RUF012

        def progress(self, stage: str, done: int, total: int | None) -> None:
            self.seen.append((stage, done, total))

    list(predict_images(shared_run.path, files[:5], device="cpu", batch_size=3, observer=Watcher()))
    assert Watcher.seen == [("predict", 3, 5), ("predict", 5, 5)]


def test_any_size_of_image_is_taken(shared_run, tmp_path):
    Image.new("L", (300, 17)).save(tmp_path / "wide.png")
    (prediction,) = predict_images(shared_run.path, [tmp_path / "wide.png"], device="cpu")
    assert prediction.probabilities.shape == (3,)


def test_bf16_predicts_nearly_the_same(shared_run, files):
    exact = predict_images(shared_run.path, files, device="cpu")
    rough = predict_images(shared_run.path, files, device="cpu", precision="bf16")
    for one, other in zip(exact, rough, strict=True):
        np.testing.assert_allclose(one.probabilities, other.probabilities, atol=0.05)


def test_small_input_is_rebuilt(train, files):
    run = train(small_input=True, epochs=1)
    (prediction,) = predict_images(run.path, files[:1], device="cpu")
    assert prediction.probabilities.shape == (3,)


# --- run folders that cannot predict ---


def test_a_run_that_has_not_finished_names_the_way_on(run_copy):
    run_copy.model_file.unlink()
    with pytest.raises(RunError, match="training has not finished") as caught:
        Predictor.load(run_copy.path)
    assert f"elr train --resume {run_copy.path}" in str(caught.value)


def test_no_run_at_all(tmp_path):
    with pytest.raises(RunError, match="no such folder"):
        Predictor.load(tmp_path / "none")


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {"image_size": 32, "mean": [0.5] * 3},
        {"image_size": "large", "mean": [0.5] * 3, "std": [0.5] * 3},
        {"image_size": 10**9, "mean": [0.5] * 3, "std": [0.5] * 3},
        {"image_size": math.inf, "mean": [0.5] * 3, "std": [0.5] * 3},
        {"image_size": 32, "mean": [0.5] * 4, "std": [0.5] * 4},
        {"image_size": 32, "mean": 0.5, "std": [0.5] * 3},
        {"image_size": 32, "mean": [0.5] * 3, "std": [0.5, 0.0, 0.5]},
        {"image_size": 32, "mean": [math.nan] * 3, "std": [0.5] * 3},
        {"image_size": 32, "mean": [0.5] * 3, "std": [0.5, math.nan, 0.5]},
        {"image_size": 32, "mean": [0.5] * 3, "std": [math.inf] * 3},
    ],
)
def test_bad_preprocessing_is_a_run_error(run_copy, value):
    config = run_copy.config()
    config["preprocessing"] = value
    run_copy.config_file.write_text(json.dumps(config))
    with pytest.raises(RunError, match=r"config\.json: holds no valid preprocessing"):
        stored_preprocessing(run_copy)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x10\0\0\0\0\0\0\0" + b"{" * 16])
def test_a_damaged_model_is_named(run_copy, content):
    run_copy.model_file.write_bytes(content)
    with pytest.raises(
        ModelError, match=r"model\.safetensors: not a readable state dict"
    ) as caught:
        Predictor.load(run_copy.path)
    remedy = f"Delete it: elr train --resume {run_copy.path} writes it anew."
    assert str(caught.value).endswith(remedy)


def test_a_model_for_other_classes_is_named(run_copy):
    write_text(run_copy.classes_file, json_text({"classes": ["a", "b"]}))
    with pytest.raises(ModelError, match=r"model\.safetensors: weights do not fit"):
        Predictor.load(run_copy.path)


def test_a_model_of_one_network_is_no_model_of_two(run_copy):
    change(run_copy, "settings", method="elr-halves")
    with pytest.raises(ModelError, match=r"model\.safetensors: weights do not fit"):
        Predictor.load(run_copy.path)


@pytest.mark.parametrize("classes", [[], ["one"]])
def test_no_classes_are_a_run_error(run_copy, classes):
    write_text(run_copy.classes_file, json_text({"classes": classes}))
    with pytest.raises((RunError, ModelError)):
        Predictor.load(run_copy.path)


@pytest.mark.parametrize("backbone", ["hf-hub:someone/model", "local-dir:/tmp", "os.system"])
def test_a_run_cannot_name_a_foreign_backbone(run_copy, backbone):
    change(run_copy, "settings", backbone=backbone)
    with pytest.raises(ModelError, match="no such backbone"):
        Predictor.load(run_copy.path)


def test_a_run_can_be_moved(shared_run, files, tmp_path):
    shutil.copytree(shared_run.path, tmp_path / "moved")
    one, other = (
        next(predict_images(path, files[:1], device="cpu"))
        for path in (shared_run.path, tmp_path / "moved")
    )
    np.testing.assert_array_equal(one.probabilities, other.probabilities)


@pytest.mark.parametrize(
    ("room", "remedy"),
    [
        (3, "Add --batch-size 2, which fits."),
        (0, "Not even a single image fits. Choose another --device."),
    ],
)
def test_out_of_memory_names_the_batch_that_fits(shared_run, files, monkeypatch, room, remedy):
    memory_for(monkeypatch, room)
    with pytest.raises(OutOfMemory) as caught:
        list(predict_images(shared_run.path, files, device="cpu", workers=0, batch_size=8))
    assert str(caught.value) == f"cpu: out of memory. {remedy}"


def test_out_of_memory_where_no_batch_size_can_be_chosen(shared_run, monkeypatch):
    memory_for(monkeypatch, 3)
    looks = Predictor.load(shared_run.path, device="cpu").looks(shared_run.manifest())
    with pytest.raises(OutOfMemory, match=r"^cpu: out of memory\. Choose another --device\.$"):
        list(looks)


def test_a_network_that_does_not_fit_is_named(shared_run, monkeypatch):
    def refuse(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(torch.nn.Module, "to", refuse)
    with pytest.raises(OutOfMemory, match=r"^cpu: out of memory\. Choose another --device\.$"):
        Predictor.load(shared_run.path, device="cpu")
