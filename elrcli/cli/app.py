"""The `elr` program: its commands, and the one place where errors become exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Annotated

import typer

from elrcli import __version__
from elrcli.cli.apply import apply
from elrcli.cli.audit import audit
from elrcli.cli.backbones import backbones
from elrcli.cli.demo import demo
from elrcli.cli.doctor import doctor
from elrcli.cli.evaluate import evaluate
from elrcli.cli.noise import noise
from elrcli.cli.predict import predict
from elrcli.cli.train import train
from elrcli.cli.tune import tune
from elrcli.engine.launch import launch
from elrcli.errors import ElrError, EndedByAnother

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
for command in (train, predict, audit, apply, evaluate, noise, tune, backbones, doctor, demo):
    app.command()(command)


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
    """Run the program. An `ElrError` ends it with one line on stderr and its exit code."""
    # Before torch is loaded: its threads wait in a busy loop otherwise, which makes training ten
    # times slower wherever other work competes for the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="surrogateescape")  # file names that are not UTF-8
    try:
        with _results_of_the_first_process():
            app(prog_name="elr")
    except EndedByAnother as error:
        sys.exit(error.exit_code)
    except ElrError as error:
        from elrcli.cli import console

        console.error(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        _flush_stdout()


@contextmanager
def _results_of_the_first_process() -> Iterator[None]:
    """Leave stdout to the first of the processes that torchrun started."""
    if launch().rank == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def _flush_stdout() -> None:
    """Write what is left; a reader that has gone away, as `head` does, is no error."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
