from __future__ import annotations

import csv
import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed import DistBackendError, HashStore, PrefixStore

from elrcli.audit.quick import run_for_audit
from elrcli.audit.run import audit_run
from elrcli.config import TrainConfig
from elrcli.data.manifest import load_data
from elrcli.data.shares import deal_rows
from elrcli.engine import distributed
from elrcli.engine import fit as fit_module
from elrcli.engine import training as training_module
from elrcli.engine.checkpoints import load_checkpoint
from elrcli.engine.distributed import (
    GradientMean,
    Group,
    current_group,
    joined,
    names_per_sample,
    what_nccl_says,
)
from elrcli.engine.evaluate import evaluate_run
from elrcli.engine.features import Features
from elrcli.engine.fit import fit, resume
from elrcli.engine.launch import Launch, launch
from elrcli.engine.observer import Observer
from elrcli.engine.predict import Predictor, predict_images
from elrcli.engine.training import Training
from elrcli.engine.tune import tune
from elrcli.errors import ConfigError, EndedByAnother, ModelError, TrainingError
from elrcli.run import RunFolder
from tests.engine.conftest import TINY
from tests.memory import memory_for
from tests.shapes import write_shapes
from tests.together import Failure, together

ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# No BatchNorm and no chance: two processes must compute what one does.
EXACT = {"backbone": "test_convnext", "augment": "none", "val_fraction": 0.2, "lr": 0.1}
TIMING = ("images_per_second", "wait_share", "seconds")


@pytest.fixture
def photos(tmp_path) -> Path:
    """23 images: two processes cannot share them equally."""
    folder = tmp_path / "photos"
    write_shapes(folder)
    next(folder.rglob("*.png")).unlink()
    return folder


def train(data: Path, out: Path, *, observer: Observer | None = None, **settings: Any) -> RunFolder:
    return fit(TrainConfig(**{"data": data, **TINY, **settings}), out, observer=observer)


def trained_by(processes: int, data: Path, out: Path, **settings: Any) -> RunFolder:
    results = together(lambda rank: train(data, out, **settings).path, processes)
    assert results == [out] * processes
    return RunFolder(out)


def state_of(run: RunFolder) -> dict[str, Any]:
    return load_checkpoint(run.checkpoint_folder)


def assert_same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], rtol=1e-3, atol=1e-4, equal_nan=True, msg=name
        )


# Groups


def test_torchrun_says_who_is_who(monkeypatch):
    assert launch() == Launch(0, 1, 0, 1)
    for name, value in zip(ENVIRONMENT, "5812", strict=True):
        monkeypatch.setenv(name, value)
    assert launch() == Launch(rank=5, processes=8, local_rank=1, local_processes=2)
    monkeypatch.setenv("LOCAL_RANK", "")
    assert launch() == Launch(0, 1, 0, 1)


def test_a_process_alone_sends_nothing():
    group = Group()
    with joined():
        assert current_group() == group
    values = torch.tensor([1.0, 2.0])
    group.average([values])
    group.copy_from_first([values])
    assert group.sum(values).tolist() == [1, 2]
    assert group.gather("a") == ["a"]
    assert group.from_first(lambda: "b") == "b"
    assert group.whole(values, np.zeros(2)).equal(values)
    assert list(group.in_turn(iter("ab"))) == [["a"], ["b"]]


def test_processes_tell_each_other():
    def work(rank: int) -> Any:
        with joined():
            group = current_group()
            with joined():  # stays with them
                assert current_group() == group
            values = torch.tensor([rank, 10.0 * rank])
            group.average([values])
            start = torch.full((2, 2), float(rank)).t()
            group.copy_from_first([start])
            owner = np.array([0, 1, 1, 0, 1])
            part = torch.arange(5)[owner == rank].half()[:, None]
            return (
                values.tolist(),
                start.sum().item(),
                group.sum(torch.tensor([rank + 1])).tolist(),
                group.gather(rank),
                group.from_first(lambda: f"of {rank}"),
                group.whole(part, owner)[:, 0].tolist(),
                list(group.in_turn(iter([rank, rank + 2]))),
            )

    common = ([0.5, 5.0], 0.0, [3.0], [0, 1], "of 0")
    assert together(work) == [
        (*common, [0, 1, 2, 3, 4], [[0, 1], [2, 3]]),
        (*common, [1, 2, 4], [[0, 1], [2, 3]]),
    ]


