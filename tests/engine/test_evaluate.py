from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from elrcli.config import Reading
from elrcli.engine.evaluate import Confidence, evaluate_run, evaluation_of
from elrcli.engine.inference import predict_batches
from elrcli.engine.predict import predict_images
from elrcli.errors import ConfigError, DataError, RunError
from tests.engine.test_fit import Recorder
from tests.shapes import write_shapes


def test_figures_by_hand():
    """Six cats (4 right, 2 called dogs), two dogs (1 right), no bird, one dog called a bird."""
    confusion = np.array([[4, 2, 0], [0, 1, 1], [0, 0, 0]])
    found = evaluation_of(confusion, ("cat", "dog", "bird"), [])
    assert found.images == 8
    assert found.accuracy == 5 / 8
    assert found.balanced_accuracy == pytest.approx((4 / 6 + 1 / 2) / 2)
    cat, dog, bird = found.per_class
    assert cat == {
        "class": "cat",
        "images": 6,
        "precision": 1.0,
        "recall": pytest.approx(2 / 3),
        "f1": pytest.approx(0.8),
    }
    assert (dog["precision"], dog["recall"]) == (pytest.approx(1 / 3), 0.5)
    assert (bird["images"], bird["precision"], bird["recall"], bird["f1"]) == (0, 0.0, None, 0.0)


def test_a_class_that_never_occurs_has_no_figures():
    (_, empty) = evaluation_of(np.array([[3, 0], [0, 0]]), ("a", "b"), []).per_class
    assert (empty["precision"], empty["recall"], empty["f1"]) == (None, None, None)


def test_confidence_against_figures_by_hand():
    probs = np.full((4, 6), 0.01)
    probs[:, 0] = 0.95, 0.95, 0.65, 0.30
    probs[3, 1:] = 0.2, 0.2, 0.2, 0.05, 0.05
    labels = np.array([0, 1, 0, 4])
    found = Confidence()
    for part in (slice(0, 1), slice(1, 4)):
        found.add(probs[part], labels[part])
    bins = abs(1 - 1.9) + abs(1 - 0.65) + abs(0 - 0.30)  # right minus sum of confidences
    assert found.calibration_error() == pytest.approx(bins / 4)
    assert found.top5_accuracy() == 1.0  # ties count
    found.add(np.array([[0.3, 0.2, 0.2, 0.1, 0.1, 0.05]]), np.array([5]))
    assert found.top5_accuracy() == 4 / 5
    sure = Confidence()
    sure.add(np.array([[1.0, 0.0]]), np.array([0]))
    assert sure.calibration_error() == 0.0


def test_to_dict_is_json_with_the_accuracy_first():
    found = evaluation_of(np.array([[1, 0], [1, 0]]), ("a", "b"), [("x.png", "broken")])
    content = json.loads(json.dumps(found.to_dict()))
    assert next(iter(content)) == "accuracy"
    assert content["confusion"] == [[1, 0], [1, 0]]
    assert content["unreadable"] == [{"path": "x.png", "reason": "broken"}]


def test_a_run_on_a_folder_agrees_with_its_predictions(shared_run, shapes):
    files = sorted(shapes.rglob("*.png"))
    predictions = list(predict_images(shared_run.path, files, device="cpu"))
    classes = shared_run.classes()
    right = [
        classes[prediction.probabilities.argmax()] == file.parent.name
        for file, prediction in zip(files, predictions, strict=True)
    ]
    found = evaluate_run(shared_run.path, shapes, device="cpu", batch_size=7)
    assert found.accuracy == pytest.approx(np.mean(right))
    sums = Confidence()
    names = [classes.index(file.parent.name) for file in files]
    sums.add(np.stack([one.probabilities for one in predictions]), np.array(names))
    assert found.calibration_error == pytest.approx(sums.calibration_error(), abs=1e-4)
    assert found.top5_accuracy is None
    assert found.images == 24
    assert found.confusion.sum(axis=1).tolist() == [8, 8, 8]


