"""The run folder: the name of every file in it, and that only one process trains there."""

from __future__ import annotations

import csv
import errno
import fcntl
import hashlib
import os
import platform
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from elrcli.config import TrainConfig
from elrcli.data.manifest import Manifest, read_manifest
from elrcli.errors import ConfigError, DataError, RunError, cannot_be_written, is_text, legible
from elrcli.files import read_json_object

RUNS = Path("runs")
LOCK = "lock"
SPEED = ("images_per_second", "wait_share", "seconds")  # what a machine adds to `metrics.csv`
LARGEST_CURVES = 4 * 1024**2  # bytes
AUDIT_FILES = ("summary.json", "audit.csv", "audit.jsonl", "audit.parquet", "report.html")
FILES_IN = {  # what is written into the folders of a run
    "audit": AUDIT_FILES,
    "cache": ("*.pixels", "*.index"),
    "checkpoint": ("*.safetensors", ".*.safetensors.*"),
    "export": ("model.*", "config.json"),
    "tensorboard": ("events.out.tfevents.*",),
}
# What `atomic_path` makes: its name ends in 8 hexadecimal digits.
LEFTOVER = re.compile(
    r"\.(config|classes|manifest|metrics|unreadable|curves|model|features|[\d-]+)"
    r"\.(json|csv|svg|safetensors)\.[0-9a-f]{8}"
)


