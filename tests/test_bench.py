"""The scripts of `bench/`: how they are called, and what they print, on a few generated images."""

from __future__ import annotations

import csv
import importlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import safetensors.torch
import timm

from elrcli.config import TrainConfig
from elrcli.presets import PRESETS, with_preset
from tests.shapes import write_shapes

BENCH = Path(__file__).parent.parent / "bench"
RESULTS = BENCH / "results"
DOCS = BENCH.parent / "docs"
IMPORTED = ("cells", "faults", "sets")  # by scripts; they are none themselves
SCRIPTS = sorted({path.stem for path in BENCH.glob("*.py")}.difference(IMPORTED))


@pytest.fixture
def bench(monkeypatch) -> Callable[[str], ModuleType]:
    """Import a script by its name."""
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module


@pytest.fixture
def call(bench, monkeypatch, capsys) -> Callable[..., str]:
    """Call a script in this process; returns what it prints."""

    def run(name: str, *words: object) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        bench(name).main()
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_says_how_it_is_called(call, capsys, name):
    with pytest.raises(SystemExit) as ended:
        call(name, "--help")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {name}.py [-h]")


@pytest.mark.parametrize(
    ("name", "folder", "own"),  # first columns that the docs leave out or name otherwise
    [
        ("audit_quality", "audit_quality", 0),
        ("audit_quality", "audit_quality_digits", 3),
        ("cifar10n", "cifar10n", 0),
        ("defaults", "defaults", 0),
        ("heads", "heads", 0),
        ("methods", "methods", 1),
        ("small", "small", 1),
        ("tune", "tune", 0),
    ],
)
def test_the_docs_have_the_tables_of_the_results(call, name, folder, own):
    docs = plain((DOCS / "benchmarks.md").read_text(encoding="utf-8"))
    found = table_rows(call(name, "--out", RESULTS / folder, "--table"))
    assert len(found) > 3
    for row in found:
        assert row.split(" | ", own)[-1] in docs


@pytest.mark.parametrize(("name", "own"), [("chaos", 1), ("long_run", 2)])
def test_the_docs_have_the_tables_of_kills_and_of_memory(bench, capsys, name, own):
    results = {path.stem: json.loads(path.read_text()) for path in (RESULTS / name).iterdir()}
    bench(name).print_table(results.get(name, results))
    found = table_rows(capsys.readouterr().out)
    assert len(found) > 1
    for row in found:
        assert row.split(" | ", own)[-1] in (DOCS / "reliability.md").read_text(encoding="utf-8")


def test_the_docs_have_the_sums_of_other_results(bench, call, capsys):
    benchmarks, threats = (
        (DOCS / f"{name}.md").read_text(encoding="utf-8") for name in ("benchmarks", "threats")
    )
    found = table_rows(call("paper", "--out", RESULTS / "paper", "--table"))
    measured = [row.split(" | ")[1:5] for row in found if "to be measured" not in row]
    assert measured
    for cells in measured:
        assert " | ".join(cells) in benchmarks
    quick = json.loads(call("quick_audit", "--out", RESULTS / "quick_audit", "--table"))
    assert f"{quick['seconds']} seconds" in benchmarks
    bench("fuzz").print_table(json.loads((RESULTS / "fuzz" / "seed-0.json").read_text()))
    _, *sums = capsys.readouterr().out.splitlines()[-1].split()
    assert f"| all | {' | '.join(f'{int(number):,}' for number in sums[:3])} |" in threats


def test_the_study_of_the_audit_keeps_what_its_peers_rank_by(bench, call, monkeypatch, tmp_path):
    audit_quality, sets = bench("audit_quality"), bench("sets")
    made = sets.shapes(tmp_path / "set.csv", "sym20", 8, 3, tests=0)
    tiny = {"backbone": "test_resnet", "pretrained": False, "image_size": 32}
    monkeypatch.setattr(audit_quality, "make_set", lambda *_: made)
    monkeypatch.setattr(audit_quality, "network", lambda *_: tiny)
    monkeypatch.setattr("elrcli.plots.curves_svg", lambda rows: "")  # takes longer than training
    options = ("--kinds", "ce", "--epochs", 1, "--workers", 0, "--out", tmp_path)
    out = call("audit_quality", "--noise", "sym20", "--seeds", 0, *options)
    assert "| sym20 | AUM, of the trained 90% | 1 | " in out
    kept = np.load(tmp_path / "sym20-0-ce.npz")
    assert kept["last"].sum(axis=1) == pytest.approx(np.ones(24), abs=1e-5)


