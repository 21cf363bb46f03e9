"""The errors a user can mend. Each message names the place, the problem and the remedy.

The command line maps them to exit codes in one place, `elrcli.cli.app.main`.
"""

from __future__ import annotations

import difflib
import errno
import signal
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
SHOWN = 5  # bad rows, missing files, loose names that one message lists
MOST_PROBLEMS = 1000  # of one kind, after which no more are looked for


def printable(text: str) -> str:
    """Return text that a terminal shows and does not obey.

    Control characters, marks that turn the reading direction and bytes that are not UTF-8 are
    escaped, as in `\\x1b`.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_text(name: str) -> bool:
    """Tell text from bytes that are not UTF-8 and from NUL, which a wrong encoding leaves."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return "\0" not in name


def folded(name: str) -> str:
    """Return what names have in common that a person or a file system takes for the same."""
    return unicodedata.normalize("NFC", name).casefold()


def legible(name: str) -> str:
    """Return a name for a message: printable, and cut where it is very long."""
    return printable(name if len(name) <= 200 else f"{name[:200]}...")


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its kind where it says nothing."""
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def named(names: Sequence[str]) -> str:
    """Return the first names of a list, and how many there are beyond."""
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Say that a name is not among the known ones, and which may be meant."""
    known = sorted(known)
    hint = did_you_mean(name, known) or f" Known: {named([legible(each) for each in known])}."
    composed = unicodedata.normalize("NFC", name)
    if not name.isascii() and any(unicodedata.normalize("NFC", x) == composed for x in known):
        hint = " It is there in another Unicode form. Rename one of them."
    return f"unknown {kind} '{legible(name)}'.{hint}"


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Return a hint at the known name that is most alike, after a space, or nothing."""
    close = difflib.get_close_matches(name[:200], known[:2000], n=1)
    return f" Did you mean '{legible(close[0])}'?" if close else ""


def listed(problems: Sequence[str], count: int | None = None, shown: int = SHOWN) -> str:
    """Return the first problems, one a line, and how many there are beyond, of `count` in all."""
    is_cut = count is None and len(problems) >= MOST_PROBLEMS
    more = (len(problems) if count is None else count) - shown
    if more <= 0:
        return "\n".join(problems)
    at_least = "at least " if is_cut else ""
    return "\n".join([*problems[:shown], f"and {at_least}{more} more"])


class ElrError(Exception):
    """Base of every error that `elr` reports in one line, without a traceback."""

    exit_code = 1


class ConfigError(ElrError):
    """A setting has a value that cannot work."""


class UsageError(ConfigError):
    """What was asked for is incomplete, or says one thing twice."""

    exit_code = 2


class DataError(ElrError):
    """A folder, a CSV file or an image cannot be used as given."""


class ModelError(ElrError):
    """A backbone, its weights or the device cannot be used as asked."""


class RunError(ElrError):
    """A run folder is missing, incomplete, or in the way."""


class NotWritten(RunError):
    """A file of a run cannot be written; what was there before is intact."""


def cannot_be_written(path: Path | str, error: OSError) -> str:
    """Say that a file or folder cannot be written, why, and what to do about it."""
    remedy = "Check the path."
    if error.errno in NO_ROOM:
        remedy = "Make room there."
    elif error.errno in NOT_ALLOWED:
        remedy = "Check who may write there."
    return f"{path}: cannot be written ({error.strerror or error}). {remedy}"


class TrainingError(ElrError):
    """Training cannot go on; the last saved state is intact."""


class OutOfMemory(ElrError):
    """The device has too little memory for what it is asked to do."""


class EndedByAnother(ElrError):
    """Another process of the same training failed first, and says why."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("another process failed first")
        self.exit_code = exit_code


SAME_COMMAND = "the same command"  # in a message, for what only the command line knows


class Interrupted(ElrError):
    """A signal ended the work after the state was saved; `command` goes on with it.

    `signal_number` 2 (SIGINT) gives exit code 130, 15 (SIGTERM) gives 143.
    """

    def __init__(self, signal_number: int, command: str) -> None:
        name = signal.Signals(signal_number).name
        super().__init__(f"stopped by {name}. Continue with: {command}")
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number
        self.command = command
