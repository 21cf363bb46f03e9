from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from elrcli.config import TrainConfig
from elrcli.data.samples import load_samples
from elrcli.engine import automatic, learner
from elrcli.engine.batch_size import BatchTrial, with_fitting_batch
from elrcli.engine.checkpoints import load_checkpoint
from elrcli.engine.device import choose_runtime
from elrcli.engine.distributed import Group
from elrcli.engine.fit import resume
from elrcli.engine.observer import Observer
from elrcli.engine.samples import OwnSamples
from elrcli.errors import OutOfMemory
from elrcli.methods.single import SingleNetwork
from elrcli.models import Preprocessing
from elrcli.run import RunFolder
from tests.engine.conftest import TINY
from tests.engine.test_fit import Recorder, assert_same
from tests.memory import memory_for

METHODS = [
    {"method": "elr"},
    {"method": "elr-plus", "optimizer": "adamw", "precision": "bf16"},
    {"method": "elr-halves", "backbone": "test_convnext", "layer_decay": 0.8},
    {"method": "sop", "ema": True, "clip_grad": 1.0},
    {"method": "ce", "mixup": True, "freeze": "norm"},
]


@pytest.fixture
def trial(shapes) -> Any:
    """Return a trial for settings, with all images in training."""

    def make(**settings: object) -> BatchTrial:
        given = {"data": shapes, **TINY, "val_fraction": 0.0, "batch_size": 16, **settings}
        config = TrainConfig(**given)
        resolved = {"weight_decay": 0.001}
        resolved |= {"ema_decay": 0.9} if config.averages else {}
        resolved |= {"mixup_alpha": 1.0} if config.mixes else {}
        resolved |= {"sop_start": 1e-3} if config.method == "sop" else {}
        config = config.replace(**resolved)
        manifest = load_samples(config)
        prepared = Preprocessing(32, (0.5,) * 3, (0.5,) * 3)
        runtime = choose_runtime("cpu", config.precision)
        samples = OwnSamples(manifest, Group(), config.seed)
        return BatchTrial(config, manifest, samples, runtime, prepared, 1)

    return make


def automatic_size(monkeypatch: pytest.MonkeyPatch, images: int) -> None:
    """Let the automatic batch size be what it is for many images."""
    monkeypatch.setattr(automatic, "automatic_batch_size", lambda of: images)


# --- auto ---


def test_auto_halves_until_it_fits_and_accumulates(train, monkeypatch):
    automatic_size(monkeypatch, 64)
    memory_for(monkeypatch, 16)
    heard = Recorder()
    run = train(batch_size="auto", epochs=1, observer=heard)
    settings = run.train_config()
    assert (settings.batch_size, settings.accumulate) == (16, 4)
    assert heard.notes == ["--batch-size auto: 16 images fit on cpu, 4 batches per optimiser step"]
    assert heard.plans[0].batch_size == 16


def test_auto_multiplies_what_is_accumulated_already(train, monkeypatch):
    memory_for(monkeypatch, 5)
    settings = train(batch_size="auto", accumulate=2, epochs=1).train_config()
    assert (settings.batch_size, settings.accumulate) == (4, 8)  # 2 batches of 16 before


@pytest.mark.slow
@pytest.mark.parametrize("settings", METHODS, ids=str)
def test_auto_equals_the_same_numbers_given_by_hand(train, monkeypatch, settings):
    by_hand = train("by hand", batch_size=4, accumulate=4, **settings)
    memory_for(monkeypatch, 4)
    chosen = train("chosen", batch_size="auto", **settings)
    assert chosen.train_config() == by_hand.train_config()
    assert_same(chosen, by_hand)


def test_auto_changes_nothing_where_all_fits(train):
    heard = Recorder()
    chosen = train("chosen", batch_size="auto", mixup=True, observer=heard)
    assert heard.notes == ["--batch-size auto: 16 images fit on cpu"]
    assert_same(chosen, train("open", batch_size=None, mixup=True))


def test_auto_without_room_for_one_image_writes_nothing(train, tmp_path, monkeypatch):
    memory_for(monkeypatch, 0)
    with pytest.raises(OutOfMemory) as caught:
        train(batch_size="auto")
    assert str(caught.value) == (
        "cpu: out of memory. Not even one image fits. Lower --image-size, or choose a smaller"
        " --backbone."
    )
    assert not (tmp_path / "run").exists()


def test_the_smallest_of_all_processes_counts(trial, monkeypatch):
    class Two(Group):
        def gather(self, item: Any) -> list[Any]:
            return [item, (4, "cuda:1")]

    one = trial()
    notes = Recorder()
    memory_for(monkeypatch, 8)
    settings = with_fitting_batch(
        one.config, one.manifest, one.runtime, one.preprocessing, Two(0, 2), notes, one.tables
    )
    assert (settings.batch_size, settings.accumulate) == (4, 4)
    assert notes.notes == [
        "--batch-size auto: 4 images fit on cuda:1, 4 batches per optimiser step"
    ]


