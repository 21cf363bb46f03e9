from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from elrcli.engine import checkpoints
from elrcli.engine.checkpoints import (
    BackgroundWriter,
    load_checkpoint,
    save_checkpoint,
    take_snapshot,
    write_tensors,
)
from elrcli.errors import RunError
from tests.limits import no_file_larger_than


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def save(folder: Path, epoch: int, state: Mapping[str, Any], batch: int = 0) -> Path:
    return save_checkpoint(folder, epoch, take_snapshot(state), batch)


def test_a_nested_state_comes_back_exactly(tmp_path):
    state = {
        "epoch": 3,
        "model": {"layer.weight": torch.randn(2, 3), "empty": {}},
        "optimizer": {0: {"step": torch.tensor(2.0), "half": torch.ones(2).half()}, 1: {}},
        "metrics": [{"loss": 0.1, "missing": None}, []],
        "unreadable": [(7, "größe \udcff")],
        "none": torch.zeros(0, 4),
    }
    save(tmp_path, 3, state)
    loaded = load_checkpoint(tmp_path)
    assert loaded["epoch"] == 3
    assert loaded["metrics"] == [{"loss": 0.1, "missing": None}, []]
    assert loaded["unreadable"] == [[7, "größe \udcff"]]
    assert loaded["model"]["empty"] == {}
    assert list(loaded["optimizer"]) == [0, 1]  # numbers stay numbers
    assert loaded["none"].shape == (0, 4)
    torch.testing.assert_close(loaded["model"]["layer.weight"], state["model"]["layer.weight"])
    torch.testing.assert_close(loaded["optimizer"][0], state["optimizer"][0], rtol=0, atol=0)


def test_any_memory_layout_and_shared_tensors_are_saved(tmp_path):
    image = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    shared = torch.arange(6.0)
    save(tmp_path, 0, {"image": image, "a": shared, "b": shared[1:]})
    loaded = load_checkpoint(tmp_path)
    assert loaded["image"].equal(image)
    assert loaded["a"].equal(shared)
    assert loaded["b"].equal(shared[1:])


def test_two_are_kept_and_the_newest_is_read(tmp_path):
    (tmp_path / "mine.safetensors").touch()
    for epoch in (8, 9, 10, 11):
        save(tmp_path, epoch, {"epoch": epoch})
    assert names(tmp_path) == ["000010.safetensors", "000011.safetensors", "mine.safetensors"]
    assert load_checkpoint(tmp_path) == {"epoch": 11}


def test_a_failed_save_leaves_the_last_one(tmp_path, monkeypatch):
    save(tmp_path, 1, {"epoch": 1})

    def refuse(*arguments: object) -> None:
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr(checkpoints.safetensors.torch, "save_file", refuse)
    with pytest.raises(RunError, match=r"000002\.safetensors: cannot be written \(No space left"):
        save(tmp_path, 2, {"epoch": 2})
    assert names(tmp_path) == ["000001.safetensors"]
    assert load_checkpoint(tmp_path) == {"epoch": 1}


def test_a_file_that_is_cut_off_is_a_run_error(tmp_path):
    save(tmp_path, 1, {"epoch": 1})
    message = r"000002\.safetensors: cannot be written \(.*too large"
    with no_file_larger_than(50_000), pytest.raises(RunError, match=message):
        save(tmp_path, 2, {"weights": torch.zeros(100_000)})
    assert names(tmp_path) == ["000001.safetensors"]
    assert load_checkpoint(tmp_path) == {"epoch": 1}


@pytest.mark.parametrize("damage", ["torn", "changed"])
def test_the_checkpoint_before_a_damaged_one_is_used(tmp_path, damage):
    save(tmp_path, 1, {"epoch": 1})
    newest = save(tmp_path, 2, {"weights": torch.zeros(100)})
    content = newest.read_bytes()
    newest.write_bytes(content[:-1] if damage == "torn" else content[:-1] + b"\x01")
    notes: list[str] = []
    assert load_checkpoint(tmp_path, notes.append) == {"epoch": 1}
    assert len(notes) == 1
    assert notes[0].startswith(f"{newest}: not a whole checkpoint")
    assert notes[0].endswith("000001.safetensors is used instead.")


def test_a_checkpoint_with_a_problem_is_passed_over(tmp_path):
    save(tmp_path, 1, {"epoch": 1})
    save(tmp_path, 1, {"epoch": 1, "part": 3}, batch=3)
    notes: list[str] = []
    loaded = load_checkpoint(
        tmp_path, notes.append, lambda state: "in part" if "part" in state else None
    )
    assert loaded == {"epoch": 1}
    place = tmp_path / "000001-000003.safetensors"
    assert notes == [f"{place}: in part. 000001.safetensors is used instead."]


