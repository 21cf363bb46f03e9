from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from elrcli.demo import DemoResult, _prepare, run_demo, write_digits
from elrcli.errors import Interrupted, RunError

RESULT = DemoResult(
    folder=Path("d"),
    report=Path("d/run-elr/audit/report.html"),
    run=Path("d/run-elr"),
    images=1437,
    planted=431,
    flagged=400,
    found=390,
    accuracy={"ce": 0.75, "elr": 0.95},
)


def test_the_story_is_told(elr, monkeypatch):
    calls = []
    monkeypatch.setattr("elrcli.demo.run_demo", lambda out, **o: calls.append((out, o)) or RESULT)
    outcome = elr("demo", "--out", "d", "--seed", 3, "--epochs", 2, "--overwrite", "--quiet")
    assert outcome.out.splitlines() == [
        "431 of 1,437 training labels were made wrong.",
        "400 labels are flagged; 390 of them are wrong: 90.5% of the errors found at 97.5% "
        "precision.",
        "",
        "trained with   accuracy on clean test labels",
        "cross-entropy                          75.0%",
        "ELR                                    95.0%",
        "",
        "report    d/run-elr/audit/report.html",
        "run       d/run-elr",
    ]
    out, options = calls[0]
    options.pop("observer")
    assert (out, options) == (Path("d"), {"seed": 3, "epochs": 2, "overwrite": True})
    assert elr("demo", "-o", "d", "-e", 2, "-q").code == 0


def test_digits_with_planted_errors(tmp_path):
    wrong = write_digits(tmp_path / "digits", tmp_path / "labels.csv", seed=0)
    assert len(wrong) == 1437
    assert sum(wrong.values()) == 431  # 30%
    train = sorted(path.relative_to(tmp_path / "digits/train").as_posix()
                   for path in (tmp_path / "digits/train").glob("*/*.png"))  # fmt: skip
    assert train == sorted(wrong)
    lines = (tmp_path / "labels.csv").read_text().splitlines()
    assert lines[0] == "path,label,true_label"
    for line in lines[1:]:
        path, label, true_label = line.split(",")
        assert path.split("/")[0] == label  # the folder is the label that was given
        assert wrong[path] == (label != true_label)
    test = Counter(path.parent.name for path in (tmp_path / "digits/test").glob("*/*.png"))
    assert sum(test.values()) == 360
    assert all(34 <= count <= 38 for count in test.values())  # stratified


def test_a_digit_is_a_picture(tmp_path):
    write_digits(tmp_path / "digits", tmp_path / "labels.csv", seed=0)
    (file,) = (tmp_path / "digits").glob("*/*/0000.png")  # the first digit is a zero
    pixels = np.asarray(Image.open(file))
    assert pixels.shape == (32, 32)
    assert pixels[14:18, 14:18].max() < 80 < 200 < pixels.max()  # dark in the middle of the ring


def test_the_seed_decides_the_flips(tmp_path):
    first = write_digits(tmp_path / "a", tmp_path / "a.csv", seed=0)
    assert write_digits(tmp_path / "b", tmp_path / "b.csv", seed=0) == first
    assert write_digits(tmp_path / "c", tmp_path / "c.csv", seed=1) != first


def test_only_an_earlier_demo_is_replaced(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(RunError, match="not empty and not a demo"):
        _prepare(tmp_path, overwrite=True)
    (tmp_path / "labels.csv").touch()
    (tmp_path / "digits").mkdir()
    with pytest.raises(RunError, match="not empty and not a demo"):
        _prepare(tmp_path, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits", "labels.csv", "mine.txt"]
    with pytest.raises(RunError, match=r"mine\.txt: is a file\. Choose another --out\.$"):
        _prepare(tmp_path / "mine.txt", overwrite=True)


def test_a_demo_that_was_interrupted_can_be_replaced(tmp_path):
    _prepare(tmp_path / "d", overwrite=False)
    (tmp_path / "d/digits/train").mkdir(parents=True)
    with pytest.raises(RunError, match="Add --overwrite"):
        _prepare(tmp_path / "d", overwrite=False)
    _prepare(tmp_path / "d", overwrite=True)
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["demo.json"]


def test_an_interrupted_demo_names_the_command_that_begins_again(tmp_path, monkeypatch):
    def stop(*arguments: object, **options: object) -> None:
        raise Interrupted(15, "elr train --resume d/run-ce")

    monkeypatch.setattr("elrcli.demo.fit", stop)
    with pytest.raises(Interrupted) as caught:
        run_demo(tmp_path / "d", seed=3, epochs=2)
    command = f"elr demo --out {tmp_path}/d --epochs 2 --seed 3 --overwrite"
    assert str(caught.value) == f"stopped by SIGTERM. Continue with: {command}"
