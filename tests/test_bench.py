"""The study of the paper's tables, on a few generated images and a tiny network."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from elrcli.config import TrainConfig
from elrcli.presets import PRESETS, with_preset
from tests.shapes import write_shapes

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def paper(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    import paper

    return paper


@pytest.fixture
def study(paper, monkeypatch, capsys, tmp_path) -> Callable[..., str]:
    """Call the script on 60 training and 20 test images; returns what it prints."""
    for split, per_class, seed in (("train", 6, 0), ("test", 2, 1)):
        classes = tuple(paper.sets.CIFAR_CLASSES)
        write_shapes(tmp_path / "cifar" / split, per_class, classes, size=8, seed=seed)
    tiny = {"backbone": "test_resnet", "image_size": 8}
    for name in ("cifar10-sym", "cifar10-sym-plus"):
        monkeypatch.setitem(PRESETS, name, PRESETS[name] | tiny)

    def call(*words: object) -> str:
        common = ("--images", tmp_path / "cifar", "--out", tmp_path / "out", "--workers", 0)
        arguments = ["paper.py", *common, "--device", "cpu", "--epochs", 2, *words]
        monkeypatch.setattr(sys, "argv", [str(word) for word in arguments])
        paper.main()
        return capsys.readouterr().out

    return call


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_cell_has_settings(paper):
    for data, method in paper.PUBLISHED:
        for noise in paper.PUBLISHED[data, method]:
            cell = paper.Cell(data, noise, method, 0)
            config = TrainConfig(data=Path("d"), **with_preset(cell.preset, cell.changes))
            own = {"ce": "ce", "preact-ce": "ce", "plus": "elr-plus"}
            assert config.method == own.get(method, "elr")
            lam = 1 if noise.startswith("asym") else 3
            if config.has_elr_term:
                assert config.lam == (7 if data == "cifar100" else lam)
            assert config.has_elr_term == (method not in own or own[method] != "ce")
            assert (config.backbone == "cifar_resnet34") == (method in ("ce", "elr", "star"))
            assert not (method == "preact-ce" and (config.mixup or config.ema))


def test_published_figures(paper):
    assert paper.PUBLISHED["cifar10", "ce"]["sym40"] == 81.88
    assert paper.PUBLISHED["cifar10", "star"]["asym40"] == 90.35
    assert paper.PUBLISHED["cifar100", "elr"]["sym80"] == 29.78
    assert paper.PUBLISHED["cifar10", "plus"]["sym90"] == 75.2
    assert paper.PUBLISHED["cifar10n", "plus"]["worst"] == 91.09
    assert sum(len(figures) for figures in paper.PUBLISHED.values()) == 6 * 8 + 2 * 5 + 3 * 3


def test_asymmetric_noise_of_hundred_classes_stays_in_groups_of_five(paper, tmp_path):
    class Clean:
        labels = np.arange(100)
        classes = tuple(str(label) for label in range(100))
        num_classes = 100

    cell = paper.Cell("cifar100", "asym100", "elr", 0)
    given = paper.noisy_labels(cell, Clean, np.arange(100), None, np.random.default_rng(0))
    assert given[:7] == ["1", "2", "3", "4", "0", "6", "7"]
    assert given[99] == "95"


def test_a_cell_stops_with_the_budget_and_goes_on(study, tmp_path):
    cells = ("--cells", "cifar10-sym40-elr")
    out = study(*cells, "--budget-minutes", 1e-3)
    assert "1/2" in out
    assert "2/2" not in out
    assert "| cifar10 | sym40 | ELR | to be measured |  | 89.15 |  |  |" in out
    result = tmp_path / "out/cifar10-sym40-elr-seed0-epochs2.json"
    assert not result.exists()
    out = study(*cells)
    assert "1/2" not in out
    assert "2/2" in out
    cell = json.loads(result.read_text())
    assert [point["epoch"] for point in cell["curve"]] == [1, 2]
    assert cell["accuracy_last"] == cell["curve"][-1]["accuracy"]
    assert cell["accuracy_best"] == max(point["accuracy"] for point in cell["curve"])
    assert cell["settings"]["batch_size"] == 128
    assert f"| ELR | {100 * cell['accuracy_last']:.2f} |" in out
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".csv"}
    assert "2/2" not in study(*cells)  # it is there already
    full = study("--cells", "cifar10-sym40-*", "--table", "--epochs", 3)
    assert full.count("to be measured") == 3  # two epochs do not pass for three


def test_labels_are_noisy_in_train_and_clean_in_test(study, tmp_path):
    study("--cells", "cifar10-sym80-elr", "--limit", 40)
    lines = rows(tmp_path / "out/cifar10-sym80-elr-seed0-limit40-epochs2.csv")
    train = [line for line in lines if line["split"] == "train"]
    test = [line for line in lines if line["split"] == "val"]
    # A tenth of 40 is left out, in whole images a class: 3 of 4.
    assert (len(train), len(test)) == (30, 20)
    assert len({line["path"] for line in lines}) == 50
    assert all(line["label"] == line["true_label"] for line in test)
    wrong = sum(line["label"] != line["true_label"] for line in train)
    assert wrong == pytest.approx(0.72 * 30, abs=6)
    assert all(line["path"].split("/")[1] == line["true_label"] for line in train)


def test_human_labels_come_from_their_column(study, tmp_path):
    names = [path.relative_to(tmp_path / "cifar") for path in (tmp_path / "cifar/train").rglob("*")]
    paths = [name.as_posix() for name in names if name.suffix]
    text = "path,aggre\n" + "".join(f"{path},cat\n" for path in paths[1:])
    (tmp_path / "human.csv").write_text(text)
    command = ("--cells", "cifar10n-aggre-plus", "--labels", tmp_path / "human.csv")
    with pytest.raises(SystemExit, match=r"human\.csv: has no aggre label for 1 images\."):
        study(*command)
    (tmp_path / "human.csv").write_text(text + f"{paths[0]},cat\n")
    assert "| cifar10n | aggre | ELR+ |" in study(*command)
    cell = json.loads((tmp_path / "out/cifar10n-aggre-plus-seed0-epochs2.json").read_text())
    assert (cell["images"], cell["wrong"]) == (60, 54)  # none is left out
    with pytest.raises(SystemExit, match="needs --labels"):
        study("--cells", "cifar10n-rand1-ce")


def test_other_data_is_refused(study):
    with pytest.raises(SystemExit, match=r"10 classes\. cifar100-sym20-ce needs 100"):
        study("--cells", "cifar100-*")
    with pytest.raises(SystemExit, match="2"):
        study("--limit", "x")