def test_processes_meet_more_than_once():
    def work(rank: int) -> list[int]:
        found = []
        for _ in range(2):
            with joined():
                found += current_group().gather(rank)
        return found

    assert together(work) == [[0, 1, 0, 1]] * 2


def test_processes_that_cannot_meet_say_so(monkeypatch):
    for name, value in zip(ENVIRONMENT, "0202", strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with (
        pytest.raises(TrainingError, match=r"cannot meet \(.*Start them with torchrun\.$"),
        joined(),
    ):
        pass


def test_a_process_that_comes_when_another_has_failed_does_not_blame_the_network(monkeypatch):
    def refuse(*arguments: object, **options: object) -> None:
        raise RuntimeError("Connection closed by peer")

    for name, value in zip(ENVIRONMENT, "0202", strict=True):
        monkeypatch.setenv(name, value)
    found = HashStore()
    module = sys.modules["torch.distributed.rendezvous"]  # the package has a function of that name
    monkeypatch.setattr(module, "rendezvous", lambda *_, **__: iter([(found, 0, 2)]))
    monkeypatch.setattr("torch.distributed.init_process_group", refuse)
    monkeypatch.setattr("elrcli.engine.distributed._meetings", iter([7, 7]))
    PrefixStore("elr/7", found).add("failed", 1)
    with pytest.raises(EndedByAnother), joined():
        pass
    found.delete_key("elr/7/failed")
    with pytest.raises(TrainingError, match="cannot meet"), joined():
        pass


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda:1", "--device cuda:1: several processes need one each. Use cuda or cpu."),
        ("mps", "--device mps: several processes need one each. Use cuda or cpu."),
    ],
)
def test_a_device_for_all_is_refused(name, message, photos, tmp_path):
    failures = together(lambda rank: train(photos, tmp_path / "run", device=name))
    assert sorted(failure.kind for failure in failures) == ["EndedByAnother", "ModelError"]
    assert any(failure.message.startswith(message) for failure in failures)


# Gradients


class _Learner:
    """Each network learns from as many images as it is told."""

    def __init__(self, *images: int) -> None:
        self.images = images

    def images_per_network(self, index: Tensor) -> Tensor:
        return torch.tensor(self.images)


def _network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(torch.float32)


@pytest.mark.parametrize("bucket", [1, 25 * 1024**2])
def test_the_gradient_is_that_of_all_images(bucket, monkeypatch):
    monkeypatch.setattr(distributed, "BUCKET", bucket)
    images = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    whole = _network(0)
    whole(images).square().sum(dim=1).mean().backward()
    parts = images[:4], images[4:]

    def work(rank: int) -> list[Tensor]:
        network = _network(0)
        with joined():
            mean = GradientMean(current_group(), [network])
            for _ in range(2):  # the second step begins anew
                mean.expect(_Learner(99), torch.empty(0), is_last=False)
                network(parts[0]).sum().backward()
                network.zero_grad()
                mean.forget()  # that step was given up
                mean.expect(_Learner(len(parts[rank])), torch.empty(0), is_last=True)
                network(parts[rank]).square().sum(dim=1).mean().backward()
                mean.finish()
        return [parameter.grad.numpy() for parameter in network.parameters()]

    for gradients in together(work):
        for gradient, parameter in zip(gradients, whole.parameters(), strict=True):
            torch.testing.assert_close(torch.from_numpy(gradient), parameter.grad)


def test_a_network_that_saw_nothing_counts_for_nothing():
    """Process 0 trains both networks on 1 and 2 images, process 1 the second on 6, then nothing."""

    def work(rank: int) -> list[list[float]]:
        first, second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        found = []
        with joined():
            mean = GradientMean(current_group(), [first, second])
            for learners in (((1, 2), (0, 6)), ((1, 1), None)):
                first.zero_grad()
                second.zero_grad()
                own = learners[rank]
                if own is not None:
                    mean.expect(_Learner(*own), torch.empty(0), is_last=True)
                    x = torch.full((1, 1), rank + 1.0)
                    trained = [first, second] if own[0] > 0 else [second]
                    sum(part(x).sum() for part in trained).backward()
                mean.finish()
                found.append([first.weight.grad.item(), second.weight.grad.item()])
        return found

    assert together(work) == [[[1.0, (2 * 1 + 6 * 2) / 8], [1.0, 1.0]]] * 2


