"""`elr audit`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from elrcli.cli.options import (
    OUTPUT,
    Device,
    Json,
    LabelColumn,
    PathColumn,
    Quiet,
    Root,
    SplitColumn,
)
from elrcli.config import DATA
from elrcli.errors import RunError

CONFUSIONS = 5
GATE_EXIT_CODE = 3


def audit(
    target: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RUN]", help="Folder written by `elr train`.", show_default="newest in runs/"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder to write.",
            rich_help_panel=OUTPUT,
            show_default="RUN/audit",
        ),
    ] = None,
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
        int,
        typer.Option(
            "--report-images", min=1, help="Suspects in the report.", rich_help_panel=OUTPUT
        ),
    ] = 500,
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
            "--truth-column", help="Column of --truth with the true label.", rich_help_panel=DATA
        ),
    ] = None,
    path_column: PathColumn = "path",
    label_column: LabelColumn = "label",
    split_column: SplitColumn = "split",
    root: Root = None,
    device: Device = "auto",
) -> None:
    """Rank the labels that a run disagrees with: table, summary, review page."""
    from elrcli.run import RunFolder, newest_run

    run = newest_run() if target is None else target
    if run.exists() and not (run / "config.json").is_file():
        raise RunError(f"{run}: not a run. Train one first: elr train {run}")

    from elrcli import api
    from elrcli.cli import console

    with console.watch(quiet) as observer:
        result = api.audit_labels(
            run,
            out=out,
            data=data,
            root=root,
            path_column=path_column,
            label_column=label_column,
            split_column=split_column,
            truth=truth,
            truth_column=truth_column,
            threshold=threshold,
            format=table_format,
            report=report,
            report_images=report_images,
            device=device,
            observer=observer,
        )
    summary = result.summary
    if not quiet:
        table = (out or RunFolder(run).audit_folder) / f"audit.{table_format}"
        console.say(*audit_lines(summary, table, report=report))
    if json_output:
        typer.echo(json.dumps(summary, indent=2, ensure_ascii=False))
    share = summary["estimated_error_rate"]
    if fail_above is not None and share > fail_above:
        console.error(
            f"{share:.1%} of the labels are estimated to be wrong, more than {fail_above:.1%}."
        )
        raise typer.Exit(GATE_EXIT_CODE)


def audit_lines(summary: Mapping[str, Any], table: Path, *, report: bool) -> list[str]:
    """Return what an audit found."""
    from elrcli.audit.report import headline
    from elrcli.cli.console import aligned

    lines = ["", *headline(summary)]
    confused = [
        (row["true"], row["given"], f"{row['samples']:,.0f}")
        for row in summary["most_confused"][:CONFUSIONS]
    ]
    if confused:
        lines += ["", *aligned(("probably", "labelled", "images"), confused, left=2)]
    suspects = [
        (row["path"], row["label"], row["suggested"], f"{row['error_probability']:.0%}")
        for row in summary["top_suspects"]
    ]
    if suspects:
        titles = ("most suspicious", "label", "suggested", "wrong with")
        lines += ["", *aligned(titles, suspects, left=3)]
    if summary.get("truth"):
        lines += ["", f"against the true labels: {_truth_figures(summary['truth'])}"]
    lines += ["", f"  table     {table}"]
    if report:
        lines.append(f"  look at   {table.with_name('report.html')}")
    return lines


def _truth_figures(figures: Mapping[str, float | None]) -> str:
    shown = [f"{figures['errors']:,} errors"]
    for name, title in (("auroc", "AUROC"), ("ap", "AP"), ("p_at_n", "P@N")):
        if (value := figures[name]) is not None:
            shown.append(f"{title} {value:.3f}")
    return ", ".join(shown)
