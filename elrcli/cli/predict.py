"""`elr predict`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from elrcli.cli.options import (
    OUTPUT,
    BatchSize,
    Device,
    FollowLinks,
    PathColumn,
    Precision,
    Quiet,
    Root,
    Workers,
)
from elrcli.engine.launch import together
from elrcli.errors import ConfigError, UsageError


def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder written by `elr train`.")],
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGES", help="Files, folders, patterns, a CSV file, or - for paths on stdin."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="File to write: .csv, .jsonl or .parquet.",
            rich_help_panel=OUTPUT,
            show_default="CSV on stdout",
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace a file of that name.", rich_help_panel=OUTPUT),
    ] = False,
    top_k: Annotated[
        int,
        typer.Option(
            "--top-k", min=1, help="Likeliest classes in each row.", rich_help_panel=OUTPUT
        ),
    ] = 1,
    probabilities: Annotated[
        bool,
        typer.Option(
            "--probabilities",
            help="Add the probability of every class, p_<class>.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    quiet: Quiet = False,
    path_column: PathColumn = "path",
    root: Root = None,
    follow_links: FollowLinks = False,
    batch_size: BatchSize = 64,
    workers: Workers = None,
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:
    """Classify images: path, label, confidence.

    An image that cannot be read gets a row that says why, and the exit code is 1.
    """
    from elrcli import api
    from elrcli.cli import console
    from elrcli.run import RunFolder
    from elrcli.tables import table_format, write_csv, write_table

    columns = api.prediction_columns(RunFolder.open(run).classes(), top_k, probabilities)
    if out is None and overwrite:
        raise UsageError("--overwrite: needs --out FILE.")
    if out is not None:
        table_format(out)
        if any(os.path.exists(name) and out.exists() and out.samefile(name) for name in images):
            raise ConfigError(f"{out}: is what is to be predicted. Choose another --out.")
        if out.exists() and not overwrite:
            raise ConfigError(f"{out}: exists. Add --overwrite, or choose another --out.")
    api.refuse_shared_stdin(images)  # before the processes meet
    done = unreadable = 0

    def counted(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        nonlocal done, unreadable
        for row in rows:
            done += 1
            unreadable += row["error"] is not None
            yield row

    rows_are_visible = out is None and sys.stdout.isatty()
    with together(), console.watch(quiet or rows_are_visible) as observer:
        rows = counted(
            api.predict(
                run,
                images,
                top_k=top_k,
                probabilities=probabilities,
                root=root,
                path_column=path_column,
                follow_links=follow_links,
                device=device,
                precision=precision,
                batch_size=batch_size,
                workers=workers,
                observer=observer,
            )
        )
        if out is None or not console.speaks():
            try:
                write_csv(sys.stdout, columns, rows)
            except BrokenPipeError:  # a reader that has enough, as `head` has
                return
        else:
            write_table(out, columns, rows)
    if out is not None and not quiet:
        found = console.counted(done - unreadable, "prediction")
        left_out = f" and {console.counted(unreadable, 'unreadable image')}" if unreadable else ""
        console.say(f"{found}{left_out} in {out}")
    if unreadable and console.speaks():  # of several processes one says so: torchrun ends the rest
        failed = f"{unreadable} of {done} images could not be classified."
        console.error(f"{failed} The column 'error' says why.")
        raise typer.Exit(1)
