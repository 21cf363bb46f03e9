"""`elr audit`."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from elrcli.cli.options import (
    OUTPUT,
    Json,
    Quiet,
    given_settings,
    same_command,
    typed_options,
    was_given,
    with_some_settings,
)
from elrcli.config import AUDIT_SETTINGS, DATA, READING_SETTINGS, option_name
from elrcli.engine.launch import together
from elrcli.errors import Interrupted
from elrcli.files import readable_json

CONFUSIONS = 5
OF_THE_AUDIT = (  # options that no training takes
    "table_format",
    "threshold",
    "fail_above",
    "report",
    "report_images",
    "json_output",
    "quiet",
)
GATE_EXIT_CODE = 3
TRAINING_SETTINGS = (
    "val_fraction",
    "max_unreadable",
    "backbone",
    "pretrained",
    "weights",
    "small_input",
    "method",
    "epochs",
    "batch_size",
    "accumulate",
    "lr",
    "image_size",
    "augment",
    "flip",
    "cache",
    "workers",
    "precision",
    "seed",
)


@with_some_settings((*READING_SETTINGS, *TRAINING_SETTINGS, "device"), AUDIT_SETTINGS)
def audit(
    context: typer.Context,
    target: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN|DATA",
            help="Folder written by `elr train`. Or images, one sub-folder per class or a CSV file:"
            " then a run is trained first.",
            show_default="newest in runs/",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder to write; a run that is trained for it goes into its folder run.",
            rich_help_panel=OUTPUT,
            show_default="RUN/audit, with --data a new one in runs/",
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Train anew where --out holds a run.", rich_help_panel=OUTPUT
        ),
    ] = False,
    table_format: Annotated[
        Literal["csv", "parquet", "jsonl"],
        typer.Option("--format", help="Kind of the table.", rich_help_panel=OUTPUT),
    ] = "csv",
    threshold: Annotated[
        float,
        typer.Option(
            "--threshold",
            min=0.0,
            max=1.0,
            help="Error probability from which a label is flagged.",
            rich_help_panel=OUTPUT,
        ),
    ] = 0.5,
    fail_above: Annotated[
        float | None,
        typer.Option(
            "--fail-above",
            min=0.0,
            max=1.0,
            help="Exit with code 3 if the estimated share of wrong labels is larger.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    report: Annotated[
        bool,
        typer.Option("--report/--no-report", help="Write report.html.", rich_help_panel=OUTPUT),
    ] = True,
    report_images: Annotated[
        int | None,
        typer.Option(
            "--report-images",
            min=1,
            help="Suspects in the report.",
            rich_help_panel=OUTPUT,
            show_default="500",
        ),
    ] = None,
    json_output: Json = False,
    quiet: Quiet = False,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="Rank the labels of this folder or CSV instead of the run's own.",
            rich_help_panel=DATA,
        ),
    ] = None,
    truth: Annotated[
        Path | None,
        typer.Option(
            "--truth",
            help="CSV file with true labels: adds AUROC, AP and P@N.",
            rich_help_panel=DATA,
        ),
    ] = None,
    truth_column: Annotated[
        str | None,
        typer.Option(
            "--truth-column",
            help="Column with the true label, in --truth or in DATA.",
            rich_help_panel=DATA,
        ),
    ] = None,
    **settings: Any,
) -> None:
    """Rank the labels that look wrong and make a review page.

    Writes a table and a summary too. Images need no run: one is trained for the audit.
    """
    from elrcli import api
    from elrcli.cli import console
    from elrcli.run import RunFolder, newest_run

    given = given_settings(context, settings)
    target = newest_run() if target is None else target
    trains = not RunFolder(target).is_run()
    if not trains:
        unused = () if data is not None else (*READING_SETTINGS, "device")
        own = (*unused, *TRAINING_SETTINGS)
        _refuse_with_run(context, target, [name for name in given if name in own])
    elif data is not None:
        raise typer.BadParameter(f"{target} is no run. Name one.", param_hint="--data")

    with together():
        try:
            with console.watch(quiet) as observer:
                result = api.audit_labels(
                    target,
                    out=out,
                    overwrite=overwrite,
                    data=data,
                    truth=truth,
                    truth_column=truth_column,
                    threshold=threshold,
                    format=table_format,
                    report=report,
                    report_images=report_images,
                    observer=observer,
                    **given,
                )
        except Interrupted as error:
            if not trains or out is not None:
                raise Interrupted(error.signal_number, same_command()) from None
            names = OF_THE_AUDIT if truth is None else (*OF_THE_AUDIT, "truth", "truth_column")
            options = shlex.join(typed_options(context, names))
            command = f"{error.command} {options}".rstrip()
            raise Interrupted(error.signal_number, command) from None
        summary = result.summary
        if not quiet:
            assert result.folder is not None
            say_audit(summary, result.folder / f"audit.{table_format}", report=report)
            if trains:
                console.say(f"  run       {summary['run']}")
            if data is None and report:
                # Of a run that was trained for it, --out holds both the run and the audit.
                place = out if trains and out is not None else summary["run"]
                command = shlex.join(["elr", "apply", str(place), "decisions.csv"])
                console.say(f"  next      {command} --out corrected.csv")
        if json_output:
            console.result(readable_json(summary, indent=2))
    share = summary["estimated_error_rate"]
    if fail_above is not None and share > fail_above:
        if not console.speaks():  # torchrun would end the one that does
            return
        console.error(
            f"{100 * share:.4g}% of the labels are estimated to be wrong,"
            f" more than --fail-above {fail_above:g}."
        )
        raise typer.Exit(GATE_EXIT_CODE)


def _refuse_with_run(context: typer.Context, run: Path, given: Collection[str]) -> None:
    """A run has its own data and settings: nothing typed beside it may be ignored."""
    others = [option_name(name) for name in given]
    others += ["--overwrite"] if was_given(context, "overwrite") else []
    if others:
        raise typer.BadParameter(
            f"{run} has its own data and settings. Leave out {', '.join(others)}.",
            param_hint="RUN",
        )


def say_audit(summary: Mapping[str, Any], table: Path, *, report: bool) -> None:
    """Show what an audit found."""
    from elrcli.audit.report import headline
    from elrcli.cli.console import aligned, say, terminal_width

    say("", *headline(summary))
    say(*summary.get("cautions", []), style="yellow")
    confused = [
        (row["given"], row["true"], f"{row['samples']:,.0f}")
        for row in summary["most_confused"][:CONFUSIONS]
    ]
    if confused:
        say("", *aligned(("labelled", "probably", "images"), confused, left=2))
    if summary["top_suspects"]:
        say("", *suspect_lines(summary["top_suspects"], terminal_width()))
    if summary.get("truth"):
        say("", f"against the true labels: {_truth_figures(summary['truth'])}")
    say("", f"  table     {table}")
    if report:
        say(f"  look at   {table.with_name('report.html')}")


def suspect_lines(suspects: Sequence[Mapping[str, Any]], room: int | None) -> list[str]:
    """Return a table of suspects; in `room` columns, long names lose a part of their middle."""
    from elrcli.cli.console import aligned, cut

    titles = ("most suspicious", "label", "suggested", "probability")
    rows = [
        (row["path"], row["label"], _suggestion(row), f"{row['error_probability']:.0%}")
        for row in suspects
    ]
    path_width = max(len(row[0]) for row in rows)
    name_width = max(len(name) for row in rows for name in row[1:3])
    while True:
        cells = [
            (cut(path, path_width), cut(label, name_width), cut(suggested, name_width), share)
            for path, label, suggested, share in rows
        ]
        lines = aligned(titles, cells, left=3)
        if room is None or len(lines[0]) <= room:
            return lines
        if path_width > len(titles[0]):
            path_width -= 1
        elif name_width > len(titles[2]):
            name_width -= 1
        else:
            return lines


def _suggestion(row: Mapping[str, Any]) -> str:
    return "-" if row["suggested"] == row["label"] else str(row["suggested"])


def _truth_figures(figures: Mapping[str, float | None]) -> str:
    shown = [f"{figures['errors']:,} errors in {figures['samples']:,} samples"]
    for name, title in (("auroc", "AUROC"), ("ap", "AP"), ("p_at_n", "P@N")):
        if (value := figures[name]) is not None:
            shown.append(f"{title} {value:.3f}")
    return ", ".join(shown)
