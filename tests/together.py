"""Several processes that find each other as those of torchrun do."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

SECONDS = 120


class Failure(NamedTuple):
    """An exception, as another process can be told of it."""

    kind: str
    message: str
    exit_code: int


def together(work: Callable[[int], Any], processes: int = 2) -> list[Any]:
    """Return what `work(rank)` returns: a `Failure` where it raises, None where it is killed."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("fork")  # torch is loaded already
    children, ends = [], []
    for rank in range(processes):
        end, far_end = context.Pipe()
        arguments = (work, rank, processes, store.port, far_end)
        child = context.Process(target=_run, args=arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads
            child.start()
        far_end.close()
        children.append(child)
        ends.append(end)
    results = []
    for child, end in zip(children, ends, strict=True):
        try:
            assert end.poll(SECONDS), "a process hangs"
            results.append(end.recv())
        except EOFError:
            results.append(None)
        finally:
            child.join(5)
            child.kill()
    return results


def _run(work: Callable[[int], Any], rank: int, processes: int, port: int, end: Connection) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    torch.set_num_threads(1)
    try:
        result = work(rank)
    except BaseException as error:
        result = Failure(type(error).__name__, str(error), getattr(error, "exit_code", 1))
    end.send(result)
