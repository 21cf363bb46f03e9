"""How `--help` looks: options in groups, each with its text beside it, on narrow terminals too."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand

NAMES = 26  # columns for options; a longer one has a line of its own


class Command(TyperCommand):
    """A command whose options are listed in the panels that they name."""

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
