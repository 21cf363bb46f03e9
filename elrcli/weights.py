"""Weights of networks: files that are not trusted, and the hub that has pretrained ones."""

from __future__ import annotations

import shlex
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from elrcli.errors import ModelError, first_line


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read tensors by name from `.safetensors`, or from `.pth` without unpickling code."""
    if not path.is_file():
        raise ModelError(f"{path}: no such file. Give --weights a timm state dict.")
    try:
        if path.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(path)
        else:
            _check_archive(path)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except ModelError:
        raise
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise ModelError(f"{path}: not a readable state dict ({first_line(error)}).") from None
    except Exception:  # pickle.UnpicklingError: weights_only refuses code
        raise ModelError(
            f"{path}: refused, holds more than tensors. Load it where you trust it, and save its"
            " state_dict() with safetensors."
        ) from None
    for wrapper in ("state_dict", "model", "model_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise ModelError(f"{path}: holds no state dict. Expected tensors by name.")
    if not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        raise ModelError(f"{path}: holds no state dict. Expected tensors by name.")
    if not all(_is_plain(tensor) for tensor in content.values()):
        raise ModelError(f"{path}: holds sparse, quantised or empty tensors. Save dense ones.")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def _check_archive(path: Path) -> None:
    """Refuse a zip file that unpacks to more than its own size; torch never compresses."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError):
        return  # the format before zip files, or none
    is_packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if is_packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ModelError(f"{path}: refused, a compressed archive. Save it with torch.save.")


def _is_plain(tensor: Tensor) -> bool:
    return (
        tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    )


def check_classes(path: Path, classes: int) -> None:
    """Raise ModelError unless a run's weights have a tensor with one line per class.

    It is asked before a head of so many classes takes memory.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path}: not a readable state dict ({first_line(error)}). Delete it:"
            f" elr train --resume {shlex.quote(str(path.parent))} writes it anew."
        ) from None
    if not any(shape[:1] == [classes] for shape in shapes):
        raise ModelError(f"{path}: weights do not fit {classes:,} classes. Restore the run folder.")


@contextmanager
def offline_when_unreachable() -> Iterator[None]:
    """Use only cached weights where the hub has no address: its client retries for a minute."""
    constants: Any = huggingface_hub.constants
    host = urllib.parse.urlparse(constants.ENDPOINT).hostname
    was_offline = constants.HF_HUB_OFFLINE
    try:
        if not urllib.request.getproxies():
            socket.getaddrinfo(host, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def why_hub_is_silent(timeout: float) -> str | None:
    """Ask the hub of pretrained weights for an answer; return why none comes within seconds."""
    constants: Any = huggingface_hub.constants
    reasons = ["no answer"]

    def ask() -> None:
        try:
            request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
            urllib.request.urlopen(request, timeout=timeout).close()
        except urllib.error.HTTPError:  # an answer, too
            reasons.clear()
        except (OSError, ValueError, HTTPException) as error:
            reasons[:] = [first_line(getattr(error, "reason", error))]
        else:
            reasons.clear()

    # In a thread, as looking up the address knows no limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout + 1)
    return reasons[0] if reasons else None
