"""An audit without a run: which run is trained, reused, continued or refused."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from elrcli.api import audit_labels
from elrcli.audit.quick import audit_config, other_settings, run_for_audit
from elrcli.config import AUDIT_SETTINGS, TrainConfig
from elrcli.engine.observer import Observer, TrainingPlan
from elrcli.errors import ConfigError, DataError, Interrupted, RunError
from elrcli.models import check_image_size, create_network
from elrcli.run import RunFolder
from tests.shapes import write_shapes

TINY = {
    "backbone": "test_resnet",
    "pretrained": False,
    "image_size": 32,
    "epochs": 2,
    "workers": 0,
    "device": "cpu",
}


class Watcher(Observer):
    """Remember what was said and which trainings began."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.plans: list[TrainingPlan] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    def training_started(self, plan: TrainingPlan) -> None:
        self.plans.append(plan)


class Stopper(Observer):
    """Send SIGINT in the second epoch."""

    def progress(self, stage: str, done: int, total: int | None) -> None:
        if stage == "epoch 2/2":
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(autouse=True)
def _quick_curves(monkeypatch) -> None:
    """Drawing takes longer than training here."""
    monkeypatch.setattr("elrcli.plots.curves_svg", lambda rows: f"{len(rows)} epochs")


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    """24 images of 3 classes, in the current folder."""
    monkeypatch.chdir(tmp_path)
    write_shapes(Path("photos"))
    return Path("photos")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with `photos` and the run made for it in `out/run`. Shared: copy it."""
    folder = tmp_path_factory.mktemp("finished")
    write_shapes(folder / "photos")
    run_for_audit(folder / "photos", TINY, folder / "out")
    return folder


@pytest.fixture
def out(finished, tmp_path) -> Path:
    """A copy of the finished `out`, which belongs to `finished / "photos"`."""
    shutil.copytree(finished / "out", tmp_path / "out")
    return tmp_path / "out"


def test_what_an_earlier_audit_says_goes_when_its_run_does(out, finished):
    for name in ("summary.json", "audit.csv", "mine.txt"):
        (out / name).write_text("{}")
    with pytest.raises(Interrupted):
        run_for_audit(finished / "photos", TINY, out, overwrite=True, observer=Stopper())
    assert sorted(path.name for path in out.iterdir()) == ["mine.txt", "run"]


# --- settings ---


def test_an_audit_has_defaults_of_its_own():
    config = audit_config(Path("photos"), {})
    assert config == TrainConfig(data=Path("photos"), **AUDIT_SETTINGS)
    assert (config.method, config.freeze) == ("elr", "none")  # all weights are fine-tuned


def test_what_is_asked_for_wins():
    config = audit_config(Path("photos"), {"epochs": 3, "lr": 0.01})
    assert (config.epochs, config.lr, config.image_size) == (3, 0.01, AUDIT_SETTINGS["image_size"])


def test_differences_are_named_with_both_values():
    made = TrainConfig(data=Path("photos"), epochs=8, lr=0.001, lam=1.0)
    wanted = made.replace(epochs=12, lr=None, lam=3.0, seed=5)
    assert other_settings(made, wanted, {"epochs"}) == "epochs 8, not 12"
    assert (
        other_settings(made, wanted, {"lam", "epochs"}) == "epochs 8, not 12, lambda 1.0, not 3.0"
    )
    assert other_settings(made, wanted, {"lr", "beta"}) == ""  # lr was left to the run


def test_a_batch_that_fits_is_no_difference():
    made = TrainConfig(data=Path("photos"), batch_size=8, accumulate=4)
    asked = {"batch_size", "accumulate"}
    assert other_settings(made, made.replace(batch_size="auto", accumulate=1), asked) == ""
    wanted = made.replace(batch_size=32, accumulate=1)
    assert other_settings(made, wanted, asked) == "accumulate 4, not 1, batch-size 8, not 32"


def test_the_defaults_are_as_described():
    page = (Path(__file__).parents[2] / "docs/auditing.md").read_text(encoding="utf-8")
    epochs, size = AUDIT_SETTINGS["epochs"], AUDIT_SETTINGS["image_size"]
    assert f"for {epochs} epochs on images of {size} pixels" in page


@pytest.mark.parametrize("backbone", ["vit_tiny_patch16_224", "resnet10t"])
def test_backbones_take_the_small_size(backbone):
    size = AUDIT_SETTINGS["image_size"]
    check_image_size(create_network(backbone, 3, image_size=size), size)


# --- run or data ---


def test_a_run_is_known_by_what_elr_wrote(tmp_path):
    assert not RunFolder(tmp_path / "missing").is_run()
    assert not RunFolder(tmp_path).is_run()
    (tmp_path / "config.json").write_text('{"model": "of another program"}')
    assert not RunFolder(tmp_path).is_run()
    (tmp_path / "config.json").write_text('{"elr": "0.1.0"}')
    assert RunFolder(tmp_path).is_run()


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(DataError, match="missing: no such file or folder"):
        audit_labels(tmp_path / "missing")


def test_a_run_takes_no_training_settings(tmp_path):
    (tmp_path / "config.json").write_text('{"elr": "0.1.0"}')
    with pytest.raises(ConfigError, match=r"trained already\. Leave out epochs, overwrite\.$"):
        audit_labels(tmp_path, epochs=3, overwrite=True)


def test_a_run_has_its_own_data(tmp_path):
    (tmp_path / "config.json").write_text('{"elr": "0.1.0"}')
    with pytest.raises(ConfigError, match=r"Leave out root, path_column, device\.$"):
        audit_labels(tmp_path, root="r", path_column="file", device="cpu")


def test_without_a_page_it_has_no_images(tmp_path):
    with pytest.raises(ConfigError, match="--report-images: there is no page with --no-report"):
        audit_labels(tmp_path, report=False, report_images=3)


def test_unknown_settings_are_named(photos):
    with pytest.raises(ConfigError, match=r"audit_labels\(\): unknown setting 'epoch'.*'epochs'"):
        audit_labels(photos, epoch=3)


def test_only_a_run_ranks_other_data(photos):
    with pytest.raises(ConfigError, match="photos: is no run"):
        audit_labels(photos, data="others")


def test_a_missing_truth_is_noticed_before_the_training(photos):
    with pytest.raises(DataError, match=r"truth\.csv: no such file"):
        audit_labels(photos, out="out", truth="truth.csv")
    assert not Path("out").exists()


def test_columns_of_the_truth_are_looked_at_before_the_training(photos):
    Path("truth.csv").write_text("path,real\n")
    with pytest.raises(DataError, match=r"no column 'true_label'.* --truth-column"):
        audit_labels(photos, out="out", truth="truth.csv")
    assert not Path("out").exists()


def test_rows_of_the_truth_are_looked_at_before_the_training(photos):
    Path("truth.csv").write_text("path,true_label\nno/such.png,circle\n")
    with pytest.raises(DataError, match=r"truth\.csv: no true label of any sample, such as"):
        audit_labels(photos, out="out", truth="truth.csv")
    assert not Path("out").exists()


def test_files_of_something_else_are_noticed_before_the_training(photos):
    Path("out").mkdir()
    Path("out/summary.json").write_text('{"mine": 1}')
    with pytest.raises(DataError, match=r"summary\.json: exists and is not of an audit"):
        audit_labels(photos, out="out")
    assert [path.name for path in Path("out").iterdir()] == ["summary.json"]


def test_an_unknown_format_is_noticed_before_the_training(photos):
    with pytest.raises(ConfigError, match=r"audit\.xlsx: unknown kind of table"):
        audit_labels(photos, out="out", format="xlsx")
    assert not Path("out").exists()


def test_the_folder_around_a_run_leads_to_it(out):
    with pytest.raises(DataError, match=r"holds an audit, no images\. Its run is \S+/out/run\.$"):
        audit_labels(out)


def test_a_validation_split_that_came_later_is_a_change_of_the_data(photos, tmp_path):
    settings = {**TINY, "val_fraction": 0.3}
    run_for_audit(photos, settings, tmp_path / "out")
    for place in ("train", "val"):
        shutil.copytree(photos, tmp_path / "split" / place)
    shutil.rmtree(photos)
    (tmp_path / "split").rename(photos)
    with pytest.raises(RunError, match=r"was trained on other data, or photos has changed"):
        run_for_audit(photos, TINY, tmp_path / "out")


def test_a_run_inside_the_images_does_not_hide_them(photos, out):
    shutil.copytree(out / "run", photos / "run")
    result = audit_labels(photos, report=False, **TINY)
    assert len(result) == len(list(photos.rglob("*.png")))


def test_overwrite_needs_out(photos):
    with pytest.raises(ConfigError, match="--overwrite: needs --out"):
        audit_labels(photos, overwrite=True)


# --- from data to an audit ---


def test_without_out_the_run_goes_to_runs(photos):
    result = audit_labels(photos, report=False, **TINY)
    run = Path(result.summary["run"])
    assert run.parent == Path("runs")
    assert run.name.startswith("photos-audit-")
    assert RunFolder(run).is_run()
    assert (run / "audit/audit.csv").is_file()
    assert len(result) == 24


def test_true_labels_in_the_data_give_figures(photos):
    rows = [f"{path.as_posix()},{path.parent.name}" for path in sorted(photos.glob("*/*"))]
    table = "".join(f"{row},{row.partition(',')[2]}\n" for row in rows)
    Path("labels.csv").write_text("file,class,real\n" + table)
    columns = {"path_column": "file", "label_column": "class"}
    options = {"out": "out", "report": False, **columns, **TINY}
    result = audit_labels("labels.csv", truth_column="real", **options)
    assert result.summary["truth"]["errors"] == 0
    with pytest.raises(RunError, match="truth-column real, not class"):
        audit_labels("labels.csv", truth_column="class", **options)


# --- the same again ---


def test_a_finished_run_is_used_again(finished, out):
    watcher = Watcher()
    before = (out / "run/model.safetensors").stat().st_mtime_ns
    run = run_for_audit(finished / "photos", TINY, out, observer=watcher)
    assert run == RunFolder(out / "run")
    assert watcher.notes == [f"{out}/run: trained before, used as it is"]
    assert watcher.plans == []
    assert (out / "run/model.safetensors").stat().st_mtime_ns == before


def test_a_finished_run_does_not_depend_on_the_machine(finished, out):
    elsewhere = {"device": "cuda", "workers": 3, "cache": "none"}
    assert run_for_audit(finished / "photos", TINY | elsewhere, out).path == out / "run"


def test_an_unfinished_run_goes_on(finished, out):
    (out / "run/model.safetensors").unlink()
    watcher = Watcher()
    run = run_for_audit(finished / "photos", TINY, out, observer=watcher)
    assert watcher.notes == [f"{out}/run: goes on from its last epoch"]
    assert watcher.plans[0].first_epoch == 2
    assert run.model_file.is_file()
    run.model_file.unlink()
    with pytest.raises(RunError, match=r"other settings \(device cpu, not cuda\)"):
        run_for_audit(finished / "photos", TINY | {"device": "cuda"}, out)


def test_what_a_kill_left_before_the_first_checkpoint_is_trained_anew(finished, out):
    for path in (out / "run/model.safetensors", *(out / "run/checkpoint").iterdir()):
        path.unlink()
    run = run_for_audit(finished / "photos", TINY, out, observer=(watcher := Watcher()))
    assert watcher.plans[0].first_epoch == 0
    assert run.model_file.is_file()


def test_other_settings_are_refused(finished, out):
    message = r"run: holds a run with other settings \(epochs 2, not 3\)\. Add --overwrite, or "
    with pytest.raises(RunError, match=message):
        run_for_audit(finished / "photos", TINY | {"epochs": 3}, out)
    not_typed = {name: TINY[name] for name in TINY if name not in AUDIT_SETTINGS}
    with pytest.raises(RunError, match=f"epochs 2, not {AUDIT_SETTINGS['epochs']}"):
        run_for_audit(finished / "photos", not_typed, out)


def test_other_data_is_refused(photos, finished, out):
    with pytest.raises(RunError, match="trained on other data, or photos has changed"):
        run_for_audit(photos, TINY, out)


def test_changed_labels_are_refused(photos):
    run_for_audit(photos, TINY, Path("out"))
    image = next(photos.glob("circle/*"))
    image.rename(photos / "square" / f"moved-{image.name}")
    with pytest.raises(RunError, match=r"photos has changed\. Add --overwrite"):
        run_for_audit(photos, TINY, Path("out"))


def test_overwrite_trains_anew(finished, out):
    watcher = Watcher()
    settings = TINY | {"epochs": 1}
    run = run_for_audit(finished / "photos", settings, out, overwrite=True, observer=watcher)
    assert watcher.plans[0].epochs == 1
    assert len(run.metrics()) == 1


def test_other_files_are_left_alone(photos):
    Path("out/run").mkdir(parents=True)
    Path("out/run/thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(RunError, match="out/run: not empty and not a run"):
            run_for_audit(photos, TINY, Path("out"), overwrite=overwrite)
    assert [path.name for path in Path("out/run").iterdir()] == ["thesis.txt"]


def test_an_interruption_says_how_to_go_on(photos):
    with pytest.raises(Interrupted) as caught:
        run_for_audit(photos, TINY, Path("my out"), observer=Stopper())
    assert caught.value.exit_code == 130
    assert str(caught.value) == (
        "stopped by SIGINT. Continue with: elr train --resume 'my out/run'"
        " && elr audit 'my out/run' --out 'my out'"
    )
    watcher = Watcher()
    run_for_audit(photos, TINY, Path("my out"), observer=watcher)
    assert watcher.plans[0].first_epoch == 1


def test_the_folder_of_the_images_is_no_place_for_an_audit(photos):
    with pytest.raises(DataError, match=r"photos: is the folder of the images\. Choose another"):
        run_for_audit(photos, TINY, photos)


def test_an_interruption_without_out_names_the_run(photos):
    with pytest.raises(Interrupted, match=r"--resume (runs/\S+) && elr audit runs/\S+$"):
        run_for_audit(photos, TINY, observer=Stopper())
