"""Which of several processes this one is. Loads no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """The place of this process among all of them, and among those on this machine."""

    rank: int = 0
    processes: int = 1
    local_rank: int = 0
    local_processes: int = 1


def launch() -> Launch:
    """Return what torchrun says in the environment; without it this process is alone."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if not all(os.environ.get(name, "").isdecimal() for name in names):
        return Launch()
    return Launch(*(int(os.environ[name]) for name in names))


@contextmanager
def together() -> Iterator[None]:
    """Keep the processes of torchrun together: a failure is said once, and nobody ends early."""
    if launch().processes == 1:
        yield
        return
    from elrcli.engine.distributed import joined  # loads torch

    with joined():
        yield
