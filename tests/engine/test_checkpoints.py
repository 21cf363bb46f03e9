from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from elrcli.engine import checkpoints
from elrcli.engine.checkpoints import load_checkpoint, save_checkpoint, write_tensors
from elrcli.errors import RunError
from tests.limits import no_file_larger_than


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_nested_state_comes_back_exactly(tmp_path):
    state = {
        "epoch": 3,
        "model": {"layer.weight": torch.randn(2, 3), "empty": {}},
        "optimizer": {0: {"step": torch.tensor(2.0), "half": torch.ones(2).half()}, 1: {}},
        "metrics": [{"loss": 0.1, "missing": None}, []],
        "unreadable": [(7, "größe \udcff")],
        "none": torch.zeros(0, 4),
    }
    save_checkpoint(tmp_path, 3, state)
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
    save_checkpoint(tmp_path, 0, {"image": image, "a": shared, "b": shared[1:]})
    loaded = load_checkpoint(tmp_path)
    assert loaded["image"].equal(image)
    assert loaded["a"].equal(shared)
    assert loaded["b"].equal(shared[1:])


def test_two_are_kept_and_the_newest_is_read(tmp_path):
    (tmp_path / "mine.safetensors").touch()
    for epoch in (8, 9, 10, 11):
        save_checkpoint(tmp_path, epoch, {"epoch": epoch})
    assert names(tmp_path) == ["000010.safetensors", "000011.safetensors", "mine.safetensors"]
    assert load_checkpoint(tmp_path) == {"epoch": 11}


def test_a_failed_save_leaves_the_last_one(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"epoch": 1})

    def refuse(*arguments: object) -> None:
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr(checkpoints.safetensors.torch, "save_file", refuse)
    with pytest.raises(RunError, match=r"000002\.safetensors: cannot be written \(No space left"):
        save_checkpoint(tmp_path, 2, {"epoch": 2})
    assert names(tmp_path) == ["000001.safetensors"]
    assert load_checkpoint(tmp_path) == {"epoch": 1}


def test_a_file_that_is_cut_off_is_a_run_error(tmp_path):
    save_checkpoint(tmp_path, 1, {"epoch": 1})
    message = r"000002\.safetensors: cannot be written \(.*too large"
    with no_file_larger_than(50_000), pytest.raises(RunError, match=message):
        save_checkpoint(tmp_path, 2, {"weights": torch.zeros(100_000)})
    assert names(tmp_path) == ["000001.safetensors"]
    assert load_checkpoint(tmp_path) == {"epoch": 1}


@pytest.mark.parametrize("damage", ["torn", "changed"])
def test_the_checkpoint_before_a_damaged_one_is_used(tmp_path, damage):
    save_checkpoint(tmp_path, 1, {"epoch": 1})
    newest = save_checkpoint(tmp_path, 2, {"weights": torch.zeros(100)})
    content = newest.read_bytes()
    newest.write_bytes(content[:-1] if damage == "torn" else content[:-1] + b"\x01")
    notes: list[str] = []
    assert load_checkpoint(tmp_path, notes.append) == {"epoch": 1}
    assert len(notes) == 1
    assert notes[0].startswith(f"{newest}: not a whole checkpoint")
    assert notes[0].endswith("000001.safetensors is used instead.")


def test_a_checkpoint_with_a_problem_is_passed_over(tmp_path):
    save_checkpoint(tmp_path, 1, {"epoch": 1})
    save_checkpoint(tmp_path, 1, {"epoch": 1, "part": 3}, batch=3)
    notes: list[str] = []
    loaded = load_checkpoint(
        tmp_path, notes.append, lambda state: "in part" if "part" in state else None
    )
    assert loaded == {"epoch": 1}
    place = tmp_path / "000001-000003.safetensors"
    assert notes == [f"{place}: in part. 000001.safetensors is used instead."]


def test_within_an_epoch_its_beginning_is_kept_too(tmp_path):
    for epoch, batch in ((0, 0), (1, 0), (1, 4), (1, 8), (1, 12)):
        save_checkpoint(tmp_path, epoch, {"at": [epoch, batch]}, batch)
    expected = ["000001-000008.safetensors", "000001-000012.safetensors", "000001.safetensors"]
    assert names(tmp_path) == expected
    assert load_checkpoint(tmp_path) == {"at": [1, 12]}
    save_checkpoint(tmp_path, 2, {"at": [2, 0]})
    assert load_checkpoint(tmp_path) == {"at": [2, 0]}


def test_what_training_did_not_go_on_from_is_removed(tmp_path):
    for batch in (0, 4, 8):
        save_checkpoint(tmp_path, 1, {"batch": batch}, batch)
    save_checkpoint(tmp_path, 1, {"batch": 2}, 2)
    assert names(tmp_path) == ["000001-000002.safetensors", "000001.safetensors"]


def test_the_only_checkpoint_torn(tmp_path):
    save_checkpoint(tmp_path, 1, {}).write_bytes(b"")
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