def test_a_csv_with_other_columns_and_one_split(shared_run, shapes, tmp_path):
    lines = ["file,kind,part", "circle/0000.png,circle,test", "square/0001.png,square,train"]
    (tmp_path / "l.csv").write_text("\n".join(lines))
    found = evaluate_run(
        shared_run.path,
        tmp_path / "l.csv",
        reading=Reading(shapes, "file", "kind", "part"),
        split="test",
        device="cpu",
    )
    assert found.images == 1
    assert found.confusion.sum(axis=1).tolist() == [1, 0, 0]


def test_unreadable_images_are_named_and_not_counted(shared_run, tmp_path):
    write_shapes(tmp_path / "d", per_class=2)
    (tmp_path / "d" / "circle" / "0000.png").write_bytes(b"no image")
    found = evaluate_run(shared_run.path, tmp_path / "d", device="cpu", batch_size=1)
    assert found.images == 5
    assert [path for path, _ in found.unreadable] == ["circle/0000.png"]


def test_nothing_readable_is_a_data_error(shared_run, tmp_path):
    write_shapes(tmp_path / "d", per_class=1)
    for file in (tmp_path / "d").rglob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"no image can be read\. circle/0000\.png: "):
        evaluate_run(shared_run.path, tmp_path / "d", device="cpu")


def test_predictions_that_are_no_numbers_are_no_class(run_copy, shapes, monkeypatch):
    def batches(*arguments):
        for probs, batch in predict_batches(*arguments):
            spoilt = probs.clone()
            spoilt[:share] = torch.nan
            yield spoilt, batch

    monkeypatch.setattr("elrcli.engine.predict.predict_batches", batches)
    share = 3
    found = evaluate_run(run_copy.path, shapes, device="cpu", batch_size=24)
    assert (found.images, len(found.unreadable)) == (21, 3)
    assert found.unreadable[0] == ("circle/0000.png", "the prediction is not a finite number")
    share = 24
    with pytest.raises(DataError, match=r"no image can be predicted\. circle/0000\.png: the pred"):
        evaluate_run(run_copy.path, shapes, device="cpu")


def test_a_class_that_the_run_does_not_know(shared_run, tmp_path):
    write_shapes(tmp_path / "d", per_class=1, classes=("circle", "squares"))
    with pytest.raises(DataError, match=r"unknown class 'squares'\. Did you mean 'square'\?"):
        evaluate_run(shared_run.path, tmp_path / "d", device="cpu")


def test_a_split_that_is_not_there(shared_run, shapes):
    with pytest.raises(DataError, match="has no images in the split 'val'") as caught:
        evaluate_run(shared_run.path, shapes, split="val", device="cpu")
    own = shared_run.manifest_file
    assert str(caught.value).endswith(f"is in {own}, with --root {shared_run.manifest().root}.")
    reading = Reading(shared_run.manifest().root)
    found = evaluate_run(shared_run.path, own, reading=reading, split="val", device="cpu")
    assert found.images == len(shared_run.manifest().rows("val")) > 0
    with pytest.raises(DataError, match=r"in the split 'test'\. Leave --split out"):
        evaluate_run(shared_run.path, shapes, split="test", device="cpu")
    with pytest.raises(ConfigError, match="--split dev: choose one of train, val, test"):
        evaluate_run(shared_run.path, shapes, split="dev", device="cpu")


def test_no_run(tmp_path, shapes):
    with pytest.raises(RunError, match="no such folder"):
        evaluate_run(tmp_path / "none", shapes)


def test_images_in_no_class_folder_are_named(shared_run, tmp_path):
    write_shapes(tmp_path / "data", per_class=2)
    (tmp_path / "data" / "loose.png").touch()
    heard = Recorder()
    found = evaluate_run(shared_run.path, tmp_path / "data", device="cpu", observer=heard)
    assert heard.notes == [f"{tmp_path / 'data'}: images in no class folder, left out: 1"]
    assert found.images == 6
