from __future__ import annotations

from pathlib import Path

import pytest
import torch

from elrcli.engine import memory as module
from elrcli.engine.launch import Launch
from elrcli.engine.memory import free_host_memory, free_memory, total_host_memory, total_memory

CPU = torch.device("cpu")


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Path:
    """A machine with 8,000,000 kB of free memory, without containers."""
    (tmp_path / "meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable:   8000000 kB\n")
    monkeypatch.setattr(module, "MEMINFO", tmp_path / "meminfo")
    files = tuple(str(tmp_path / name) for name in ("max", "current", "stat"))
    monkeypatch.setattr(module, "CGROUPS", (files,))
    return tmp_path


def test_the_memory_that_the_system_calls_available(machine):
    assert free_host_memory() == 8_192_000_000


def test_a_container_may_leave_less(machine):
    (machine / "max").write_text("3000\n")
    (machine / "current").write_text("2500\n")
    (machine / "stat").write_text("anon 1000\nfile 1500\ninactive_file 1200\n")
    assert free_host_memory() == 1700  # cached files can be forgotten
    (machine / "max").write_text("max\n")
    assert free_host_memory() == 8_192_000_000


def test_a_full_container_leaves_next_to_nothing(machine):
    for name, text in (("max", "3000"), ("current", "3500"), ("stat", "")):
        (machine / name).write_text(text)
    assert free_host_memory() == 1


def test_processes_share_a_machine(machine, monkeypatch):
    monkeypatch.setattr(module, "launch", lambda: Launch(0, 8, 0, 4))
    assert free_memory(CPU) == 2_048_000_000


def test_elsewhere_half_of_all_memory_is_taken_as_free(machine):
    (machine / "meminfo").unlink()
    assert free_host_memory() > 0


def test_all_memory_is_that_of_the_machine_or_the_container(machine):
    whole = total_host_memory()
    assert whole == total_memory(CPU) > 10_000_000
    (machine / "max").write_text("max\n")
    assert total_host_memory() == whole
    (machine / "max").write_text("3000\n")
    assert total_host_memory() == 3000


def test_this_machine_has_memory():
    assert free_memory(CPU) > 10_000_000