SMALLEST = {  # options that make a script short, and what it prints then
    "audit_quality": (
        "{cifar} --images 100 --epochs 1 --noise sym20 --seeds 0 --workers 0 --out {out}",
        "| sym20 | cleanlab, 5 folds | 1 |",
    ),
    "chaos": ("--kills 1 --out {out} --work {out}/work", "; 0 differences\n"),
    "cifar10n": (
        "{cifar} --images 50 --epochs 1 --noise rand1 --out {out}",
        "| rand1 | ce |",
    ),
    "defaults": (
        "{cifar} --sets cifar-rand1-50,shapes3-sym20-60 --epochs 1 --out {out}"
        """ --settings "adamw 1e-3;sgd .02, timm's head" """,
        "shapes3-sym20-60 sgd .02, timm's head {'accuracy': ",
    ),
    "end_to_end": (
        "--backbones test_resnet --files 500x375 --rounds 1 --out {out}",
        '"backbone": "test_resnet"',
    ),
    "fuzz": ("--cases 12 --out {out}", "\nall             24"),
    "heads": (
        "{cifar} --pool 200 --images 100 --image-size 32 --epochs 1 --seeds 0 --out {out}",
        "| sym40 | cleanlab |",
    ),
    "kept_memory": (
        "--backbones test_resnet --size 32 --calls 2 --rounds 1 --out {out}",
        '"peak memory": ',
    ),
    "loader": ("--sizes 32 --rounds 1 --out {out}", '"cached / elr": '),
    "long_run": ("--epochs 11 --cells workers --out {out}", "| workers | 11 |"),
    "manifest": ("--rows 20000 --epochs 2 --csv", '"worker_private_mb_by_epoch": ['),
    "memorisation": ("--epochs 1 --out {out}/figure.svg", "| ELR | "),
    "methods": (
        "{cifar} --images 50 --tests 20 --networks pretrained --noise sym20 --methods elr"
        " --out {out}",
        "| sym20 | ",
    ),
    "mutation": ("--only elr --most 2 --out {out}", "methods/elr "),
    "pictures": ("--epochs 1 --folder {out}/demo --out {out}", "\nterminal.svg"),
    "quick_audit": ("{cifar} --images 50 --out {out}", '"images": 50,'),
    "scale": ("--samples 2000 --classes 20 --features --folder {out}/run", '"samples": 2000,'),
    "scan": ("--files 2000", "scan of 2,000 files: "),
    "step": (
        "--classes 10 --network test_resnet --image-size 32 --rounds 1 --out {out}",
        '"loss: elr / cross-entropy": ',
    ),
    "table": ("loss --per-class 4 --epochs 1 --seeds 0 --kept 4 --out {out}", '"top-4": {'),
    "throughput": (
        "--images 100 --backbone test_resnet --image-size 32 --batch-size 16 --epochs 2"
        " --workers 0 --out {out}",
        '"first_epoch / limit": ',
    ),
    "two_gaussians": ("--out {out}/figure.svg", "| Cross-entropy | "),
}
OTHERS = ("offline_weights", "paper", "small", "tune")  # the first needs a package of its own


