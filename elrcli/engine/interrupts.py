"""Ctrl-C and SIGTERM end the work at a safe point, not in the middle of it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from elrcli.errors import Interrupted

SETTLING_SECONDS = 0.1


@contextmanager
def interrupted_at_once(command: str) -> Iterator[None]:
    """Turn a signal that nothing waits for into `Interrupted`; `command` goes on with the work."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(signal.SIGINT, command) from None
    except SystemExit as error:  # how the program hears SIGTERM
        if error.code != 128 + signal.SIGTERM:
            raise
        raise Interrupted(signal.SIGTERM, command) from None


class StopSignals:
    """Context in which the first SIGINT or SIGTERM is only remembered.

    The second one acts at once. Outside the main thread signals are left alone.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}
        self._child_handler: Any = None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()
        if self._child_handler is not None:
            signal.signal(signal.SIGCHLD, self._child_handler)

    def settle(self) -> None:
        """Wait a moment for the rest of what one signal does to a whole process group.

        Loading processes may die of it before this one hears of it. Torch raises an error for
        each of them, in the middle of whatever runs; from now on it does not.
        """
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and self._child_handler is None:
            self._child_handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        time.sleep(SETTLING_SECONDS)

    def raise_if_received(self, command: str) -> None:
        """Raise `Interrupted` if a signal came in; `command` goes on with the work."""
        if self.received is not None:
            self.settle()
            raise Interrupted(self.received, command)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
