"""How a command speaks: `--help` in groups that fit narrow terminals, refusals in plain words."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand

NAMES = 26  # columns for options; a longer one has a line of its own


class Command(TyperCommand):
    """A command whose options are listed in the panels that they name."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read options and arguments; a value that cannot be is refused as settings are."""
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            error.message = _refusal(error)
            raise

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options panel by panel, in the order of the first of each."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                names, text = record
                usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
                panel = getattr(parameter, "rich_help_panel", None) or usual
                panels.setdefault(panel, []).append((names.replace(" range>", ">"), text))
        for title, lines in panels.items():
            with formatter.section(typer.style(title, bold=True)):
                formatter.write_dl(lines, col_max=NAMES)


def _refusal(error: typer.BadParameter) -> str:
    """Return what is wrong with a value; typer has pydantic check it, in words for programmers."""
    if not isinstance(error.__cause__, ValueError) or not hasattr(error.__cause__, "errors"):
        return error.message
    found = error.__cause__.errors()[0]
    limits = found.get("ctx", {})
    match found["type"]:
        case "greater_than_equal":
            problem = f"must be at least {limits['ge']:g}"
        case "less_than_equal":
            problem = f"must be at most {limits['le']:g}"
        case "int_parsing":
            problem = "expected a whole number"
        case "float_parsing":
            problem = "expected a number"
        case "value_error":  # a choice
            return error.message.removeprefix("Value error, ")
        case _:
            return error.message
    return f"{found['input']}: {problem}."
