"""`elr train`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elrcli.cli.options import OUTPUT, Quiet, given_settings, was_given, with_settings
from elrcli.config import MACHINE_SETTINGS, TrainConfig, option_name, read_toml
from elrcli.files import readable_json
from elrcli.presets import PRESETS, with_preset

if TYPE_CHECKING:
    from elrcli.run import RunFolder

SETTINGS = "Settings"  # where they come from; each has a panel of its own


def _presets(incomplete: str) -> list[str]:
    return [name for name in PRESETS if name.startswith(incomplete)]


@with_settings
def train(
    context: typer.Context,
    data: Annotated[
        Path | None,
        typer.Argument(
            metavar="DATA",
            help="Folder with one sub-folder per class, or a CSV file.",
            show_default=False,
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            metavar="NAME",
            autocompletion=_presets,
            help=f"Settings of the paper: {', '.join(PRESETS)}. --config and options win.",
            rich_help_panel=SETTINGS,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="Settings as TOML; options win.", rich_help_panel=SETTINGS),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Run folder to write.",
            rich_help_panel=OUTPUT,
            show_default="runs/<data>-<backbone>-<time>",
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace an existing run.", rich_help_panel=OUTPUT),
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume",
            metavar="RUN",
            help="Continue an interrupted run where it stopped, perhaps with other --device,"
            " --workers, --cache, --table-device, --compile or --checkpoint-minutes.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    show_config: Annotated[
        bool,
        typer.Option(
            "--show-config", help="Print the settings as JSON and stop.", rich_help_panel=SETTINGS
        ),
    ] = False,
    quiet: Quiet = False,
    **settings: Any,
) -> None:
    """Fine-tune a backbone on labels that are partly wrong.

    Prints the run folder on stdout.
    """
    from elrcli.cli import console

    given = given_settings(context, settings)
    if resume is not None:
        _refuse_with_resume(context, given)
    else:
        values = read_toml(config) if config is not None else {}
        values |= given
        if preset is not None:
            values = with_preset(preset, values)
        if data is not None:
            values["data"] = data
        if "data" not in values:
            raise typer.BadParameter("name a folder or a CSV file.", param_hint="DATA")
        chosen = TrainConfig(**values)
        if show_config:
            console.result(readable_json(chosen.to_dict(), indent=2))
            return

    from elrcli import api

    with console.watch(quiet) as observer:
        if resume is not None:
            run = api.resume(resume, observer=observer, **given)
        else:
            run = api.train_as(chosen, out, overwrite=overwrite, observer=observer)
    if not quiet:
        console.say(*closing_lines(run))
    console.result(run.path)


def _refuse_with_resume(context: typer.Context, given: dict[str, Any]) -> None:
    """A run is continued with its own settings: nothing typed beside it may be ignored.

    But for those of the machine, which may be another one now.
    """
    others = [option_name(name) for name in given if name not in MACHINE_SETTINGS]
    own = {
        "data": "DATA",
        "preset": "--preset",
        "config": "--config",
        "out": "--out",
        "overwrite": "--overwrite",
        "show_config": "--show-config",
    }
    others += [option for name, option in own.items() if was_given(context, name)]
    if others:
        raise typer.BadParameter(
            f"a run is continued with its own settings. Leave out {', '.join(others)}.",
            param_hint="--resume",
        )


def closing_lines(run: RunFolder) -> list[str]:
    """Return how a finished run went and what to do with it."""
    from elrcli.cli.console import clock, counted

    rows = run.metrics()
    lines = [""]
    if rows:
        seconds = sum(row.get("seconds") or 0.0 for row in rows)
        agreement = rows[-1].get("val_agreement")
        held_out = ""
        if agreement is not None:
            held_out = f", {agreement:.1%} of the validation labels predicted"
        lines += [f"Trained {counted(len(rows), 'epoch')} in {clock(seconds)}{held_out}."]
    folder = shlex.quote(str(run.path))
    return [
        *lines,
        f"  curves    {run.curves_file}",
        f"  next      elr audit {folder}",
        f"            elr predict {folder} image.jpg",
    ]
