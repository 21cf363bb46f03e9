"""One safetensors file per checkpoint: tensors by name, everything else as JSON in its header."""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from elrcli.errors import NotWritten, RunError
from elrcli.files import atomic_path

NAME = re.compile(r"(\d{6,})(?:-(\d{6,}))?\.safetensors")
_UNREADABLE = (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError)


class Snapshot(NamedTuple):
    """A state as it was at one moment, on the CPU."""

    skeleton: str  # everything but the tensors, as JSON
    tensors: dict[str, Tensor]


def take_snapshot(state: Mapping[str, Any]) -> Snapshot:
    """Return a copy of nested `state` that later steps do not change."""
    tensors: dict[str, Tensor] = {}
    return Snapshot(json.dumps(_split(state, "", tensors)), tensors)


def save_checkpoint(folder: Path, epoch: int, snapshot: Snapshot, batch: int = 0) -> Path:
    """Write a state that was reached after `batch` batches of an epoch, with a hash of it all.

    Kept beside it are the checkpoint before it and the last one of an epoch's end (batch 0). What
    lies after it is removed: training did not go on from there.
    """
    skeleton, tensors = snapshot
    name = f"{epoch:06d}-{batch:06d}" if batch else f"{epoch:06d}"
    path = folder / f"{name}.safetensors"
    write_tensors(path, tensors, {"state": skeleton, "sha256": _digest(skeleton, tensors)})
    before = [(place, file) for place, file in _checkpoints(folder) if place < (epoch, batch)]
    ends = [file for place, file in before if place[1] == 0]
    kept = {path, *(file for _, file in before[-1:]), *ends[-1:]}
    for _, file in _checkpoints(folder):
        if file not in kept:
            file.unlink()
    return path


class BackgroundWriter:
    """Does one job at a time in a thread; what the job raises, the next call does.

    No process may be forked while a job runs: it could inherit a lock that nobody releases.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._job: Future[None] | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Begin a job once the one before is done."""
        self.finish()
        self._job = self._thread.submit(job)

    def finish(self) -> None:
        """Wait for the job in progress."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write contiguous CPU tensors as a safetensors file, whole or not at all."""
    with atomic_path(path) as temporary:
        mode = stat.S_IMODE(temporary.stat().st_mode)
        try:
            safetensors.torch.save_file(tensors, temporary, metadata)
            temporary.chmod(mode)  # it leaves a file that nobody else may read
        except SafetensorError as error:  # its name for a full disk, too
            raise NotWritten(f"{path}: cannot be written ({error}). Make room there.") from None


def load_checkpoint(
    folder: Path,
    note: Callable[[str], None] = lambda message: None,
    problem: Callable[[Mapping[str, Any]], str | None] = lambda state: None,
) -> dict[str, Any]:
    """Return the state of the newest checkpoint that is whole, tensors on the CPU.

    Newer ones that are torn, changed, or that `problem` says something about, are told to `note`.
    """
    paths = [path for _, path in reversed(_checkpoints(folder))]
    if not paths:
        raise RunError(f"{folder}: holds no checkpoint. Train again with `elr train`.")
    told: list[str] = []
    for path in paths:
        try:
            state = _read(path)
            found = problem(state)
        except _UNREADABLE as error:
            found = f"not a whole checkpoint ({error})"
        if found is None:
            for message in told:
                note(f"{message}. {path.name} is used instead.")
            return state
        told.append(f"{path}: {found}")
    raise RunError(f"{told[0]}, and there is no other. Train again.")


def has_checkpoint(folder: Path) -> bool:
    """Tell whether there is a checkpoint: a killed run may leave the folder without one."""
    return len(_checkpoints(folder)) > 0


def _checkpoints(folder: Path) -> list[tuple[tuple[int, int], Path]]:
    """Return ((epoch, batch), file) of all checkpoints, oldest first."""
    found = [
        ((int(match[1]), int(match[2] or 0)), path)
        for path in folder.glob("*.safetensors")
        if (match := NAME.fullmatch(path.name))
    ]
    return sorted(found)


def _read(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        skeleton = metadata["state"]
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if metadata["sha256"] != _digest(skeleton, tensors):
        raise ValueError("its content does not match its hash")
    return dict(_join(json.loads(skeleton), tensors))


def _digest(skeleton: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a state as it is written."""
    digest = hashlib.sha256(skeleton.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _split(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Move every tensor of `value` into `tensors` and return the rest with references."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, Mapping):
        items = [
            [key, _split(part, f"{name}.{key}".lstrip("."), tensors)] for key, part in value.items()
        ]
        return {"items": items}
    if isinstance(value, list | tuple):
        return {"list": [_split(part, f"{name}.{i}", tensors) for i, part in enumerate(value)]}
    return {"value": value}


def _join(skeleton: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """Undo `_split`."""
    if "tensor" in skeleton:
        return tensors[skeleton["tensor"]]
    if "items" in skeleton:
        return {key: _join(part, tensors) for key, part in skeleton["items"]}
    if "list" in skeleton:
        return [_join(part, tensors) for part in skeleton["list"]]
    return skeleton["value"]
