from __future__ import annotations

import os
import signal
import threading

import pytest

from elrcli.engine import interrupts
from elrcli.engine.interrupts import StopSignals
from elrcli.errors import Interrupted


def test_without_a_signal_nothing_happens():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        stop.raise_if_received("elr x")
    assert stop.received is None
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("number", "code", "name"), [(signal.SIGINT, 130, "SIGINT"), (signal.SIGTERM, 143, "SIGTERM")]
)
def test_the_first_signal_is_remembered(number, code, name):
    with StopSignals() as stop:
        os.kill(os.getpid(), number)
        with pytest.raises(
            Interrupted, match=rf"^stopped by {name}\. Continue with: elr x$"
        ) as caught:
            stop.raise_if_received("elr x")
    assert caught.value.exit_code == code


def test_the_second_signal_acts_at_once():
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.received == signal.SIGINT


def test_handlers_come_back_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), StopSignals():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_the_main_thread_signals_are_left_alone():
    seen = []

    def work() -> None:
        with StopSignals() as stop:
            seen.append((signal.getsignal(signal.SIGINT), stop.received))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, None)]


def test_children_that_die_while_stopping_raise_nothing(monkeypatch):
    def report(*arguments: object) -> None:
        raise RuntimeError("DataLoader worker is killed by signal: Terminated.")

    def work() -> None:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            stop.raise_if_received("Go on.")

    before = signal.signal(signal.SIGCHLD, report)
    monkeypatch.setattr(
        interrupts.time, "sleep", lambda seconds: os.kill(os.getpid(), signal.SIGCHLD)
    )
    try:
        with pytest.raises(Interrupted):
            work()
        assert signal.getsignal(signal.SIGCHLD) is report
    finally:
        signal.signal(signal.SIGCHLD, before)
