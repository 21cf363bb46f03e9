"""Options that several commands share, and those made from the training settings."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from elrcli.config import DATA, MACHINE, TrainConfig, option_name, setting_types

OUTPUT = "Output"
TYPES = setting_types()

Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Show only errors and the result.", rich_help_panel=OUTPUT),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on stdout.", rich_help_panel=OUTPUT)
]


def _setting(name: str, *, has_own_default: bool = False) -> Any:
    """Return the `typer.Option` of one training setting."""
    spec = next(spec for spec in dataclasses.fields(TrainConfig) if spec.name == name)
    facts: Mapping[str, Any] = spec.metadata
    flag = option_name(name)
    kind = TYPES[name]
    if kind is bool:
        flag = f"{flag}/--no-{flag.removeprefix('--')}"
    extra: dict[str, Any] = {}
    if kind in (int, float):
        extra = {"min": facts["low"], "max": facts["high"]}
    elif kind is tuple:
        extra = {"parser": numbers, "metavar": "A,B,..."}
    if facts["word"]:
        extra = {"parser": _number_or(facts["word"], facts["low"])}
        extra["metavar"] = f"<integer|{facts['word']}>"
    if facts["auto"] and not has_own_default:
        extra["show_default"] = facts["auto"]
    return typer.Option(
        flag,
        *([facts["short"]] if facts["short"] else []),
        help=facts["help"],
        rich_help_panel=facts["panel"],
        **extra,
    )


def same_command() -> str:
    """Return what was typed, without --overwrite: with --out it goes on where it was stopped."""
    return shlex.join(["elr", *(word for word in sys.argv[1:] if word != "--overwrite")])


def typed_options(context: typer.Context, names: Collection[str]) -> list[str]:
    """Return the options among `names` that were typed, as words of a command line."""
    words: list[str] = []
    for option in context.command.params:
        if option.name in names and was_given(context, str(option.name)):
            value = context.params[str(option.name)]
            if isinstance(value, bool):
                words.append(option.opts[0] if value else option.secondary_opts[0])
            else:
                words += [option.opts[0], str(value)]
    return words


def numbers(text: str) -> tuple[float, ...]:
    """Return the numbers of a list such as 40,80."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r}: expected numbers, such as 40,80.") from None


def _number_or(word: str, low: int) -> Callable[[str], int | str]:
    def whole_number(text: str) -> int | str:
        if text == word:
            return text
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if number < low:
            message = f"{text!r}: expected a whole number from {low}, or {word}."
            raise typer.BadParameter(message)
        return number

    return whole_number


Root = Annotated[Path | None, _setting("root")]
PathColumn = Annotated[str, _setting("path_column")]
LabelColumn = Annotated[str, _setting("label_column")]
SplitColumn = Annotated[str, _setting("split_column")]
FollowLinks = Annotated[bool, _setting("follow_links")]
Device = Annotated[str, _setting("device")]
Precision = Annotated[Literal["auto", "fp32", "bf16", "fp16"], _setting("precision")]
Workers = Annotated[int | None, _setting("workers")]
BatchSize = Annotated[
    int, typer.Option("--batch-size", min=1, help="Images per step.", rich_help_panel=MACHINE)
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the draw.")]
Split = Annotated[
    Literal["train", "val", "test"] | None,
    typer.Option(
        "--split",
        help="Use only this part of the data.",
        rich_help_panel=DATA,
        show_default="all",
    ),
]


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option per training setting in place of its `**settings`."""
    names = [spec.name for spec in dataclasses.fields(TrainConfig) if spec.name != "data"]
    return with_some_settings(names, {})(command)


def with_some_settings(
    names: Collection[str], defaults: Mapping[str, Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command options for the settings in `names`, some with defaults of its own."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        settings = [
            inspect.Parameter(
                spec.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=_default(defaults.get(spec.name, spec.default)),
                annotation=Annotated[
                    _annotation(spec), _setting(spec.name, has_own_default=spec.name in defaults)
                ],
            )
            for spec in dataclasses.fields(TrainConfig)
            if spec.name in names
        ]
        command.__signature__ = inspect.Signature(own + settings)  # type: ignore[attr-defined]
        return command

    return decorate


def given_settings(context: typer.Context, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return only the settings that the person typed."""
    return {name: value for name, value in settings.items() if was_given(context, name)}


def was_given(context: typer.Context, name: str) -> bool:
    """Tell whether an option or argument was typed, rather than left at its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _annotation(spec: dataclasses.Field[Any]) -> Any:
    kind = TYPES[spec.name]
    if kind is tuple or spec.metadata["word"]:
        return Any
    plain: Any = Literal[spec.metadata["choices"]] if spec.metadata["choices"] else kind
    return plain | None if spec.default is None else plain


def _default(value: Any) -> Any:
    return ",".join(f"{number:g}" for number in value) if isinstance(value, tuple) else value