def test_within_an_epoch_its_beginning_is_kept_too(tmp_path):
    for epoch, batch in ((0, 0), (1, 0), (1, 4), (1, 8), (1, 12)):
        save(tmp_path, epoch, {"at": [epoch, batch]}, batch)
    expected = ["000001-000008.safetensors", "000001-000012.safetensors", "000001.safetensors"]
    assert names(tmp_path) == expected
    assert load_checkpoint(tmp_path) == {"at": [1, 12]}
    save(tmp_path, 2, {"at": [2, 0]})
    assert load_checkpoint(tmp_path) == {"at": [2, 0]}


def test_what_training_did_not_go_on_from_is_removed(tmp_path):
    for batch in (0, 4, 8):
        save(tmp_path, 1, {"batch": batch}, batch)
    save(tmp_path, 1, {"batch": 2}, 2)
    assert names(tmp_path) == ["000001-000002.safetensors", "000001.safetensors"]


def test_the_only_checkpoint_torn(tmp_path):
    save(tmp_path, 1, {}).write_bytes(b"")
    with pytest.raises(RunError, match=r"not a whole checkpoint .* no other\. Train again\.$"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("exists", [True, False])
def test_no_checkpoint(tmp_path, exists):
    with pytest.raises(RunError, match="holds no checkpoint"):
        load_checkpoint(tmp_path if exists else tmp_path / "none")


@pytest.mark.parametrize(
    "state",
    [
        "{",
        pytest.param("[" * 100_000, id="deep"),
        "3",
        '"tensor"',
        "[]",
        "{}",
        '{"value": 3}',
        '{"tensor": "w"}',
        '{"tensor": "none"}',
        '{"tensor": ["w"]}',
        '{"items": 3}',
        '{"items": [[1]]}',
        '{"items": [[{}, {"value": 1}]]}',
        '{"list": {"a": 1}}',
    ],
)
def test_a_hostile_header_is_a_run_error(tmp_path, state):
    tensors = {"w": torch.zeros(2)}
    metadata = {"state": state, "sha256": checkpoints._digest(state, tensors)}
    write_tensors(tmp_path / "000001.safetensors", tensors, metadata)
    with pytest.raises(RunError, match="not a whole checkpoint"):
        load_checkpoint(tmp_path)


def test_a_file_without_a_state_is_a_run_error(tmp_path):
    write_tensors(tmp_path / "000001.safetensors", {"w": torch.zeros(2)})
    with pytest.raises(RunError, match="not a whole checkpoint"):
        load_checkpoint(tmp_path)


def test_a_tensor_that_claims_too_much_is_a_run_error(tmp_path):
    tensors = {"w": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}
    header = json.dumps({**tensors, "__metadata__": {"state": '{"tensor": "w"}'}}).encode()
    content = len(header).to_bytes(8, "little") + header
    (tmp_path / "000001.safetensors").write_bytes(content)
    with pytest.raises(RunError, match="not a whole checkpoint"):
        load_checkpoint(tmp_path)


def test_a_snapshot_stays_as_it_was(tmp_path):
    state = {"weights": torch.zeros(3), "epoch": [1]}
    snapshot = take_snapshot(state)
    state["weights"] += 1
    state["epoch"].append(2)
    save_checkpoint(tmp_path, 1, snapshot)
    loaded = load_checkpoint(tmp_path)
    assert loaded["weights"].tolist() == [0, 0, 0]
    assert loaded["epoch"] == [1]


def test_jobs_run_beside_the_program_and_after_each_other():
    done: list[int] = []
    first_may_go_on = threading.Event()

    def first() -> None:
        assert first_may_go_on.wait(60)
        done.append(1)

    with BackgroundWriter() as writer:
        writer.start(first)
        assert done == []  # start() came back
        first_may_go_on.set()
        writer.start(lambda: done.append(2))
        assert done[0] == 1
    assert done == [1, 2]


def test_what_a_job_raises_is_raised_once_at_the_next_call():
    def fail() -> None:
        raise RunError("full")

    writer = BackgroundWriter()
    for call in (writer.finish, lambda: writer.start(fail)):
        writer.start(fail)
        with pytest.raises(RunError, match="full"):
            call()
    writer.finish()
