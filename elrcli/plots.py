"""Pictures from numbers: the only module that imports matplotlib."""

from __future__ import annotations

import gc
import io
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

BLUE, ORANGE, GREEN, RED, GREY = "#2f6db3", "#d98324", "#3a8f5c", "#c0453b", "#8a8f98"
Rows = Sequence[Mapping[str, float | None]]


def curves_svg(metrics: Rows) -> str:
    """Return the rows of `metrics.csv` as a picture (SVG text)."""
    kinds = ("clean_right", "wrong_right")
    with_truth = any(row.get(name) is not None for row in metrics for name in kinds)
    figure = Figure(figsize=(12.0, 6.2 if with_truth else 3.2), layout="constrained")
    axes = figure.subplots(2 if with_truth else 1, 3, squeeze=False)
    _loss_panel(axes[0, 0], metrics)
    _agreement_panel(axes[0, 1], metrics)
    _change_panel(axes[0, 2], metrics)
    if with_truth:
        truth_panel(axes[1, 0], metrics, "clean")
        truth_panel(axes[1, 1], metrics, "wrong")
        _accuracy_panel(axes[1, 2], metrics)
    text = svg(figure)
    del figure, axes
    gc.collect()  # the parts of a figure refer to each other and would stay for long
    return text


def _loss_panel(axes: Axes, metrics: Rows) -> None:
    _draw(axes, metrics, "loss_ce", "given labels", BLUE)
    if any(row.get("loss_elr") for row in metrics):
        _draw(axes, metrics, "loss_elr", "ELR term", ORANGE)
        _draw(axes, metrics, "loss", "sum", GREY, style="--")
    _draw(axes, metrics, "val_loss", "validation", GREEN)
    finish(axes, "Loss", percent=False)


def _agreement_panel(axes: Axes, metrics: Rows) -> None:
    _draw(axes, metrics, "train_agreement", "prediction", BLUE)
    _draw(axes, metrics, "target_agreement", "target", ORANGE)
    _draw(axes, metrics, "val_agreement", "validation", GREEN)
    finish(axes, "Agreement with the given labels", percent=True)


def _change_panel(axes: Axes, metrics: Rows) -> None:
    _draw(axes, metrics, "changed", "changed since the last epoch", BLUE)
    _draw(axes, metrics, "wait_share", "time spent waiting for data", GREY, style=":")
    finish(axes, "Changed predictions, time waiting", percent=True)


def truth_panel(axes: Axes, metrics: Rows, kind: str) -> None:
    """Draw what becomes of the `clean` or the `wrong` labels: Figure 1 of the paper.

    The legend has the shares of the last epoch.
    """
    for part, label, colour in (
        ("right", "right", GREEN),
        ("memorised", "memorised", RED),
        ("other", "otherwise", GREY),
    ):
        name = f"{kind}_{part}"
        values = [row[name] for row in metrics if row.get(name) is not None]
        _draw(axes, metrics, name, f"{label} {values[-1]:.0%}" if values else "", colour)
    title = {"clean": "Correctly labelled", "wrong": "Wrongly labelled"}[kind]
    finish(axes, f"{title} images: predictions", percent=True, legend_above=True)


def _accuracy_panel(axes: Axes, metrics: Rows) -> None:
    _draw(axes, metrics, "val_accuracy_true", "validation", GREEN)
    _draw(axes, metrics, "test_accuracy_true", "test", BLUE)
    finish(axes, "Accuracy against the true labels", percent=True, legend_above=True)


def _draw(axes: Axes, metrics: Rows, name: str, label: str, colour: str, style: str = "-") -> None:
    points = [(row["epoch"], row[name]) for row in metrics if row.get(name) is not None]
    if points:
        epochs, values = zip(*points, strict=True)
        marker = "o" if len(points) < 4 else None
        axes.plot(epochs, values, style, color=colour, label=label, marker=marker, markersize=4)


def finish(axes: Axes, title: str, *, percent: bool, legend_above: bool = False) -> None:
    """Give a panel over epochs its title, axes, grid and legend.

    `legend_above` puts the legend under the title, where no line can cross it.
    """
    axes.set_title(title, fontsize=11, loc="left", pad=24 if legend_above else None)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(True, color="#e3e5e8", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if percent:
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if not axes.get_legend_handles_labels()[0]:
        return
    if legend_above:
        axes.legend(
            frameon=False,
            fontsize=9,
            loc="lower left",
            bbox_to_anchor=(-0.02, 0.98),
            ncols=3,
            handlelength=1.2,
            handletextpad=0.5,
            columnspacing=1.0,
            borderpad=0.2,
        )
    else:
        axes.legend(frameon=False, fontsize=9)


def svg(figure: Figure) -> str:
    """Return a figure as SVG text."""
    buffer = io.StringIO()
    figure.set_canvas(FigureCanvasSVG(figure))
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
