"""Folders and CSV files of empty images, and what is said about them."""

from __future__ import annotations

from pathlib import Path

import pytest

from elrcli.data.manifest import Manifest, load_data
from elrcli.errors import DataError


def touch(root: Path, *paths: str) -> Path:
    """Make empty files: the manifest never opens an image."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def write_csv(folder: Path, text: str | bytes, *files: str) -> Path:
    touch(folder, *files)
    path = folder / "data.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def labels_by_path(manifest: Manifest) -> dict[str, str]:
    return {
        path: manifest.classes[label]
        for path, label in zip(manifest.paths, manifest.labels, strict=True)
    }


def error_of(data: Path, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        load_data(data, **options)  # type: ignore[arg-type]
    return str(caught.value)