# Training


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "ce", "optimizer": "adamw", "lr": 0.01, "clip_grad": 1.0},
        {"ema": True, "lam_ramp": 2},
        {"method": "elr-plus", "mixup": False},
        {"method": "elr-halves"},
        {"method": "sl"},
        {"table": "fp16"},
        {"table": "top-k", "table_device": "host"},
    ],
    ids=lambda settings: settings.get("method", settings.get("table", "elr")),
)
def test_two_processes_compute_what_one_does(photos, tmp_path, settings):
    """With one step per epoch the batches are the same."""
    settings = {**EXACT, "epochs": 3, "batch_size": 32, **settings}
    one = train(photos, tmp_path / "one", **settings)
    two = trained_by(2, photos, tmp_path / "two", **settings)
    assert state_of(two)["processes"] == 2
    for part in ("method", "record"):
        assert_same_tensors(state_of(two)[part], state_of(one)[part])
    assert_same_tensors(load_file(two.model_file), load_file(one.model_file))
    features = [Features.load(run.features_file, 23).vectors for run in (one, two)]
    np.testing.assert_allclose(*features, atol=2e-3)
    for row, expected in zip(two.metrics(), one.metrics(), strict=True):
        for name in row.keys() - TIMING:
            assert row[name] == pytest.approx(expected[name], abs=1e-3), name


def test_every_image_is_seen_once_in_every_epoch(photos, tmp_path):
    run = trained_by(2, photos, tmp_path / "run", val_fraction=0.2, batch_size=4)
    record = state_of(run)["record"]
    assert record["visits"].tolist() == [2] * 23
    targets = state_of(run)["method"]["loss.targets"]
    torch.testing.assert_close(targets.sum(dim=1), torch.full((23,), 0.51))  # 1 - 0.7 ** 2
    assert not record["given_prob"].isnan().any()


@pytest.mark.parametrize("method", ["elr", "elr-plus", "elr-halves"])
def test_processes_agree_on_all_but_their_samples(photos, tmp_path, monkeypatch, method):
    """Weights, averages, BatchNorm's statistics and the optimiser's state.

    Not BatchNorm's count of batches, which nothing uses: a half may miss in those of a process.
    """
    alike: list[bool] = []
    save = Training.save

    def compare(training: Training, **options: bool) -> None:
        learner = training.learner
        own = names_per_sample(learner.method)
        state = learner.method.state_dict()
        tensors = {
            name: state[name].numpy()
            for name in state.keys() - own
            if not name.endswith("num_batches_tracked")
        }
        moments = [
            entry["momentum_buffer"].numpy() for entry in training.learner.optimizer.state.values()
        ]
        first, second = training.group.gather((tensors, moments))
        assert any(name.endswith("running_var") for name in tensors)
        alike.append(all((first[0][name] == second[0][name]).all() for name in tensors))
        alike.append(all(map(np.array_equal, first[1], second[1])))
        save(training, **options)

    def work(rank: int) -> list[bool]:
        monkeypatch.setattr(Training, "save", compare)
        train(photos, tmp_path / "run", method=method, batch_size=4)
        return alike

    assert together(work) == [[True] * 6] * 2


def test_other_settings_train_together(photos, tmp_path):
    settings = {"accumulate": 2, "mixup": True, "ema": True, "precision": "bf16", "method": "sop"}
    for changed in (settings | {"method": "elr"}, settings | {"mixup": False}, {"workers": 1}):
        name = f"run-{changed.get('method')}"
        run = trained_by(2, photos, tmp_path / name, batch_size=4, **changed)
        assert state_of(run)["record"]["visits"].max() == 2


def test_three_processes_share_few_images(photos, tmp_path):
    """Some batches are of one image and some of none."""
    run = trained_by(3, photos, tmp_path / "run", batch_size=1, epochs=1)
    assert state_of(run)["record"]["visits"].tolist() == [1] * 23


