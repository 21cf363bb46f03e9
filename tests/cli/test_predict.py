from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest

from elrcli import api
from elrcli.engine.observer import Observer
from elrcli.engine.predict import Prediction

CLASSES = ("cat", "dog", "2")
SEEN: list[dict[str, object]] = []  # what the engine was called with


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run folder whose network says dog, 0.7; files named bad* cannot be read."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "classes.json").write_text(json.dumps({"classes": CLASSES}))
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "bad.png", "pics/b.png"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()

    def predict_images(run_path, files, **options):
        SEEN.append(options)
        for done, file in enumerate(files):
            options["observer"].progress("predict", done, len(files))
            if file.name.startswith("bad"):
                yield Prediction(str(file), None, "not an image")
            else:
                yield Prediction(str(file), np.array([0.2, 0.7, 0.1], dtype=np.float32))

    monkeypatch.setattr("elrcli.engine.predict.predict_images", predict_images)
    return folder


def rows(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text)))


def test_csv_on_stdout(elr, run):
    outcome = elr("predict", run, "pics", "a.png")
    assert outcome.code == 0
    assert rows(outcome.out) == [
        ["path", "label", "confidence", "error"],
        ["pics/b.png", "dog", "0.7", ""],
        ["a.png", "dog", "0.7", ""],
    ]


def test_a_reader_that_has_enough_is_no_error(elr, run, monkeypatch):
    class Head(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Head())
    outcome = elr("predict", run, "bad.png", "a.png", "--quiet")
    assert (outcome.code, outcome.err) == (0, "")


def test_an_unreadable_image_has_a_row_and_the_code_is_1(elr, run):
    outcome = elr("predict", run, "bad.png", "a.png", "--quiet")
    assert outcome.code == 1
    assert rows(outcome.out)[1:] == [
        ["bad.png", "", "", "not an image"],
        ["a.png", "dog", "0.7", ""],
    ]
    assert (
        outcome.err
        == "error: 1 of 2 images could not be classified. The column 'error' says why.\n"
    )


def test_top_k_pairs(elr, run):
    outcome = elr("predict", run, "a.png", "--top-k", 3)
    assert rows(outcome.out) == [
        [
            "path",
            "label",
            "confidence",
            "label_2",
            "confidence_2",
            "label_3",
            "confidence_3",
            "error",
        ],
        ["a.png", "dog", "0.7", "cat", "0.2", "2", "0.1", ""],
    ]


def test_more_pairs_than_classes_are_refused(elr, run):
    outcome = elr("predict", run, "a.png", "--top-k", 4)
    assert outcome == (1, "", "error: --top-k 4: the run has 3 classes.\n")


def test_probabilities_have_a_column_per_class(elr, run):
    outcome = elr("predict", run, "a.png", "bad.png", "--probabilities", "-q")
    assert rows(outcome.out) == [
        ["path", "label", "confidence", "p_cat", "p_dog", "p_2", "error"],
        ["a.png", "dog", "0.7", "0.2", "0.7", "0.1", ""],
        ["bad.png", "", "", "", "", "", "not an image"],
    ]


def test_the_suffix_picks_the_format(elr, run):
    outcome = elr("predict", run, "a.png", "--out", "t.jsonl")
    assert outcome.out == ""
    assert outcome.err == "1 prediction in t.jsonl\n"
    assert json.loads(Path("t.jsonl").read_text()) == {
        "path": "a.png",
        "label": "dog",
        "confidence": 0.7,
        "error": None,
    }
    assert elr("predict", run, "a.png", "-o", "t.csv", "-q") == (0, "", "")
    assert Path("t.csv").read_text() == "path,label,confidence,error\na.png,dog,0.7,\n"


def test_what_is_predicted_is_never_overwritten(elr, run):
    Path("in.csv").write_text("path\na.png\n")
    outcome = elr("predict", run, "in.csv", "--out", "./in.csv")
    assert outcome.code == 1
    assert outcome.err == "error: in.csv: is what is to be predicted. Choose another --out.\n"
    assert Path("in.csv").read_text() == "path\na.png\n"


