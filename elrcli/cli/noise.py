"""`elr noise`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from elrcli.cli.options import FollowLinks, LabelColumn, PathColumn, Quiet, Root, Seed, SplitColumn


def _pairs(text: str) -> tuple[str, str]:
    source, sign, target = text.partition("=")
    if not (source and sign and target):
        raise typer.BadParameter(f"{text!r}: expected two classes, such as cat=dog.")
    return source, target


def noise(
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="Folder or CSV file with clean labels.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="CSV file to write.")],
    kind: Annotated[
        Literal["symmetric", "asymmetric", "pair", "matrix", "instance"],
        typer.Option(
            "--kind",
            help="symmetric redraws labels from all classes; asymmetric follows --map; pair takes "
            "the next class; matrix draws from --matrix; instance depends on the picture.",
        ),
    ] = "symmetric",
    rate: Annotated[
        float | None,
        typer.Option(
            "--rate",
            min=0.0,
            max=1.0,
            help="Probability that a label is changed or redrawn; all kinds but matrix need it.",
            show_default=False,
        ),
    ] = None,
    mapping: Annotated[
        list[str] | None,
        typer.Option("--map", metavar="FROM=TO", help="For asymmetric; repeat it for more pairs."),
    ] = None,
    matrix: Annotated[
        Path | None,
        typer.Option(
            "--matrix",
            help="For matrix: CSV without header, one line per true class, P(given | true).",
        ),
    ] = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    path_column: PathColumn = "path",
    label_column: LabelColumn = "label",
    split_column: SplitColumn = "split",
    root: Root = None,
    follow_links: FollowLinks = False,
) -> None:
    """Write a CSV file with synthetic label noise, for experiments.

    Columns: path, label, true_label, and split where the data has splits.

    Only training labels are changed; validation and test labels stay clean.
    """
    pairs = [_pairs(text) for text in mapping or []]
    if len(dict(pairs)) < len(pairs):
        raise typer.BadParameter("a class turns into one other only.", param_hint="--map")

    from elrcli.api import make_noise
    from elrcli.cli import console

    with console.watch(quiet) as observer:
        noisy = make_noise(
            data,
            out,
            kind=kind,
            rate=rate,
            mapping=dict(pairs),
            matrix=matrix,
            seed=seed,
            root=root,
            path_column=path_column,
            label_column=label_column,
            split_column=split_column,
            follow_links=follow_links,
            observer=observer,
        )
    if not quiet:
        train = noisy.rows("train")
        wrong = int((noisy.labels != noisy.truth).sum())
        console.say(
            f"{wrong:,} of {len(train):,} training labels are now wrong"
            f" ({wrong / len(train):.1%}).",
            f"  next      elr train {shlex.quote(str(out))} --root {shlex.quote(str(noisy.root))}"
            f" --truth-column true_label{' --follow-links' if follow_links else ''}",
        )
    console.result(out)