def test_unreadable_images_of_all_are_named(photos, tmp_path):
    damaged = sorted(photos.rglob("*.png"))[:9]
    for path in damaged:
        path.write_bytes(b"no image")
    run = trained_by(2, photos, tmp_path / "run", batch_size=2, max_unreadable=1.0)
    with run.unreadable_file.open() as file:
        named = [row["path"] for row in csv.DictReader(file)]
    assert named == [path.relative_to(photos).as_posix() for path in damaged]
    assert sorted(state_of(run)["record"]["visits"].tolist()) == [0] * 9 + [2] * 14


def test_unreadable_images_are_counted_over_all_processes(photos, tmp_path):
    manifest = load_data(photos)
    owner = deal_rows(manifest.labels, manifest.splits, 2, 0)
    for rank in range(2):  # for each process alone, one is never too many
        manifest.file(int(np.flatnonzero(owner == rank)[0])).write_bytes(b"no image")
    out = tmp_path / "run"
    results = together(lambda rank: train(photos, out, val_fraction=0.0), 2)
    assert {failure.kind for failure in results} == {"DataError", "EndedByAnother"}
    problem = next(failure.message for failure in results if failure.kind == "DataError")
    assert "2 or more of 23 training images cannot be read; --max-unreadable is 0.05." in problem
    assert len(RunFolder(out).unreadable_file.read_text().splitlines()) == 3


def test_the_first_process_alone_writes_and_is_watched(photos, tmp_path):
    """The plan tells of all; the automatic batch size leaves steps for several processes."""

    class Plans(Observer):
        def training_started(self, plan):
            self.plan = plan

    def work(rank: int) -> Any:
        if rank > 0:
            for name in ("save_checkpoint", "write_text", "write_tensors"):
                setattr(training_module, name, None)  # calling one would fail
            fit_module.write_text = None
        observer = Plans()
        train(photos, tmp_path / "run", batch_size=None, observer=observer)
        return observer.plan.processes, observer.plan.batch_size, observer.plan.batches

    assert together(work) == [(2, 16, 1)] * 2


def test_processes_agree_on_the_batch_that_fits(photos, tmp_path):
    settings = {"epochs": 1, "ema": True, "optimizer": "adamw"}

    def work(rank: int) -> tuple[Any, int]:
        with pytest.MonkeyPatch.context() as patch:
            memory_for(patch, (8, 4)[rank])
            run = train(photos, tmp_path / "chosen", batch_size="auto", **settings)
        return run.train_config().batch_size, run.train_config().accumulate

    assert together(work) == [(4, 4)] * 2  # both would take 16
    by_hand = trained_by(2, photos, tmp_path / "hand", batch_size=4, accumulate=4, **settings)
    one, other = state_of(RunFolder(tmp_path / "chosen")), state_of(by_hand)
    for part in ("method", "record"):
        for name, tensor in other[part].items():
            torch.testing.assert_close(one[part][name], tensor, rtol=0, atol=0, equal_nan=True)


