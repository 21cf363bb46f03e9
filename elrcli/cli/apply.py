"""`elr apply`."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from elrcli.cli.options import Quiet
from elrcli.config import TrainConfig, option_name
from elrcli.errors import legible

if TYPE_CHECKING:
    from elrcli.audit.apply import Plan


def apply(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder written by `elr train` or `elr audit`.")
    ],
    decisions: Annotated[
        Path | None,
        typer.Argument(
            metavar="DECISIONS", help="decisions.csv from the review page.", show_default="none"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="File to write (.csv), or folder of class folders."),
    ] = None,
    mode: Annotated[
        Literal["copy", "hardlink", "symlink"] | None,
        typer.Option("--mode", help="How images get into the folder.", show_default="copy"),
    ] = None,
    accept_above: Annotated[
        float | None,
        typer.Option(
            "--accept-above",
            min=0.0,
            max=1.0,
            help="Take the suggestion for labels without a decision from this error probability.",
        ),
    ] = None,
    skip_foreign: Annotated[
        bool,
        typer.Option(
            "--skip-foreign",
            help="Leave out decisions on images or labels that the run does not have.",
        ),
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(help="Where the data of the run is now.", show_default="where it was"),
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(
            help="Folder that the paths in a CSV file start from.", show_default="where it was"
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print the changes, as CSV on stdout.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Write a corrected dataset from reviewed decisions.

    Your own files stay as they are.
    """
    from elrcli.api import apply_decisions
    from elrcli.audit.apply import CHANGE_COLUMNS
    from elrcli.cli import console
    from elrcli.tables import write_csv

    plan = apply_decisions(
        run,
        decisions,
        out=out,
        mode=mode,
        accept_above=accept_above,
        skip_foreign=skip_foreign,
        data=data,
        root=root,
        dry_run=dry_run,
    )
    if not quiet:
        is_folder = out is not None and out.suffix.lower() != ".csv"
        console.say(*plan_lines(plan, is_folder=is_folder))
    if dry_run:
        write_csv(sys.stdout, CHANGE_COLUMNS, plan.change_rows())
        return
    assert out is not None
    if not quiet:
        console.say(f"  next      {train_command(plan, out)}")
    console.result(out)


def train_command(plan: Plan, out: Path) -> str:
    """Return how to train on what was written."""
    words = ["elr", "train", str(out)]
    settings = asdict(plan.reading) | {"truth_column": plan.truth_column}
    for name, value in settings.items():
        if value not in (None, getattr(TrainConfig, name)):
            words += [option_name(name)] if value is True else [option_name(name), str(value)]
    return shlex.join(words)


def plan_lines(plan: Plan, *, is_folder: bool) -> list[str]:
    """Return what was decided and what it changes, and what a folder would not show."""
    decided = [f"{count:,} {name}" for name, count in sorted(plan.decided.items())]
    removed = len(plan.manifest) - len(plan.rows)
    lines = [
        f"decided: {', '.join(decided) or 'nothing'}",
        f"{len(plan.changes) - removed:,} labels changed, {removed:,} of {len(plan.manifest):,} "
        "samples removed",
    ]
    if plan.skipped:
        lines.append(f"{plan.skipped:,} decisions left out: not of this run")
    if plan.added:
        lines.append(
            f"{plan.added:,} images came to the data after the training: not in the output"
        )
    if is_folder and plan.unseen:
        lines.append(
            f"{plan.unseen:,} images will not be found in a folder: their names begin with a dot or"
            " lack an ending such as .jpg. A CSV file lists them too"
        )
    if plan.emptied:
        lines.append(f"no samples are left in: {', '.join(map(legible, plan.emptied))}")
    return lines
