"""`elr demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from elrcli.cli.options import Quiet, Seed

if TYPE_CHECKING:
    from elrcli.demo import DemoResult


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")] = Path("elr-demo"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the folder of an earlier demo.")
    ] = False,
    epochs: Annotated[
        int, typer.Option("--epochs", "-e", min=1, help="Passes over the training data.")
    ] = 12,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """The whole story on real handwritten digits, offline, on a CPU.

    Plants 30% wrong labels, trains with cross-entropy and with ELR, and audits.
    """
    from elrcli.cli import console
    from elrcli.demo import run_demo

    with console.watch(quiet) as observer:
        result = run_demo(out, seed=seed, epochs=epochs, overwrite=overwrite, observer=observer)
    console.result("\n".join(demo_lines(result)))


def demo_lines(result: DemoResult) -> list[str]:
    """Return what the demo showed."""
    from elrcli.cli.console import aligned

    names = {"ce": "cross-entropy", "elr": "ELR"}
    accuracy = [(names[method], f"{share:.1%}") for method, share in result.accuracy.items()]
    return [
        f"{result.planted:,} of {result.images:,} training labels were made wrong.",
        f"{result.flagged:,} labels are flagged; {result.found:,} of them are wrong:"
        f" {result.recall:.1%} of the errors found at {result.precision:.1%} precision.",
        "",
        *aligned(("trained with", "accuracy on clean test labels"), accuracy),
        "",
        f"report    {result.report}",
        f"run       {result.run}",
    ]