def test_a_process_without_room_for_one_image_ends_all(photos, tmp_path):
    def work(rank: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            memory_for(patch, (8, 0)[rank])
            train(photos, tmp_path / "run", batch_size="auto")

    results = together(work)
    assert sorted(failure.kind for failure in results) == ["EndedByAnother", "OutOfMemory"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_resume_with_another_number_of_processes(photos, tmp_path, before, after):
    out = tmp_path / "run"
    settings = {**EXACT, "batch_size": 32, "epochs": 3, "method": "elr-halves"}
    notes: list[str] = []

    class Stopper(Observer):
        def epoch_finished(self, metrics):
            if os.environ.get("RANK", "0") == "0":
                os.kill(os.getpid(), signal.SIGTERM)

    class Notes(Observer):
        def note(self, message):
            notes.append(message)

    def begin(rank: int) -> None:
        train(photos, out, observer=Stopper(), **settings)

    def go_on(rank: int) -> list[str]:
        resume(out, observer=Notes())
        return notes

    stopped = together(begin, before)
    assert sorted(failure.kind for failure in stopped)[-1] == "Interrupted"
    assert {failure.exit_code for failure in stopped} == {143}
    assert len(RunFolder(out).metrics()) < 3
    said = together(go_on, after)[0]
    assert said[-1] == (
        f"begun by {before} processes, goes on with {after}: {32 * after} images per step instead "
        f"of {32 * before}"
    )
    passed_over = f"saved within an epoch by {before} processes. 000001.safetensors is used instead"
    assert [passed_over in line for line in said] == ([True, False] if before == 2 else [False])
    whole = train(photos, tmp_path / "whole", **settings)
    for part in ("method", "record"):
        assert_same_tensors(state_of(RunFolder(out))[part], state_of(whole)[part])


def test_an_interrupted_run_of_two_equals_an_uninterrupted_one(photos, tmp_path):
    """Also with BatchNorm, augmentation and mixup: chance is a function of epoch, step and rank."""
    settings = {"batch_size": 4, "epochs": 3, "mixup": True, "optimizer": "adamw"}
    whole = trained_by(2, photos, tmp_path / "whole", **settings)

    class Stopper(Observer):
        told = False

        def progress(self, stage, done, total):
            if stage == "epoch 2/3" and os.environ["RANK"] == "1" and not self.told:
                self.told = True  # a second signal would act at once
                os.kill(os.getpid(), signal.SIGINT)

    out = tmp_path / "run"
    stopped = together(lambda rank: train(photos, out, observer=Stopper(), **settings))
    kinds = sorted((failure.kind, failure.exit_code) for failure in stopped)
    assert kinds == [("EndedByAnother", 130), ("Interrupted", 130)]
    message = next(failure.message for failure in stopped if failure.kind == "Interrupted")
    assert message == f"stopped by SIGINT. Continue with: elr train --resume {out}"
    stopped_at = state_of(RunFolder(out))
    assert (stopped_at["epoch"], stopped_at["part"]["batches"]["train"]) == (1, 2)  # of 3 batches
    together(lambda rank: resume(out).path)
    one, other = state_of(RunFolder(out)), state_of(whole)
    for part in ("method", "record"):
        for name, tensor in other[part].items():
            torch.testing.assert_close(one[part][name], tensor, rtol=0, atol=0, equal_nan=True)


# Failures


def fail_in(rank: int, how: Callable[[], None]) -> Observer:
    class Failing(Observer):
        def progress(self, stage, done, total):
            if stage == "epoch 2/2" and int(os.environ["RANK"]) == rank:
                how()

    return Failing()


@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_fails_ends_all(photos, tmp_path, failing):
    def out_of_memory() -> None:
        raise torch.OutOfMemoryError("of device memory")

    def work(rank: int) -> None:
        train(photos, tmp_path / "run", batch_size=4, observer=fail_in(failing, out_of_memory))

    results = together(work)
    message = (
        "cpu: out of memory with 4 images per step. 2 fit: add --batch-size 2 --accumulate 2,"
        " or --batch-size auto. With the same --out, add --overwrite."
    )
    assert results[failing] == Failure("OutOfMemory", message, 1)
    assert results[1 - failing].kind == "EndedByAnother"
    assert len(RunFolder(tmp_path / "run").metrics()) == 1


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_ends_all(photos, tmp_path, killed):
    def work(rank: int) -> None:
        kill = functools.partial(os.kill, os.getpid(), signal.SIGKILL)
        train(photos, tmp_path / "run", batch_size=4, observer=fail_in(killed, kill))

    results = together(work)
    assert results[killed] is None
    assert results[1 - killed].kind == "TrainingError"
    assert results[1 - killed].message == (
        "another process of this training has ended. Its own message, or that of torchrun, says "
        f"why. Continue with: elr train --resume {tmp_path / 'run'}"
    )


def test_a_loss_that_is_no_number_is_told_once(photos, tmp_path):
    results = together(lambda rank: train(photos, tmp_path / "run", lr=1e30, epochs=3))
    assert sorted(failure.kind for failure in results) == ["Diverged", "EndedByAnother"]


def test_an_existing_run_is_refused_by_the_first(photos, tmp_path):
    train(photos, tmp_path / "run", epochs=1)
    results = together(lambda rank: train(photos, tmp_path / "run"))
    assert results[0].kind == "RunError"
    assert results[1].kind == "EndedByAnother"


def test_processes_that_see_other_data_are_refused(photos, tmp_path):
    write_shapes(tmp_path / "other", per_class=7, classes=("a", "b"))

    def work(rank: int) -> None:
        train((photos, tmp_path / "other")[rank], tmp_path / "run")

    results = together(work)
    told = next(failure for failure in results if failure.kind == "TrainingError")
    assert told.message.startswith("the processes do not see the same files. ")


def test_sync_bn_needs_batch_norm_and_cuda(photos, tmp_path):
    with pytest.raises(ModelError, match="--sync-bn: this backbone has no BatchNorm"):
        train(photos, tmp_path / "run", backbone="test_vit", image_size=160, sync_bn=True)
    results = together(lambda rank: train(photos, tmp_path / "run", sync_bn=True))
    assert Failure("ConfigError", "--sync-bn: needs CUDA, not cpu. Leave it out.", 1) in results
    for other in ({"method": "elr-halves"}, {"freeze": "norm"}):
        with pytest.raises(ConfigError, match=r"^--sync-bn: .*"):
            TrainConfig(data=photos, sync_bn=True, **other)
    train(photos, tmp_path / "run", sync_bn=True, epochs=1)  # alone it holds without effort


# What comes after the training


def test_predictions_of_two_are_those_of_one(shared_run, photos):
    files = [*sorted(photos.rglob("*.png")), photos / "none.png"]

    def work(rank: int = 0) -> list[Any]:
        found = predict_images(shared_run.path, files, batch_size=5, workers=0)
        return [(p.path, p.error, p.probabilities) for p in found]

    expected = work()
    for rows in together(work):
        assert [row[:2] for row in rows] == [row[:2] for row in expected]
        for row, other in zip(rows[:-1], expected[:-1], strict=True):
            np.testing.assert_allclose(row[2], other[2], atol=1e-5)


def test_nccls_own_words_are_passed_on():
    error = DistBackendError(
        "NCCL error in: x.cpp:93, internal error\nncclInternalError: Internal check failed.\n"
        "Last error:\nDuplicate GPU detected : rank 1 and rank 0"
    )
    assert what_nccl_says(error) == " NCCL says: Duplicate GPU detected : rank 1 and rank 0"
    assert what_nccl_says(DistBackendError("a\nb")) == " NCCL says: a b"
    assert what_nccl_says(RuntimeError("gloo: closed")) == ""


def test_evaluation_of_two_is_that_of_one(shared_run, photos):
    def work(rank: int = 0) -> dict[str, Any]:
        return evaluate_run(shared_run.path, photos, batch_size=3, workers=0).to_dict()

    assert together(work) == [work()] * 2


def test_features_of_two_are_those_of_one(shared_run, photos):
    manifest = load_data(photos)

    def work(rank: int = 0) -> np.ndarray:
        features = Features.empty(len(manifest))
        with joined():
            for look in Predictor.load(shared_run.path).looks(manifest):
                features.keep(look, look.batch.index.numpy())
        return features.vectors

    for vectors in together(work):
        np.testing.assert_allclose(vectors, work(), atol=2e-3)


def test_the_audit_has_every_row_once(photos, tmp_path):
    run = trained_by(2, photos, tmp_path / "run", val_fraction=0.2, batch_size=4)
    audit_run(run.path, report=False)
    with (run.audit_folder / "audit.csv").open() as file:
        paths = [row["path"] for row in csv.DictReader(file)]
    assert sorted(paths) == list(run.manifest().paths)


def test_an_audit_without_a_run_trains_together(photos, tmp_path):
    settings = {name: value for name, value in TINY.items() if name != "optimizer"}

    def work(rank: int) -> int:
        run = run_for_audit(photos, settings, tmp_path / "checked")
        again = run_for_audit(photos, settings, tmp_path / "checked")
        assert again.path == run.path
        return len(audit_run(run.path, tmp_path / "checked", report=False).rows)

    assert together(work) == [23, 23]
    with (tmp_path / "checked" / "audit.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 23


def test_a_search_trains_together(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(**{"data": photos, **TINY, "val_fraction": 0.25})

    def work(rank: int) -> tuple[Path, str]:
        found = tune(config, lambdas=(1.0, 3.0), betas=(0.7,), lrs=(0.01, 0.02))
        again = tune(config, found.folder, lambdas=(1.0, 3.0), betas=(0.7,), lrs=(0.01, 0.02))
        assert again.trials == found.trials
        return found.folder, str(found.pick)

    (folder, pick), other = together(work)
    assert other == (folder, pick)
    assert len((folder / "trials.csv").read_text().splitlines()) == 4
