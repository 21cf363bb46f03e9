"""A whole run with its tables in each form and place."""

from __future__ import annotations

import pytest
import torch

from elrcli.audit.run import audit_run
from elrcli.engine import automatic
from elrcli.engine import training as module
from elrcli.engine.checkpoints import load_checkpoint
from elrcli.engine.finite import FiniteWatch
from elrcli.engine.fit import resume
from elrcli.engine.observer import Observer

EPOCHS = 24 * 2 * 2  # bytes of the record: samples, epochs, halves of fp32


class Notes(Observer):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.mark.parametrize(
    ("method", "form", "dtype"),
    [("elr", "fp16", "float16"), ("elr-plus", "fp16", "float16"), ("elr-halves", "top-k", "int16")],
)
def test_a_run_and_its_audit_hardly_depend_on_the_form(train, method, form, dtype):
    """Three classes: all of them are kept."""
    exact, run = train("exact", method=method), train(form, method=method, table=form)
    state = load_checkpoint(run.checkpoint_folder)
    kept = {str(t.dtype) for part in ("method", "record") for t in state[part].values()}
    assert f"torch.{dtype}" in kept
    for row, expected in zip(run.metrics(), exact.metrics(), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=0.01)
        assert row["val_agreement"] == expected["val_agreement"]
    results = [audit_run(one.path, report=False) for one in (run, exact)]
    scores = [dict(zip(one.rows.tolist(), one.score.tolist(), strict=True)) for one in results]
    assert scores[0] == pytest.approx(scores[1], abs=0.02)


def test_a_table_on_the_host_changes_nothing(train):
    near, far = (train(place, table_device=place, table="fp16") for place in ("device", "host"))
    one, other = (load_checkpoint(run.checkpoint_folder) for run in (near, far))
    for part in ("method", "record"):
        for name, tensor in one[part].items():
            torch.testing.assert_close(
                other[part][name], tensor, atol=0, rtol=0, equal_nan=True, msg=name
            )


def test_the_choice_is_said_and_kept(train, monkeypatch, tmp_path):
    """1 kB beside the record of 2 epochs: tables of 24 samples and 3 classes have 576 as fp32."""
    monkeypatch.setattr(automatic, "free_memory", lambda device: 1152 + EPOCHS)
    observer = Notes()
    run = train(observer=observer)
    assert run.config()["settings"]["table"] == "fp16"
    assert [note for note in observer.notes if "kept as fp16 on cpu" in note] == [
        "targets and predictions of 24 samples and 3 classes are kept as fp16 on cpu: 0.00 GB,"
        " as fp32 0.00 GB; 0.00 GB are free"
    ]
    monkeypatch.undo()
    run.model_file.unlink()  # something is left to do
    observer = Notes()
    resume(run.path, observer=observer)
    assert any("kept as fp16 on cpu" in note for note in observer.notes)


def test_what_sop_learns_leaves_less_for_the_tables(train, monkeypatch):
    """24 samples and 3 classes: 576 bytes of tables and 288 of SOP's own, a quarter may be used."""
    monkeypatch.setattr(automatic, "free_memory", lambda device: 4 * 576 + EPOCHS)
    assert train(method="elr").config()["settings"]["table"] == "fp32"
    assert train("sop", method="sop").config()["settings"]["table"] == "fp16"


def test_nothing_is_said_of_small_tables(train):
    observer = Notes()
    assert train(observer=observer).config()["settings"]["table"] == "fp32"
    assert not any("kept as" in note for note in observer.notes)


def test_a_diverged_epoch_begins_again_with_the_saved_rows(train, monkeypatch):
    """Also those of a table on the host."""
    original = FiniteWatch.look
    calls = []

    def once(watch):
        calls.append(None)
        if len(calls) == 3:
            raise module.Diverged("a test")
        return original(watch)

    monkeypatch.setattr(FiniteWatch, "look", once)
    run = train(on_nan="retry", table="top-k", table_device="host", epochs=2)
    assert load_checkpoint(run.checkpoint_folder)["record"]["visits"].max() == 2
