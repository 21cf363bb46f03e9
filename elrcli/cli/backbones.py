"""`elr backbones`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from elrcli.cli.options import Json


def backbones(
    pattern: Annotated[
        str,
        typer.Argument(
            metavar="PATTERN",
            help="Part of a name, or a pattern such as 'resnet*'.",
            show_default="all",
        ),
    ] = "",
    pretrained: Annotated[
        bool,
        typer.Option("--pretrained", help="Only backbones that have pretrained weights."),
    ] = False,
    json_output: Json = False,
) -> None:
    """List timm backbones, one name per line."""
    from elrcli.api import list_backbones
    from elrcli.cli import console
    from elrcli.errors import ModelError

    names = list_backbones(pattern, pretrained=pretrained)
    if json_output:
        console.result(json.dumps(names, indent=2))
    elif names:
        console.result("\n".join(names))
    if not names:
        raise ModelError(f"{pattern}: no backbone has such a name. Try a part, such as 'resnet'.")
