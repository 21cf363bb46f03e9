from __future__ import annotations

import csv
import io
import json
import os
import stat
from pathlib import Path

import pytest
import torch

from elrcli.config import TrainConfig
from elrcli.engine.checkpoints import write_tensors
from elrcli.errors import RunError
from elrcli.files import csv_text, json_text, write_text
from elrcli.run import RunFolder, newest_run
from tests.limits import no_file_larger_than


@pytest.fixture
def run(tmp_path) -> RunFolder:
    """A run folder by hand: two images, one class each."""
    run = RunFolder.create(tmp_path / "run")
    settings = TrainConfig(data=tmp_path / "data", seed=5).to_dict()
    config = {"elr": "0", "settings": settings, "data_root": str(tmp_path / "data")}
    write_text(run.config_file, json_text(config))
    write_text(run.classes_file, json_text({"classes": ["cat", "dog"]}))
    write_text(run.manifest_file, "path,label,split\na.png,cat,train\nb.png,dog,val\n")
    return run


def test_a_run_gives_back_what_was_written(run, tmp_path):
    run = RunFolder.open(str(run.path))
    assert run.train_config().seed == 5
    assert run.classes() == ("cat", "dog")
    manifest = run.manifest()
    assert list(manifest.paths) == ["a.png", "b.png"]
    assert manifest.labels.tolist() == [0, 1]
    assert manifest.root == tmp_path / "data"


def test_names_of_the_contract(run):
    names = [run.config_file, run.classes_file, run.manifest_file, run.metrics_file]
    names += [run.model_file, run.checkpoint_folder, run.unreadable_file, run.curves_file]
    names += [run.features_file]
    assert [path.relative_to(run.path).as_posix() for path in [*names, run.audit_folder]] == [
        "config.json",
        "classes.json",
        "manifest.csv",
        "metrics.csv",
        "model.safetensors",
        "checkpoint",
        "unreadable.csv",
        "curves.svg",
        "features.safetensors",
        "audit",
    ]


# --- create and open ---


def test_create_makes_parents(tmp_path):
    assert RunFolder.create(tmp_path / "a" / "b").path.is_dir()


def test_create_takes_an_empty_folder(tmp_path):
    assert RunFolder.create(tmp_path).path == tmp_path


