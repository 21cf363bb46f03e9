"""Nothing lost: wherever a run is stopped, it goes on as if it had not been."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from elrcli.engine import training as module
from elrcli.engine.checkpoints import load_checkpoint
from elrcli.engine.fit import resume
from elrcli.errors import Interrupted, RunError, TrainingError
from elrcli.methods.single import SingleNetwork
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
        ("epoch 2/2", 12, {"table": "fp16", "table_device": "host"}),
        ("epoch 2/2", 12, {"method": "elr-plus", "table": "top-k"}),
        ("epoch 1/2", 12, {"method": "elr-halves", "table": "top-k", "table_device": "host"}),
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


def test_another_precision_is_said(train, monkeypatch, tmp_path):
    monkeypatch.setattr("elrcli.engine.device._best_precision", lambda device: "bf16")
    with pytest.raises(Interrupted):
        train(batch_size=4, observer=StopsAt("epoch 2/2", 12))
    monkeypatch.setattr("elrcli.engine.device._best_precision", lambda device: "fp32")
    heard = Recorder()
    resume(tmp_path / "run", observer=heard)
    assert heard.notes[0] == "begun in bf16, goes on in fp32, as cpu does"


def test_a_second_ctrl_c_leaves_at_once_without_saving(train, tmp_path):
    class Twice(StopsAt):
        def progress(self, stage: str, done: int, total: int | None) -> None:
            super().progress(stage, done, total)
            if self.has_sent:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(batch_size=4, observer=Twice("epoch 1/2", 12))
    names = [path.name for path in (tmp_path / "run" / "checkpoint").iterdir()]
    assert names == ["000000.safetensors"]
    resume(tmp_path / "run")  # the lock is free


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
    for name in (".metrics.csv.abcd0123", "checkpoint/.000002.safetensors.abcd0123"):
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
    holder = f"is in use by process {child} on "
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


# --- bad numbers ---


def bad_at(monkeypatch: pytest.MonkeyPatch, epoch: int, numbers: set[int], times: int) -> None:
    """Make the loss of some batches of an epoch NaN, the first `times` times that it is trained."""
    seed, step = module.Training._seed_step, SingleNetwork.training_step
    here = {"bad": False, "left": times}

    def seed_step(training: Any, of_epoch: int, number: int) -> torch.Generator:
        here["bad"] = of_epoch == epoch and number in numbers and here["left"] > 0
        here["left"] -= here["bad"]
        return seed(training, of_epoch, number)

    def training_step(self: SingleNetwork, *arguments: Any) -> Any:
        result = step(self, *arguments)
        return result._replace(loss=result.loss * torch.nan) if here["bad"] else result

    monkeypatch.setattr(module.Training, "_seed_step", seed_step)
    monkeypatch.setattr(SingleNetwork, "training_step", training_step)


def test_a_bad_batch_is_named_and_makes_no_step(train, tmp_path, monkeypatch):
    bad_at(monkeypatch, 1, {2}, times=1)
    seen = []
    after_step = SingleNetwork.after_step

    def keep(self: SingleNetwork) -> None:
        after_step(self)
        seen.append(torch.cat([p.detach().flatten() for p in self.network.parameters()]))

    monkeypatch.setattr(SingleNetwork, "after_step", keep)
    with pytest.raises(TrainingError) as caught:
        train(batch_size=4)
    assert re.fullmatch(
        r"the loss is no finite number in epoch 2, batch 3 \(\w+/\d+\.png, [^)]+\)\. Train"
        r" again with a lower --lr, --clip-grad 1 or --on-nan retry\. The state before the epoch is"
        r" saved\.",
        str(caught.value),
    )
    assert seen[8].equal(seen[7])  # 6 batches an epoch: this is the third step of the second
    assert not seen[9].equal(seen[8])
    state = load_checkpoint(tmp_path / "run" / "checkpoint")
    assert (state["epoch"], state["part"]) == (1, None)


def test_a_signal_in_an_epoch_that_diverges_does_not_hide_it(train, tmp_path, monkeypatch):
    bad_at(monkeypatch, 1, {1}, times=1)
    with pytest.raises(TrainingError, match="the loss is no finite number in epoch 2, batch 2"):
        train(batch_size=4, observer=StopsAt("epoch 2/2", 12))
    state = load_checkpoint(tmp_path / "run" / "checkpoint")
    assert (state["epoch"], state["part"]) == (1, None)


def test_retry_begins_the_epoch_again_with_half_the_rate(train, monkeypatch):
    heard = Recorder()
    bad_at(monkeypatch, 1, {2}, times=2)
    run = train(batch_size=4, on_nan="retry", schedule="constant", lr=0.01, observer=heard)
    assert [row["lr"] for row in run.metrics()] == [0.01, 0.0025]
    assert [note.rpartition(" ")[2] for note in heard.notes] == ["0.005", "0.0025"]
    state = load_checkpoint(run.checkpoint_folder)
    assert state["halvings"] == 2
    assert all(tensor.isfinite().all() for tensor in state["method"].values())
    assert (state["record"]["visits"][state["record"]["prediction"] >= 0] == 2).all()


def test_a_retried_run_resumes_as_it_would_have_gone_on(train, tmp_path, monkeypatch):
    settings = {"batch_size": 4, "on_nan": "retry", "checkpoint_minutes": 0.0}
    with monkeypatch.context() as patch:
        bad_at(patch, 1, {4}, times=1)
        whole = train("whole", **settings)
    with monkeypatch.context() as patch:
        bad_at(patch, 1, {4}, times=1)
        with pytest.raises(Interrupted):
            train("stopped", observer=StopsAt("epoch 2/2", 12), **settings)
    bad_at(monkeypatch, 1, {4}, times=1)
    assert_same(resume(tmp_path / "stopped"), whole)


def test_after_three_halvings_the_run_ends(train, monkeypatch):
    bad_at(monkeypatch, 0, {0}, times=9)
    with pytest.raises(
        TrainingError, match=r"even at 0\.00125\. Train again with a lower --lr, --clip-grad 1\."
    ):
        train(on_nan="retry", lr=0.01)


# --- a full disk ---


def test_a_full_disk_keeps_the_last_checkpoint(train, tmp_path, monkeypatch):
    whole = train("whole", batch_size=4)
    write = module.save_checkpoint

    def full(folder: Path, epoch: int, state: Any, batch: int = 0) -> Path:
        if epoch == 1:
            monkeypatch.setattr("os.fsync", refuse)
        return write(folder, epoch, state, batch)

    def refuse(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_checkpoint", full)
        patch.setattr("os.fsync", os.fsync)  # put back at the end
        with pytest.raises(RunError) as caught:
            train("run", batch_size=4)
    monkeypatch.undo()
    assert str(caught.value).endswith(
        "cannot be written (No space left on device). Make room there. The last checkpoint is "
        f"intact. Continue with: elr train --resume {tmp_path / 'run'}"
    )
    names = {path.name for path in (tmp_path / "run" / "checkpoint").iterdir()}
    assert names == {"000000.safetensors"}
    assert_same(resume(tmp_path / "run"), whole)
