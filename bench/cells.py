"""Studies in cells: a result file each, stopped when the time is used up, gone on with later."""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from elrcli import api
from elrcli.engine.observer import Observer
from elrcli.run import RunFolder


class OutOfTime(Exception):
    """The time of the study is used up in the middle of a training; the run can be resumed."""


class Clock(Observer):
    """Ends a training after the epoch in which the time ran out."""

    def __init__(self, minutes: float) -> None:
        self.deadline = time.monotonic() + 60 * minutes

    @property
    def has_run_out(self) -> bool:
        """Whether nothing more may be started."""
        return time.monotonic() > self.deadline

    def epoch_finished(self, metrics: Mapping[str, float]) -> None:
        """Stop here: the epoch is saved."""
        if self.has_run_out:
            raise OutOfTime


def run_cells(
    results: Iterable[tuple[Path, Callable[[Path], dict[str, Any]]]], clock: Clock
) -> None:
    """Make every result file that is missing, while the time lasts.

    A cell is the path of its JSON file and a function that makes its content; the function may
    keep a run in the folder that it is given, which is removed at the end. Several processes may
    share the work: a cell that another one has begun is left to it.
    """
    for result, measure in results:
        if result.exists() or clock.has_run_out:
            continue
        lock = result.with_suffix(".lock")
        with lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            if result.exists():
                continue
            folder = result.with_suffix("")
            try:
                figures = measure(folder)
            except OutOfTime:
                return
            result.write_text(json.dumps(figures, indent=2) + "\n")
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink()
            print(f"{result.stem}: done", flush=True)


def train_or_resume(folder: Path, clock: Clock, data: Path, **settings: Any) -> RunFolder:
    """Train into `folder`, or go on with the training that was cut off there."""
    run = RunFolder(folder)
    if run.is_run() and run.checkpoint_folder.is_dir():
        return api.resume(folder, for_audit=False, observer=clock)
    return api.train(data, out=folder, overwrite=True, for_audit=False, observer=clock, **settings)