def test_create_takes_what_a_process_left_that_was_killed_at_once(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").write_text("process 1 on host\n")
    (tmp_path / "run" / ".config.json.0a1b2c3d").write_text('{"elr"')
    RunFolder.create(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


def test_create_keeps_an_existing_run_without_overwrite(run):
    with pytest.raises(RunError, match=r"exists\. Add --overwrite, or choose another --out"):
        RunFolder.create(run.path)
    assert run.config_file.is_file()


def test_overwrite_removes_what_a_run_writes_and_nothing_else(run):
    run.checkpoint_folder.mkdir()
    (run.checkpoint_folder / "000001.safetensors").touch()
    run.model_file.touch()
    (run.path / "notes.txt").write_text("mine")
    (run.export_folder).mkdir()
    (run.export_folder / "model.onnx").touch()
    (run.audit_folder).mkdir()
    for name in ("audit.csv", "report.html", "decisions.csv", "corrected.csv"):
        (run.audit_folder / name).touch()
    RunFolder.create(run.path, overwrite=True)
    left = sorted(str(path.relative_to(run.path)) for path in run.path.rglob("*"))
    assert left == ["audit", "audit/corrected.csv", "audit/decisions.csv", "notes.txt"]


def test_overwrite_does_not_follow_links(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "000001.safetensors").touch()
    run.checkpoint_folder.symlink_to(tmp_path / "elsewhere")
    RunFolder.create(run.path, overwrite=True)
    assert not os.path.lexists(run.checkpoint_folder)
    assert (tmp_path / "elsewhere" / "000001.safetensors").exists()


@pytest.mark.parametrize("content", [None, "{}", "not json", '{"architectures": ["ResNet"]}'])
def test_a_folder_that_is_no_run_is_never_overwritten(tmp_path, content):
    (tmp_path / "precious.bin").touch()
    if content is not None:
        (tmp_path / "config.json").write_text(content)
        (tmp_path / "model.safetensors").touch()
    with pytest.raises(RunError, match="not empty and not a run"):
        RunFolder.create(tmp_path, overwrite=True)
    assert (tmp_path / "precious.bin").exists()
    assert (tmp_path / "model.safetensors").exists() == (content is not None)


def test_the_same_training_has_the_same_digest_however_long_it_took(tmp_path):
    run = RunFolder(tmp_path)
    found = [run.training_digest()]
    for row in ("1,0.7,2.5", "1,0.7,9", "1,0.6,9"):
        run.metrics_file.write_text(f"epoch,loss,seconds\n{row}\n")
        found.append(run.training_digest())
    assert found[1] == found[2]
    assert len(set(found)) == 3


def test_a_file_is_no_place_for_a_run(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="is a file"):
        RunFolder.create(tmp_path / "file")
    with pytest.raises(RunError, match=r"cannot be written \(Not a directory\)\. Check the path\."):
        RunFolder.create(tmp_path / "file" / "below")


def test_open_says_what_is_missing(tmp_path):
    with pytest.raises(RunError, match="no such folder"):
        RunFolder.open(tmp_path / "none")
    with pytest.raises(RunError, match=r"holds no config\.json"):
        RunFolder.open(tmp_path)


def test_newest_run(tmp_path):
    with pytest.raises(RunError, match="holds no run"):
        newest_run(tmp_path)
    for name, time in (("a", 3000), ("b", 1000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"elr": "0"}')
        os.utime(tmp_path / name / "config.json", (time, time))
    (tmp_path / "c").mkdir()  # no run
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "config.json").write_text("{}")  # of another program, and newer
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "config.json").symlink_to(tmp_path / "gone")
    assert newest_run(tmp_path) == tmp_path / "a"
    (tmp_path / "b" / "metrics.csv").touch()  # resumed later
    assert newest_run(tmp_path) == tmp_path / "b"
    (tmp_path / "c" / "run").mkdir()  # trained for an audit
    (tmp_path / "c" / "run" / "config.json").write_text('{"elr": "0"}')
    os.utime(tmp_path / "b" / "metrics.csv", (5000, 5000))
    assert newest_run(tmp_path) == tmp_path / "c" / "run"


# --- damaged and hostile content ---


@pytest.mark.parametrize(
    "settings",
    [
        None,
        [],
        {},
        {"data": 5},
        {"data": "d", "epochs": "many"},
        {"data": "d", "epochs": 10**300},
        {"data": "d", "unknown": 1},
        {"data": "d", "lr": [1]},
    ],
)
def test_bad_settings_are_a_run_error(run, settings):
    write_text(run.config_file, json_text({"settings": settings}))
    with pytest.raises(RunError, match=r"config\.json"):
        run.train_config()


@pytest.mark.parametrize("content", ["", "[]", pytest.param("[" * 100_000, id="deep"), "\udcff"])
def test_a_bad_config_file_is_a_run_error(run, content):
    write_text(run.config_file, content)
    with pytest.raises(RunError, match=r"config\.json"):
        run.config()


@pytest.mark.parametrize("classes", [None, "cat", [1, 2], {"cat": 0}])
def test_bad_classes_are_a_run_error(run, classes):
    write_text(run.classes_file, json.dumps({"classes": classes}))
    with pytest.raises(RunError, match=r"classes\.json: expected a list of names"):
        run.classes()


def test_a_missing_class_list_is_a_run_error(run):
    run.classes_file.unlink()
    with pytest.raises(RunError, match=r"classes\.json: cannot be read"):
        run.classes()


@pytest.mark.parametrize(
    "content", ["", "a,b\n", "path,label,split\na.png,bird,train\n", "path,label,split\na.png\n"]
)
def test_a_bad_manifest_is_a_run_error(run, content):
    write_text(run.manifest_file, content)
    with pytest.raises(RunError, match=r"manifest\.csv: damaged"):
        run.manifest()


def test_a_manifest_that_cannot_be_opened_is_a_run_error(run):
    run.manifest_file.unlink()
    with pytest.raises(RunError, match=r"manifest\.csv: no such file"):
        run.manifest()
    run.manifest_file.mkdir()
    with pytest.raises(RunError, match=r"manifest\.csv: cannot be read"):
        run.manifest()


def test_a_root_that_is_no_text_is_a_run_error(run):
    write_text(run.config_file, json_text({"data_root": 3}))
    with pytest.raises(RunError, match="holds no data_root"):
        run.manifest()


@pytest.mark.parametrize("content", ["epoch\none\n", "epoch\n1,2\n", "epoch\n\udcff\n"])
def test_bad_metrics_are_a_run_error(run, content):
    write_text(run.metrics_file, content)
    with pytest.raises(RunError, match=r"metrics\.csv: not a table of numbers"):
        run.metrics()


# --- metrics and text ---


def test_metrics_round_trip(run):
    assert run.metrics() == []
    rows = [{"epoch": 1, "loss": 0.5, "changed": None}, {"epoch": 2, "loss": -1.25}]
    write_text(run.metrics_file, csv_text(rows, ("epoch", "loss", "changed")))
    assert run.metrics_file.read_text() == "epoch,loss,changed\n1,0.5,\n2,-1.25,\n"
    assert run.metrics() == [
        {"epoch": 1.0, "loss": 0.5, "changed": None},
        {"epoch": 2.0, "loss": -1.25, "changed": None},
    ]


def test_csv_floats_keep_six_digits():
    assert csv_text([{"x": 1 / 3, "y": 123456789}], ("x", "y")) == "x,y\n0.333333,123456789\n"


def test_a_carriage_return_does_not_split_a_row():
    text = csv_text([{"path": "a\rb.png", "reason": "empty"}], ("path", "reason"))
    read = csv.reader(io.StringIO(text, newline=""))
    assert list(read) == [["path", "reason"], ["a\rb.png", "empty"]]


def test_names_that_are_not_utf8_survive(tmp_path):
    write_text(tmp_path / "f", "\udcff\r\n")
    assert (tmp_path / "f").read_bytes() == b"\xff\r\n"


# --- whole or not at all ---


def test_a_failed_write_leaves_the_old_content(tmp_path):
    file = tmp_path / "f.txt"
    write_text(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "new, then \ud800")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_full_disk_is_a_run_error(tmp_path, monkeypatch):
    file = tmp_path / "f.txt"
    write_text(file, "old")

    def refuse(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(RunError, match=r"f\.txt: cannot be written \(No space left"):
        write_text(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_content_is_on_the_disk_before_its_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    done = []
    flush, rename = os.fsync, Path.replace

    def fsync(handle: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{handle}")).name
        done.append("flush folder" if name == tmp_path.name else f"flush {name[:7]}")
        flush(handle)

    def replace(self: Path, target: Path) -> Path:
        done.append(f"{self.name[:7]} becomes {target.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    write_text(tmp_path / "f.txt", "new")
    assert done == ["flush .f.txt.", ".f.txt. becomes f.txt", "flush folder"]


def test_a_file_system_that_cannot_flush_folders(tmp_path, monkeypatch):
    flush = os.fsync

    def fsync(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(22, "Invalid argument")
        flush(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(tmp_path / "f.txt", "new")
    assert (tmp_path / "f.txt").read_text() == "new"


def test_a_lock_without_room_for_its_holder_is_a_run_error(run):
    message = "lock: cannot be written"
    with no_file_larger_than(0), pytest.raises(RunError, match=message), run.locked():
        pass
    with run.locked():
        assert run.lock_file.read_text().startswith(f"process {os.getpid()} on ")


def test_a_folder_that_cannot_be_made_is_a_run_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written"):
        write_text(tmp_path / "file" / "f.txt", "")


def test_the_umask_decides_who_may_read_and_is_not_touched(tmp_path, monkeypatch):
    """Two threads that ask for it by setting it may leave it at 0 for good."""
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.delattr(os, "umask")
            write_text(tmp_path / "f", "")
            write_tensors(tmp_path / "t.safetensors", {"a": torch.zeros(1)})
    finally:
        os.umask(before)
    for name in ("f", "t.safetensors"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640


def test_a_link_is_replaced_and_not_written_through(tmp_path):
    (tmp_path / "other").write_text("theirs")
    (tmp_path / "f").symlink_to(tmp_path / "other")
    write_text(tmp_path / "f", "ours")
    assert (tmp_path / "other").read_text() == "theirs"
    assert (tmp_path / "f").read_text() == "ours"
