"""One safetensors file per checkpoint: tensors by name, everything else as JSON in its header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from elrcli.errors import RunError
from elrcli.run import atomic_path

KEPT = 2
PATTERN = "[0-9]" * 6 + ".safetensors"


def save_checkpoint(folder: Path, number: int, state: Mapping[str, Any]) -> Path:
    """Write nested `state` as `folder/<number>.safetensors` and drop all but the last two."""
    tensors: dict[str, Tensor] = {}
    skeleton = _split(state, "", tensors)
    path = folder / f"{number:06d}.safetensors"
    write_tensors(path, tensors, {"state": json.dumps(skeleton)})
    for old in sorted(folder.glob(PATTERN))[:-KEPT]:
        old.unlink()
    return path


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write contiguous CPU tensors as a safetensors file, whole or not at all."""
    with atomic_path(path) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # its name for a full disk, too
            raise RunError(f"{path}: cannot be written ({error}).") from None


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """Return the newest checkpoint's state, tensors on the CPU."""
    paths = sorted(folder.glob(PATTERN))
    if not paths:
        raise RunError(f"{folder}: holds no checkpoint. Train again with `elr train`.")
    try:
        with safe_open(paths[-1], framework="pt") as file:
            skeleton = json.loads((file.metadata() or {})["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return dict(_join(skeleton, tensors))
    except _UNREADABLE as error:
        remedy = f"Delete it to go on from {paths[-2].name}" if len(paths) > 1 else "Train again"
        raise RunError(f"{paths[-1]}: not a whole checkpoint ({error}). {remedy}.") from None


_UNREADABLE = (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError)


def _split(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Move every tensor of `value` into `tensors` and return the rest with references."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
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
