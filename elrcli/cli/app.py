"""The `elr` program: its commands, and the one place where errors become exit codes."""

from __future__ import annotations

import codecs
import io
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from elrcli import __version__
from elrcli.cli.apply import apply
from elrcli.cli.audit import audit
from elrcli.cli.backbones import backbones
from elrcli.cli.demo import demo
from elrcli.cli.doctor import doctor
from elrcli.cli.evaluate import evaluate
from elrcli.cli.export import export
from elrcli.cli.help import Command
from elrcli.cli.noise import noise
from elrcli.cli.options import same_command
from elrcli.cli.predict import predict
from elrcli.cli.train import train
from elrcli.cli.tune import tune
from elrcli.engine.launch import launch
from elrcli.errors import (
    NO_ROOM,
    SAME_COMMAND,
    ElrError,
    EndedByAnother,
    Interrupted,
    NotWritten,
    legible,
)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"]},
)
COMMANDS = (
    train,
    predict,
    audit,
    apply,
    evaluate,
    export,
    noise,
    tune,
    backbones,
    doctor,
    demo,
)
for command in COMMANDS:
    app.command(cls=Command)(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"elr {__version__}")
        raise typer.Exit


@app.callback()
def elr(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and stop."
        ),
    ] = False,
) -> None:
    """Train image classifiers on noisy labels, and find the labels that are wrong."""


def main() -> None:
    """Run the program. An `ElrError` ends it with one line on stderr and its exit code.

    So does a path that cannot even be looked at, with exit code 1.
    """
    # Before torch is loaded: its threads wait in a busy loop otherwise, which makes training ten
    # times slower wherever other work competes for the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _open_streams()
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="surrogateescape")  # file names that are not UTF-8
    try:
        with _ended_by_sigterm(), _results_of_the_first_process(), _stdout_flushed():
            app(prog_name="elr")
    except EndedByAnother as error:
        sys.exit(error.exit_code)
    except Interrupted as error:
        _end(str(error).replace(SAME_COMMAND, same_command()), error.exit_code)
    except ElrError as error:
        _end(str(error), error.exit_code)
    except UnicodeEncodeError as error:
        if not _is_of_stdout(error):
            raise
        character = error.object[error.start]
        _end(f"stdout: no {character!r} in {error.encoding}. Set PYTHONIOENCODING=utf-8.", 1)
    except OSError as error:
        if error.filename is None or error.errno in NO_ROOM:
            raise
        place = legible(str(error.filename))  # in a locked folder, or with too long a name
        _end(f"{place}: {error.strerror}. Check the path and who may use it.", 1)
    except KeyboardInterrupt:
        sys.exit(130)


def _end(message: str, exit_code: int) -> NoReturn:
    from elrcli.cli import console

    console.error(message)
    sys.exit(exit_code)


class _Log(io.FileIO):
    """Stderr of a program whose work goes on where it cannot be written, as with a full disk."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def _open_streams() -> None:
    """Let streams that were closed hold nothing, and make a log of stderr."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    stderr = sys.__stderr__
    if stderr is not None and sys.stderr is stderr:
        log = io.BufferedWriter(_Log(stderr.fileno(), "w", closefd=False))
        sys.stderr = io.TextIOWrapper(log, stderr.encoding, stderr.errors, line_buffering=True)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Clean up after SIGTERM as after Ctrl-C; a second one ends the program at once.

    By default nothing is cleaned up, and the first process of a container does not even end.
    Processes of torchrun may wait for each other where no handler of Python is heard.
    """
    if launch().processes > 1:
        yield
        return

    def end(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(number, signal.SIG_DFL)
        files = (each.f_code.co_filename for each, _ in traceback.walk_stack(frame))
        if any(file.startswith("<frozen importlib") for file in files):
            os._exit(128 + number)  # torch aborts where one of its imports raises something
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _results_of_the_first_process() -> Iterator[None]:
    """Leave stdout to the first of the processes that torchrun started."""
    if launch().rank == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


@contextmanager
def _stdout_flushed() -> Iterator[None]:
    """Write what is left in the end; a reader that has gone away, as `head` does, is no error."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        is_gone = isinstance(error, BrokenPipeError)
        is_full = error.errno in NO_ROOM and error.filename is None  # no file that has a name
        if not (is_gone or is_full):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left
        if is_full:
            raise NotWritten(
                f"stdout: cannot be written ({error.strerror}). Make room, or write elsewhere."
            ) from None
        if isinstance(error.__context__, SystemExit):  # the command has ended with this code
            raise error.__context__ from None


def _is_of_stdout(error: UnicodeEncodeError) -> bool:
    """Tell whether stdout has an encoding without all characters, and it is what failed."""
    names = (sys.stdout.encoding or "utf-8", error.encoding)
    own, failed = (codecs.lookup(name).name for name in names)
    return own == failed != "utf-8"