@dataclass(frozen=True)
class RunFolder:
    """A folder written by `elr train`. Tensors are safetensors, the rest is text."""

    path: Path

    @property
    def config_file(self) -> Path:
        """All resolved settings, preprocessing and versions."""
        return self.path / "config.json"

    @property
    def classes_file(self) -> Path:
        """Class names; the position is the class id."""
        return self.path / "classes.json"

    @property
    def manifest_file(self) -> Path:
        """One line per sample, in index order."""
        return self.path / "manifest.csv"

    @property
    def metrics_file(self) -> Path:
        """One line per epoch."""
        return self.path / "metrics.csv"

    @property
    def model_file(self) -> Path:
        """Weights that predict."""
        return self.path / "model.safetensors"

    @property
    def features_file(self) -> Path:
        """Features and thumbnails of all images, for the audit."""
        return self.path / "features.safetensors"

    @property
    def checkpoint_folder(self) -> Path:
        """Everything a resume needs."""
        return self.path / "checkpoint"

    @property
    def unreadable_file(self) -> Path:
        """Images that were left out, with the reason."""
        return self.path / "unreadable.csv"

    @property
    def curves_file(self) -> Path:
        """The metrics as a picture."""
        return self.path / "curves.svg"

    @property
    def audit_folder(self) -> Path:
        """Default place of an audit's output."""
        return self.path / "audit"

    @property
    def export_folder(self) -> Path:
        """Default place of the network in other forms."""
        return self.path / "export"

    @property
    def cache_folder(self) -> Path:
        """Decoded images, with `--cache disk`."""
        return self.path / "cache"

    @property
    def lock_file(self) -> Path:
        """Locked while a process trains here; names that process."""
        return self.path / LOCK

    @property
    def tensorboard_folder(self) -> Path:
        """TensorBoard events, with `--tensorboard`."""
        return self.path / "tensorboard"

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders in a run."""
        return (
            self.checkpoint_folder,
            self.audit_folder,
            self.export_folder,
            self.cache_folder,
            self.tensorboard_folder,
        )

    @classmethod
    def create(cls, path: Path, *, overwrite: bool = False) -> RunFolder:
        """Make an empty run folder; an existing one is replaced only with `overwrite`."""
        run = cls(path)
        run.check_free(overwrite=overwrite)
        try:
            path.mkdir(parents=True, exist_ok=True)
            run.remove_leftovers()
            run._remove_files()
        except OSError as error:
            raise RunError(cannot_be_written(path, error)) from None
        return run

    def is_finished(self, *, for_audit: bool = True) -> bool:
        """Tell whether training is through, and `for_audit` whether features are there too."""
        return self.model_file.is_file() and (self.features_file.is_file() or not for_audit)

    def check_free(self, *, overwrite: bool) -> None:
        """Raise RunError where no run may be made: over another one only with `overwrite`."""
        if self._holds_run() and not overwrite:
            raise RunError(f"{self.path}: exists. Add --overwrite, or choose another --out.")

    def _holds_run(self) -> bool:
        """Tell whether there is a run; raises RunError if the place is taken by something else."""
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path}: is a file. Choose another --out.")
        if not self.path.is_dir():
            return False
        # A process that was killed before `config.json` was there leaves these.
        begun = {self.lock_file, *self._leftovers(self.path)}
        if not {*self.path.iterdir()} - begun:
            return False
        if not self.is_run():
            raise RunError(f"{self.path}: not empty and not a run. Choose another --out.")
        return True

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training here; raises RunError if one does already."""
        self._holds_run()
        with locked_folder(self.path):
            yield

    def remove_leftovers(self) -> None:
        """Remove the temporary files of a process that was killed while it wrote."""
        for folder in (self.path, self.checkpoint_folder):
            for path in self._leftovers(folder):
                path.unlink(missing_ok=True)

    @staticmethod
    def _leftovers(folder: Path) -> list[Path]:
        return [path for path in folder.glob(".*") if LEFTOVER.fullmatch(path.name)]

    def is_run(self) -> bool:
        """Tell whether `elr` wrote `config.json`: other programs use that name too."""
        try:
            return "elr" in self.config()
        except RunError:
            return False

    def _remove_files(self) -> None:
        """Remove what a run writes and nothing else; `config.json`, which marks a run, last."""
        for folder in self.folders:
            if folder.is_symlink():
                folder.unlink()
            for pattern in FILES_IN[folder.name]:
                for file in folder.glob(pattern):
                    file.unlink()
            with suppress(OSError):  # not there, or holds something else
                folder.rmdir()
        files = (
            self.model_file,
            self.features_file,
            self.metrics_file,
            self.unreadable_file,
            self.curves_file,
            self.manifest_file,
            self.classes_file,
            self.config_file,
        )
        for file in files:
            file.unlink(missing_ok=True)

    def remove_state(self) -> None:
        """Remove weights, checkpoint and cache: settings and figures are left."""
        for folder in (self.checkpoint_folder, self.cache_folder):
            shutil.rmtree(folder, ignore_errors=True)
        self.model_file.unlink(missing_ok=True)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunFolder:
        """Return the run at `path`, or say why there is none.

        Folders in it that are links are refused: what is written there would land elsewhere.
        """
        path = Path(path)
        run = cls(path)
        if not path.is_dir():
            raise RunError(f"{path}: no such folder. Name a folder written by `elr train`.")
        if not run.config_file.is_file():
            raise RunError(f"{path}: holds no config.json. Name a folder written by `elr train`.")
        for folder in run.folders:
            if folder.is_symlink():
                raise RunError(f"{folder}: a link. Put the folder itself in its place.")
        return run

    def config(self) -> dict[str, Any]:
        """Return the content of `config.json`."""
        try:
            return read_json_object(self.config_file)
        except ConfigError as error:
            raise RunError(str(error)) from None

    def train_config(self) -> TrainConfig:
        """Return the resolved settings of the run."""
        settings = self.config().get("settings")
        if not isinstance(settings, dict):
            raise RunError(f"{self.config_file}: holds no settings.")
        try:
            return TrainConfig.from_dict(settings, str(self.config_file))
        except ConfigError as error:
            raise RunError(str(error)) from None

    def classes(self) -> tuple[str, ...]:
        """Return the class names in id order."""
        try:
            names = read_json_object(self.classes_file).get("classes")
        except ConfigError as error:
            raise RunError(str(error)) from None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise RunError(f"{self.classes_file}: expected a list of names under 'classes'.")
        for name, count in Counter(names).items():
            if count > 1 or not is_text(name):
                raise RunError(
                    f"{self.classes_file}: class '{legible(name)}' is there twice or no text."
                )
        return tuple(names)

    def manifest(self) -> Manifest:
        """Return the samples of the run, in index order."""
        root = self.config().get("data_root")
        if not isinstance(root, str):
            raise RunError(f"{self.config_file}: holds no data_root.")
        try:
            return read_manifest(self.manifest_file, Path(root), self.classes())
        except OSError as error:
            raise RunError(f"{self.manifest_file}: cannot be read ({error.strerror}).") from None
        except DataError as error:
            raise RunError(str(error)) from None

    def metrics(self) -> list[dict[str, float | None]]:
        """Return the rows of `metrics.csv`, empty cells as None."""
        if not self.metrics_file.is_file():
            return []
        try:
            with self.metrics_file.open(newline="", encoding="utf-8") as file:
                return [
                    {name: float(cell) if cell else None for name, cell in row.items()}
                    for row in csv.DictReader(file)
                ]
        except (OSError, ValueError, TypeError, csv.Error) as error:
            raise RunError(f"{self.metrics_file}: not a table of numbers ({error}).") from None

    def training_digest(self) -> str:
        """Return what tells this training from others, and its state from others of it.

        The same training on another machine, or with an interruption, has the same.
        """
        rows = [{n: x for n, x in row.items() if n not in SPEED} for row in self.metrics()]
        return hashlib.sha256(repr(rows).encode()).hexdigest()

    def curves(self) -> str | None:
        """Return `curves.svg`; None where there is none that training can have written.

        It becomes a part of a page that people send: a link may lead to anything.
        """
        file = self.curves_file
        if file.is_symlink() or not file.is_file() or file.stat().st_size > LARGEST_CURVES:
            return None
        return file.read_text(encoding="utf-8", errors="replace")