def test_a_file_is_replaced_only_when_asked_for(elr, run):
    Path("t.csv").write_text("path,label\na.png,checked by hand\n")
    outcome = elr("predict", run, "a.png", "--out", "t.csv")
    assert outcome.code == 1
    assert outcome.err == "error: t.csv: exists. Add --overwrite, or choose another --out.\n"
    assert "checked by hand" in Path("t.csv").read_text()
    assert elr("predict", run, "a.png", "--out", "t.csv", "--overwrite").code == 0
    assert Path("t.csv").read_text() == "path,label,confidence,error\na.png,dog,0.7,\n"
    assert elr("predict", run, "a.png", "--overwrite").err == (
        "error: --overwrite: needs --out FILE.\n"
    )
    outcome = elr("predict", run, "t.csv", "--out", "t.csv", "--overwrite")
    assert outcome.err == "error: t.csv: is what is to be predicted. Choose another --out.\n"


def test_unreadable_images_are_counted_apart(elr, run):
    outcome = elr("predict", run, "a.png", "pics", "bad.png", "--out", "t.csv")
    assert outcome.code == 1
    assert outcome.err.splitlines() == [
        "2 predictions and 1 unreadable image in t.csv",
        "error: 1 of 3 images could not be classified. The column 'error' says why.",
    ]


def test_options_of_a_csv_are_refused_without_one(elr, run):
    outcome = elr("predict", run, "pics", "--path-column", "file")
    message = "error: pics: no CSV file, which --path-column needs. Leave it out.\n"
    assert outcome == (1, "", message)


def test_an_unknown_suffix_is_refused_before_the_work(elr, run, monkeypatch):
    monkeypatch.setattr("elrcli.engine.predict.predict_images", None)
    outcome = elr("predict", run, "a.png", "-o", "t.xlsx")
    assert outcome.code == 1
    assert "t.xlsx: unknown kind of table" in outcome.err


def test_paths_on_stdin(elr, run):
    outcome = elr("predict", run, "-", stdin="pics/b.png\na.png\n")
    assert [row[0] for row in rows(outcome.out)] == ["path", "pics/b.png", "a.png"]


def test_a_csv_with_its_column_and_root(elr, run):
    Path("list.csv").write_text("file\nb.png\n")
    outcome = elr("predict", run, "list.csv", "--path-column", "file", "--root", "pics")
    assert [row[0] for row in rows(outcome.out)] == ["path", "b.png"]


def test_links_out_of_a_folder_are_followed_when_asked_for(elr, run):
    Path("pics/link.png").symlink_to(Path("a.png").absolute())
    outcome = elr("predict", run, "pics", "--no-follow-links")
    assert outcome.code == 1
    assert "pics: 1 links lead out of it" in outcome.err
    outcome = elr("predict", run, "pics", "--follow-links")
    assert [row[0] for row in rows(outcome.out)] == ["path", "pics/b.png", "pics/link.png"]


def test_machine_options_reach_the_engine(elr, run):
    typed = ["--device", "cpu", "--precision", "fp32", "--batch-size", "8", "--workers", "1"]
    assert elr("predict", run, "a.png", *typed).code == 0
    options = SEEN[-1]
    assert options.pop("observer") is not None
    assert options == {"device": "cpu", "precision": "fp32", "batch_size": 8, "workers": 1}


def test_nothing_found_is_one_error(elr, run):
    outcome = elr("predict", run, "none.png", "x/*.jpg")
    assert outcome.code == 1
    assert outcome.out == ""
    assert outcome.err.startswith("error: none.png: no such file, folder or pattern.")


def test_what_is_no_run_is_named(elr, tmp_path):
    outcome = elr("predict", tmp_path, "a.png")
    assert outcome.code == 1
    assert f"{tmp_path}: holds no config.json" in outcome.err


def test_the_function_gives_the_same_rows(run):
    (row,) = api.predict(str(run), "a.png", observer=Observer())
    assert row == {"path": "a.png", "label": "dog", "confidence": 0.7, "error": None}


def test_equal_probabilities_keep_class_order():
    prediction = Prediction("a", np.array([0.5, 0.5], dtype=np.float32))
    row = api.prediction_row("a", prediction, ("x", "y"), 2, False)
    assert (row["label"], row["label_2"]) == ("x", "y")
