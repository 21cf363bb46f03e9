"""`elr evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from elrcli.cli.options import (
    BatchSize,
    Device,
    FollowLinks,
    Json,
    LabelColumn,
    PathColumn,
    Precision,
    Quiet,
    Root,
    Split,
    SplitColumn,
    Workers,
)
from elrcli.files import readable_json

if TYPE_CHECKING:
    from elrcli.engine.evaluate import Evaluation

CLASSES_IN_MATRIX = 12  # in a file; a terminal has as many as it is wide
CONFUSIONS = 10


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder written by `elr train`.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Labelled folder or CSV file.")],
    json_output: Json = False,
    quiet: Quiet = False,
    split: Split = None,
    path_column: PathColumn = "path",
    label_column: LabelColumn = "label",
    split_column: SplitColumn = "split",
    root: Root = None,
    follow_links: FollowLinks = False,
    batch_size: BatchSize = 64,
    workers: Workers = None,
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:
    """Accuracy, figures per class and confusions on labelled data."""
    from elrcli import api
    from elrcli.cli import console

    with console.watch(quiet) as observer:
        evaluation = api.evaluate(
            run,
            data,
            split=split,
            root=root,
            path_column=path_column,
            label_column=label_column,
            split_column=split_column,
            follow_links=follow_links,
            device=device,
            precision=precision,
            batch_size=batch_size,
            workers=workers,
            observer=observer,
        )
    if not quiet:
        console.say(*(f"left out: {path}: {reason}" for path, reason in evaluation.unreadable))
    if json_output:
        console.result(readable_json(evaluation.to_dict(), indent=2))
    else:
        room = console.terminal_width(stdout=True)
        console.result("\n".join(evaluation_lines(evaluation, room)))


def evaluation_lines(evaluation: Evaluation, room: int | None = None) -> list[str]:
    """Return an evaluation as text, for a terminal of so many columns or for a file."""
    from elrcli.cli.console import aligned

    lines = aligned(
        ("accuracy", f"{evaluation.accuracy:.2%}"),
        [
            ("balanced accuracy", f"{evaluation.balanced_accuracy:.2%}"),
            *_if_known("top-5 accuracy", evaluation.top5_accuracy),
            *_if_known("calibration error", evaluation.calibration_error),
            ("images", f"{evaluation.images:,}"),
            *([("left out", f"{len(evaluation.unreadable):,}")] if evaluation.unreadable else []),
        ],
    )
    header = ("class", "images", "precision", "recall", "f1")
    per_class = [
        (str(row["class"]), f"{row['images']:,}", *(_share(row[name]) for name in header[2:]))
        for row in evaluation.per_class
    ]
    return [*lines, "", *aligned(header, per_class), "", *_confusion_lines(evaluation, room)]


def _confusion_lines(evaluation: Evaluation, room: int | None) -> list[str]:
    """Return the confusion matrix, or its largest cells if it is too wide."""
    from elrcli.cli.console import aligned

    classes, confusion = evaluation.classes, evaluation.confusion
    if len(classes) <= CLASSES_IN_MATRIX:
        rows = [
            (name, *(f"{int(count):,}" for count in counts))
            for name, counts in zip(classes, confusion, strict=True)
        ]
        matrix = aligned(("label \\ predicted", *classes), rows)
        if room is None or len(matrix[0]) <= room:
            return matrix
    cells = [
        (int(confusion[i, j]), i, j) for i, j in zip(*confusion.nonzero(), strict=True) if i != j
    ]
    largest = sorted(cells, key=lambda cell: (-cell[0], cell[1], cell[2]))[:CONFUSIONS]
    rows = [(classes[i], classes[j], f"{count:,}") for count, i, j in largest]
    return aligned(("label", "predicted", "images"), rows, left=2)


def _if_known(name: str, value: float | None) -> list[tuple[str, str]]:
    return [] if value is None else [(name, f"{value:.2%}")]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
