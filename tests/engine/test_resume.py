"""Nothing lost: wherever a run is stopped, it goes on as if it had not been."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from elrcli.engine import fit as module
from elrcli.engine.checkpoints import load_checkpoint
from elrcli.engine.fit import resume
from elrcli.errors import Interrupted, RunError
from elrcli.run import RunFolder
from tests.engine.test_fit import Recorder, Stopper, assert_same


class StopsAt(Stopper):
    """Sends one signal when so many images of a stage are through; None stands for all."""

    def __init__(self, stage: str, done: int | None, number: int = signal.SIGINT) -> None:
        super().__init__(stage, number)
        self.done = done

    def progress(self, stage: str, done: int, total: int | None) -> None:
        if done == (total if self.done is None else self.done):
            super().progress(stage, done, total)


def part_of(run: Path) -> Any:
    return load_checkpoint(run / "checkpoint")["part"]


@pytest.mark.parametrize(
    ("stage", "done", "settings"),
    [
        ("epoch 1/2", 12, {}),
        ("epoch 2/2", 12, {"optimizer": "adamw", "augment": "strong"}),
        ("epoch 2/2", None, {"method": "elr-plus", "optimizer": "adamw", "ema_ramp": 7}),
        ("epoch 1/2", 12, {"method": "elr-halves", "lam_ramp": 5, "workers": 1}),
        ("epoch 2/2", 8, {"method": "sop", "ema": True, "mixup": None, "cache": "disk"}),
        ("val", None, {}),
    ],
)
def test_a_run_stopped_within_an_epoch_equals_an_uninterrupted_one(
    train, tmp_path, stage, done, settings
):
    settings = {"batch_size": 4, "mixup": True, **settings}
    if settings.get("method") == "elr-halves":
        settings["mixup"] = None
    whole = train("whole", **settings)
    with pytest.raises(Interrupted):
        train("stopped", observer=StopsAt(stage, done), **settings)
    part = part_of(tmp_path / "stopped")
    assert part["batches"]["train"] == {12: 3, 8: 2}.get(done, 6)  # batches of 4 or 3
    heard = Recorder()
    resumed = resume(tmp_path / "stopped", observer=heard)
    assert heard.notes[0].startswith("goes on in epoch ")
    assert_same(resumed, whole)


def test_gradients_of_a_step_in_progress_are_waited_for(train, tmp_path):
    settings = {"batch_size": 4, "accumulate": 4}
    whole = train("whole", **settings)
    with pytest.raises(Interrupted):
        train("stopped", observer=StopsAt("epoch 1/2", 8), **settings)
    assert part_of(tmp_path / "stopped")["batches"]["train"] == 4
    assert_same(resume(tmp_path / "stopped"), whole)


def test_checkpoints_by_the_clock(train, monkeypatch, tmp_path):
    """Wherever a run is killed: each of its checkpoints leads to the same end."""
    saved: list[Path] = []
    save = module.save_checkpoint

    def keep(folder: Path, epoch: int, state: Any, batch: int = 0) -> Path:
        path = save(folder, epoch, state, batch)
        copy = tmp_path / f"killed {len(saved)}"
        shutil.copytree(folder.parent, copy)
        saved.append(copy)
        return path

    monkeypatch.setattr(module, "save_checkpoint", keep)
    whole = train(batch_size=6, checkpoint_minutes=0.0)
    assert len(saved) == 1 + 2 * (4 + 1 + 1)  # start; batches, validation, end of two epochs
    monkeypatch.setattr(module, "save_checkpoint", save)
    assert len(list(whole.checkpoint_folder.iterdir())) == 3
    for copy in saved[1::3]:
        assert_same(resume(copy), whole)


def test_a_torn_checkpoint_is_told_and_the_one_before_is_used(train, tmp_path):
    whole = train("whole", batch_size=4)
    with pytest.raises(Interrupted):
        train("run", batch_size=4, checkpoint_minutes=0.0, observer=StopsAt("epoch 2/2", 12))
    folder = tmp_path / "run" / "checkpoint"
    newest = max(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    newest.write_bytes(newest.read_bytes()[:-5])
    heard = Recorder()
    resumed = resume(tmp_path / "run", observer=heard)
    assert heard.notes[0].startswith(f"{newest}: not a whole checkpoint")
    assert_same(resumed, whole)


def test_tables_and_leftovers_of_a_killed_process(run_copy, shared_run):
    run_copy.metrics_file.unlink()
    for name in (".metrics.csv.abcd_123", "checkpoint/.000002.safetensors.abcd0123"):
        (run_copy.path / name).touch()
    (run_copy.path / ".mine.csv").touch()
    resume(run_copy.path)
    assert_same(run_copy, shared_run)
    assert [path.name for path in run_copy.path.rglob(".*")] == [".mine.csv"]


def test_a_second_run_in_the_same_folder_is_refused(train, run_copy, tmp_path):
    end, far_end = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with run_copy.locked():
            os.write(end[1], b"locked")
            os.read(far_end[0], 1)
        os._exit(0)
    os.read(end[0], 6)
    holder = f"is being trained by process {child} on "
    with pytest.raises(RunError, match=holder):
        resume(run_copy.path)
    with pytest.raises(RunError, match=holder):
        train("copy", overwrite=True)
    os.kill(child, signal.SIGKILL)  # the lock dies with its process
    os.waitpid(child, 0)
    resume(run_copy.path)


def test_a_lock_does_not_touch_what_is_no_run(train, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.png").touch()
    with pytest.raises(RunError, match="not empty and not a run"):
        train("mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["photo.png"]


def test_a_file_system_without_locks(train, monkeypatch):
    def refuse(*arguments: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("elrcli.run.fcntl.lockf", refuse)
    assert isinstance(train(epochs=1), RunFolder)


def test_the_digest_sees_names_shapes_and_values():
    from elrcli.engine.checkpoints import _digest

    states = [
        {"a": torch.zeros(2)},
        {"b": torch.zeros(2)},
        {"a": torch.zeros(1, 2)},
        {"a": torch.zeros(2, dtype=torch.int32)},
        {"a": torch.tensor([0.0, -0.0])},
    ]
    assert len({_digest("", state) for state in states}) == len(states)
