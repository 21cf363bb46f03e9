"""`elr tune`."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elrcli.cli.options import (
    OUTPUT,
    Json,
    Quiet,
    given_settings,
    numbers,
    was_given,
    with_some_settings,
)
from elrcli.config import TUNED_SETTINGS, TrainConfig, option_name, plain_name
from elrcli.files import readable_json

if TYPE_CHECKING:
    from elrcli.engine.tune import Choice, TuneResult

SEARCH = "Search"
NOT_PASSED_ON = ("data", *TUNED_SETTINGS, "tensorboard")
PASSED_ON = [
    spec.name
    for spec in dataclasses.fields(TrainConfig)
    if spec.name not in NOT_PASSED_ON and not spec.metadata.get("only")  # methods without lambda
]


def _grid_option(flag: str, help: str, show_default: str) -> Any:
    return typer.Option(
        flag,
        parser=numbers,
        metavar="A,B,...",
        help=help,
        rich_help_panel=SEARCH,
        show_default=show_default,
    )


@with_some_settings(PASSED_ON, {})
def tune(
    context: typer.Context,
    data: Annotated[
        Path,
        typer.Argument(metavar="DATA", help="Folder with one sub-folder per class, or a CSV file."),
    ],
    lambdas: Annotated[Any, _grid_option("--lambdas", "Values of --lambda.", "1,3,7")] = None,
    betas: Annotated[Any, _grid_option("--betas", "Values of --beta.", "0.7,0.9")] = None,
    lrs: Annotated[
        Any,
        _grid_option("--lrs", "Values of --lr.", "0.3, 1 and 3 times the default of --lr"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder of the runs; a search in it goes on.",
            rich_help_panel=OUTPUT,
            show_default="runs/<data>-tune-<time>",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Search anew.", rich_help_panel=OUTPUT)
    ] = False,
    json_output: Json = False,
    quiet: Quiet = False,
    **settings: Any,
) -> None:
    """Search lambda, beta and learning rate with short runs.

    Prints a table, a pick and the command that trains with it. --epochs is the length of that
    training. Runs of an eighth of it choose the learning rate, longer ones lambda and beta.
    """
    from elrcli import api
    from elrcli.cli import console

    grid = {"lambdas": lambdas, "betas": betas, "lrs": lrs}
    with console.watch(quiet) as observer:
        result = api.tune(
            data,
            out=out,
            overwrite=overwrite,
            observer=observer,
            **{name: value for name, value in grid.items() if was_given(context, name)},
            **given_settings(context, settings),
        )
    command = shlex.join(train_command(result.config))
    if json_output:
        content = result.to_dict() | {"command": command}
        console.result(readable_json(content, indent=2))
    else:
        console.result("\n".join([*tune_lines(result), "", command]))


def tune_lines(result: TuneResult) -> list[str]:
    """Return what a search found."""
    from elrcli.cli.console import aligned

    lengths = sorted({trial.epochs for trial in result.trials})
    reached = {(trial.candidate, trial.epochs): trial.agreement for trial in result.trials}
    candidates = dict.fromkeys(trial.candidate for trial in result.trials)
    rows = [
        (
            *(f"{value:g}" for value in candidate),
            *(_share(reached, (candidate, epochs)) for epochs in lengths),
            "pick" if candidate == result.pick else "",
        )
        for candidate in candidates
    ]
    header = ("lambda", "beta", "lr", *(f"{epochs} epochs" for epochs in lengths), "")
    return [
        f"Share of {result.val_images:,} validation labels predicted, after",
        *aligned(header, rows, left=0),
        "",
        *(_reason(names, choice) for names, choice in result.choices.items()),
        f"The search took as much training as {result.cost:.0%} of its grid.",
    ]


def _reason(names: Sequence[str], choice: Choice) -> str:
    """Return what was picked in one step, and why."""
    pick, best = (
        ", ".join(f"{plain_name(name)} {getattr(each, name):g}" for name in names)
        for each in (choice.pick, choice.best)
    )
    if choice.within == 1:
        return f"{pick}: the best of {choice.compared}."
    alike = f"{choice.within} of {choice.compared} cannot be told apart"
    if pick == best:
        return f"{pick}: the best, but {alike}."
    return f"{pick}: the nearest to the defaults, for {alike}; {best} is ahead."


def _share(reached: dict[Any, float | None], key: tuple[Any, int]) -> str:
    agreement = reached.get(key, "")
    if agreement == "":
        return ""
    return "failed" if agreement is None else f"{agreement:.1%}"


def train_command(config: TrainConfig) -> Sequence[str]:
    """Return the `elr train` that makes `config`, the tuned settings always spelled out."""
    words = ["elr", "train", str(config.data)]
    for spec in dataclasses.fields(TrainConfig):
        value = getattr(config, spec.name)
        is_default = value == spec.default and spec.name not in TUNED_SETTINGS
        if spec.name == "data" or is_default:
            continue
        option = option_name(spec.name)
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option.removeprefix('--')}")
        elif isinstance(value, tuple):
            words += [option, ",".join(map(_exact, value))]
        else:
            words += [option, _exact(value)]
    return words


def _exact(value: Any) -> str:
    """Return a value as it is typed: 3 for 3.0, else every digit."""
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
