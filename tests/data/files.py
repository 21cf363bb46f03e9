"""Folders and CSV files of empty images, and what is said about them."""

from __future__ import annotations

from pathlib import Path

import pytest

from elrcli.config import READING_SETTINGS, Reading
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


def load(data: Path, **options: object) -> Manifest:
    """Load data with options of both kinds, of `Reading` and of `load_data`."""
    reading = {name: options.pop(name) for name in READING_SETTINGS if name in options}
    return load_data(data, Reading(**reading), **options)  # type: ignore[arg-type]


def error_of(data: Path, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        load(data, **options)
    return str(caught.value)