@pytest.fixture(scope="session")
def cifar(tmp_path_factory) -> str:
    """Options for drawn shapes in the place of CIFAR-10 and random weights of EfficientNet.

    Four of twenty human labels of each class are those of the next class.
    """
    five = ("airplane", "automobile", "bird", "cat", "deer")
    classes = (*five, "dog", "frog", "horse", "ship", "truck")
    folder = tmp_path_factory.mktemp("cifar")
    write_shapes(folder / "test", 2, classes, seed=1)
    truth = write_shapes(folder / "train", 20, classes)
    lines = ["path,true_label,aggre,rand1"]
    for number, (path, name) in enumerate(truth.items()):
        human = classes[(number + (number < 40)) % len(classes)]
        lines.append(f"train/{path},{name},{human},{human}")
    (folder / "labels.csv").write_text("\n".join(lines))
    weights = timm.create_model("tf_efficientnet_lite0").state_dict()
    safetensors.torch.save_file(weights, folder / "weights.safetensors")
    return f"--cifar {folder} --labels {folder}/labels.csv --weights {folder}/weights.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_every_script_runs(cifar, tmp_path, name):
    options, printed = SMALLEST[name]
    words = shlex.split(options.format(cifar=cifar, out=tmp_path))
    command = [sys.executable, BENCH / f"{name}.py", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert printed in done.stdout


def test_no_script_is_left_out():
    assert sorted([*SMALLEST, *OTHERS]) == SCRIPTS


@pytest.mark.slow
def test_the_count_of_small_folders(bench, call, monkeypatch, tmp_path):
    small = bench("small")
    monkeypatch.setattr(small, "SETS", {"digits3": (3, 60, 1), "shapes6": (6, 60, 1)})
    monkeypatch.setattr(small, "RATES", (20,))
    out = call("small", "--out", tmp_path)
    assert "| digits3 sym20 | 60 | " in out
    assert "\nThe interval held in " in out
    assert call("small", "--out", tmp_path, "--table") in out


@pytest.mark.slow
def test_the_search_on_a_grid_of_two(bench, call, monkeypatch, tmp_path):
    tune = bench("tune")
    monkeypatch.setitem(tune.GRID, "lambdas", (1.0, 3.0))
    monkeypatch.setitem(tune.GRID, "betas", (0.7,))
    monkeypatch.setitem(tune.GRID, "lrs", (0.001,))
    monkeypatch.setitem(tune.SHAPES, "shapes8", (3, 20))
    monkeypatch.setitem(tune.TRAINING, "epochs", 4)
    call("tune", "--sets", "shapes8-asym25", "--out", tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    assert "| shapes8-asym25 | 1 | lambda " in call("tune", "--out", tmp_path, "--table")
    call("tune", "--sets", "shapes8-asym25", "--seeds", "2", "--out", tmp_path)
    assert len(list(tmp_path.iterdir())) == 5
    assert "| shapes8-asym25 | 2 | lambda " in call("tune", "--out", tmp_path, "--table")


def table_rows(text: str) -> list[str]:
    """Return the rows of Markdown tables without their heads, plain."""
    bodies = re.sub(r"^.*\n\| ?-.*\n", "", text, flags=re.MULTILINE)
    return [line for line in plain(bodies).splitlines() if line.startswith("| ")]


def plain(text: str) -> str:
    """Return text without bold letters and without ranges of percentages."""
    return re.sub(r" \([\d.]+% to [\d.]+%\)|\*\*", "", text)


@pytest.fixture
def paper(bench) -> ModuleType:
    return bench("paper")


@pytest.fixture
def study(paper, call, monkeypatch, tmp_path) -> Callable[..., str]:
    """Call the script on 60 training and 20 test images; returns what it prints."""
    for split, per_class, seed in (("train", 6, 0), ("test", 2, 1)):
        classes = tuple(paper.sets.CIFAR_CLASSES)
        write_shapes(tmp_path / "cifar" / split, per_class, classes, size=8, seed=seed)
    tiny = {"backbone": "test_resnet", "image_size": 8}
    for name in ("cifar10-sym", "cifar10-sym-plus"):
        monkeypatch.setitem(PRESETS, name, PRESETS[name] | tiny)

    common = ("--images", tmp_path / "cifar", "--out", tmp_path / "out", "--workers", 0)
    return partial(call, "paper", *common, "--device", "cpu", "--epochs", 2)


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