# --- the trial ---


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ({}, [2, 16]),
        ({"accumulate": 3}, [2, 16, 16]),  # gradients of the first lie beside the second
        ({"batch_size": 32}, [2, 16, 16]),  # here too: two of them make 32
        ({"batch_size": 64, "accumulate": 2}, [2, 16, 16]),
    ],
)
def test_the_last_step_of_a_trial_has_all_that_a_training_has(trial, monkeypatch, settings, asked):
    batches = memory_for(monkeypatch, 16)
    assert trial(**settings).largest(16) == 16
    assert batches == asked


def test_a_trial_takes_no_more_images_than_there_are(trial, monkeypatch):
    memory_for(monkeypatch, 24)
    assert trial().largest(64) == 64


def test_a_process_without_training_images_has_room_for_all(trial):
    one = trial()
    samples = OwnSamples(one.manifest, Group(1, 2), 0)
    samples.places["train"] = samples.places["train"][:0]  # more processes than images
    nobody = BatchTrial(one.config, one.manifest, samples, one.runtime, one.preprocessing, 2)
    assert nobody.largest(64) == 64


@pytest.mark.parametrize("settings", [{}, {"method": "elr-halves"}, {"method": "elr-plus"}])
def test_a_trial_of_one_image(trial, monkeypatch, settings):
    memory_for(monkeypatch, 2)  # the first step has two
    one = trial(**settings)
    assert one.largest(1) == 1


def test_a_trial_leaves_random_state_alone(trial):
    def states() -> list[Any]:
        numbers = np.random.get_state()[1]
        return [torch.get_rng_state().tolist(), random.getstate(), numbers.tolist()]

    before = states()
    assert trial(method="elr-plus").largest(8) == 8
    assert states() == before


def test_a_defect_is_not_taken_for_too_little_memory(trial, monkeypatch):
    def refuse(*arguments: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(SingleNetwork, "training_step", refuse)
    with pytest.raises(RuntimeError, match=r"^a defect$"):
        trial().largest(8)


# --- without auto ---


@pytest.mark.parametrize(
    ("settings", "room", "message"),
    [
        (
            {"batch_size": 22},
            12,
            "with 22 images per step. 11 fit: add --batch-size 11 --accumulate 2, or"
            " --batch-size auto.",
        ),
        (
            {"batch_size": 11, "accumulate": 3},
            4,
            "with 11 images per step. 3 fit: add --batch-size 3 --accumulate 12, or"
            " --batch-size auto.",
        ),
        (
            {"batch_size": 8, "method": "elr-plus"},
            2,
            "with 8 images per step. 2 fit: add --batch-size 2 --accumulate 4, or"
            " --batch-size auto.",
        ),
        (
            {"batch_size": 8},
            0,
            "with 8 images per step. Not even one image fits. Lower --image-size, or choose a"
            " smaller --backbone.",
        ),
        (
            {"batch_size": 1},
            0,
            "with 1 image per step. Lower --image-size, or choose a smaller --backbone.",
        ),
    ],
)
def test_out_of_memory_names_the_batch_that_fits(train, monkeypatch, settings, room, message):
    memory_for(monkeypatch, room)
    with pytest.raises(OutOfMemory) as caught:
        train(**settings)
    assert str(caught.value) == (
        f"cpu: out of memory {message} With the same --out, add --overwrite."
    )
    assert caught.value.exit_code == 1


def test_out_of_memory_in_the_middle_leaves_the_checkpoint(train, tmp_path):
    whole = train("whole", batch_size=11)

    with pytest.MonkeyPatch.context() as patch:

        class Shrinks(Observer):
            def epoch_finished(self, metrics: object) -> None:
                memory_for(patch, 10)

        with pytest.raises(OutOfMemory, match=r"with 11 images per step\. 6 fit"):
            train(batch_size=11, observer=Shrinks())
    run = RunFolder.open(tmp_path / "run")
    assert load_checkpoint(run.checkpoint_folder)["epoch"] == 1
    assert_same(resume(run.path), whole)


def test_a_training_that_does_not_fit_on_the_device_at_all(train, monkeypatch, run_copy):
    def refuse(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(learner, "build_method", refuse)
    message = r"^cpu: out of memory\. Choose a smaller --backbone, or another --device\.$"
    with pytest.raises(OutOfMemory, match=message):
        train()
    with pytest.raises(OutOfMemory, match=message):
        resume(run_copy.path)
