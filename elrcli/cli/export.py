"""`elr export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from elrcli.cli.options import OUTPUT, Quiet


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder written by `elr train`.")],
    format: Annotated[
        Literal["onnx", "safetensors"] | None,
        typer.Option(
            "--format",
            help="onnx: a graph from pixels to probabilities. safetensors: weights for timm.",
            rich_help_panel=OUTPUT,
            show_default="by the suffix of --out, else onnx",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="File to write: .onnx, or .safetensors and a config.json beside it.",
            rich_help_panel=OUTPUT,
            show_default="RUN/export/model.FORMAT",
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace a file of that name.", rich_help_panel=OUTPUT),
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Write the network as ONNX, or as weights for timm."""
    from elrcli import api
    from elrcli.cli import console

    file = api.export(run, out, format=format, overwrite=overwrite)
    if not quiet:
        console.say(*usage_lines(file))
    console.result(file)


def usage_lines(file: Path) -> list[str]:
    """Return how an exported file is used."""
    if file.suffix.lower() == ".onnx":
        return [
            "images         float32 [N, 3, S, S], RGB, 0 to 1",
            "probabilities  float32 [N, K]",
        ]
    return [
        f"settings  {file.parent / 'config.json'}",
        f"timm      timm.create_model({'local-dir:' + str(file.parent)!r}, pretrained=True)",
    ]