def remove_audit(folder: Path) -> None:
    """Remove what an audit wrote into a folder."""
    for name in AUDIT_FILES:
        (folder / name).unlink(missing_ok=True)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Keep other processes from working in a folder; raises RunError if one does already.

    The lock ends with this process, however that ends. Processes that it has started do not hold
    it. A file system without locks has none here either.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "r+b", buffering=0, opener=_own_file)  # noqa: SIM115
    except OSError as error:
        raise RunError(cannot_be_written(folder, error)) from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                holder = file.read(200).decode("utf-8", "replace").strip() or "another process"
                raise RunError(
                    f"{folder}: is in use by {holder}. Wait for it, or choose another folder."
                ) from None
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n".encode())
        except OSError as error:
            raise RunError(cannot_be_written(folder / LOCK, error)) from None
        yield


def _own_file(path: str, flags: int) -> int:
    """Open a file for a lock, made where there is none; never what a link or a pipe leads to."""
    if os.path.islink(path) or (os.path.exists(path) and not os.path.isfile(path)):
        raise RunError(f"{path}: not a file of its own, but a link or a pipe. Remove it.")
    return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def new_path(data: Path, kind: str) -> Path:
    """Return where something made from `data` goes that was not told where."""
    name = Path(os.path.abspath(data)).stem
    return RUNS / f"{name}-{kind}-{datetime.now():%Y%m%d-%H%M%S}"


def newest_run(runs: Path = RUNS) -> Path:
    """Return the run under `runs` that was changed last; an audit's is in its folder `run`."""
    files = (*runs.glob("*/config.json"), *runs.glob("*/run/config.json"))
    found = [file.parent for file in files if RunFolder(file.parent).is_run()]
    if not found:
        raise RunError(f"{runs}: holds no run. Name one, or train one with `elr train DATA`.")

    def changed(path: Path) -> int:
        files = (path / "config.json", RunFolder(path).metrics_file)
        return max(file.stat().st_mtime_ns for file in files if file.is_file())

    return max(found, key=changed)
