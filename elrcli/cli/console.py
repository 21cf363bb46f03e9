"""What a person sees on stderr: progress, the epoch table, messages. The only importer of rich."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn
from rich.text import Text

from elrcli.engine.launch import launch
from elrcli.engine.observer import Observer, TrainingPlan
from elrcli.errors import printable

SECONDS_BETWEEN_LINES = 30.0  # without a terminal
LEGEND = (
    "equal to the label: predictions (agrees), ELR targets (target), held-out predictions (val)"
)


def error(message: str) -> None:
    """Show why the program ends."""
    _stderr().print(Text.assemble(("error: ", "bold red"), _printable(message)), soft_wrap=True)


def result(text: object) -> None:
    """Print a result on stdout; a reader that has gone away, as `head` does, is no error.

    Typer would end the command with code 1.
    """
    with suppress(BrokenPipeError):
        typer.echo(text)


def speaks() -> bool:
    """Tell whether this process shows and writes results: of several, the first one."""
    return launch().rank == 0


def say(*lines: str, style: str = "") -> None:
    """Show lines as they are: no markup, no wrapping."""
    console = _stderr()
    for line in lines if speaks() else ():
        console.print(Text(_printable(line), style=style), soft_wrap=True)


@contextmanager
def watch(quiet: bool) -> Iterator[Observer]:
    """Give an observer that shows the work: live on a terminal, plain lines elsewhere."""
    console = _stderr()
    if quiet or not speaks():
        yield Observer()
    elif console.is_interactive:
        live = _LiveObserver(console)
        try:
            yield live
        finally:
            live.stop()
    else:
        yield _PlainObserver()


def aligned(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Return a table as lines; the first `left` columns are left-aligned, the others right."""
    table = [tuple(printable(cell) for cell in row) for row in (header, *rows)]
    widths = [max(cell_len(row[i]) for row in table) for i in range(len(header))]

    def padded(i: int, cell: str) -> str:
        space = " " * (widths[i] - cell_len(cell))
        return cell + space if i < left else space + cell

    return ["  ".join(padded(i, cell) for i, cell in enumerate(row)).rstrip() for row in table]


def terminal_width(*, stdout: bool = False) -> int | None:
    """Return the columns of the terminal that stderr, or stdout, is; None for a file or a pipe."""
    stream = sys.stdout if stdout else sys.stderr
    return Console(file=stream).width if stream.isatty() else None


def cut(text: str, width: int) -> str:
    """Return a text without a part of its middle, so that it takes `width` columns or fewer."""
    text = printable(text)
    if cell_len(text) <= width:
        return text
    left, right = text[: len(text) // 2], text[len(text) // 2 :]
    while right and cell_len(left) + cell_len(right) >= width:
        left, right = (left[:-1], right) if len(left) > len(right) else (left, right[1:])
    return f"{left}…{right}"


def clock(seconds: float) -> str:
    """Return a duration as 0:07, 12:34 or 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def counted(number: int, thing: str) -> str:
    """Return a number of things: 1 epoch, 2 epochs, 3 batches."""
    ending = "" if number == 1 else "es" if thing.endswith("ch") and thing != "epoch" else "s"
    return f"{number:,} {thing}{ending}"


class _Column(NamedTuple):
    title: str
    width: int
    metric: str
    show: Callable[[float], str]


def _share(value: float) -> str:
    return f"{value:.1%}"


EPOCH_COLUMNS = (
    _Column("loss", 9, "loss", "{:.3f}".format),
    _Column("agrees", 7, "train_agreement", _share),
    _Column("target", 7, "target_agreement", _share),
    _Column("changed", 8, "changed", _share),
    _Column("val", 7, "val_agreement", _share),
    _Column("lr", 8, "lr", "{:.2g}".format),
    _Column("img/s", 7, "images_per_second", "{:.0f}".format),
    _Column("time", 8, "seconds", clock),
)


LEAST_WANTED = ("img/s", "lr", "changed")  # in this order, where a terminal is narrow


class EpochTable:
    """The lines of the epoch table, in `room` columns of a terminal if that will do."""

    def __init__(self, epochs: int, room: int | None = None) -> None:
        self._epochs = epochs
        self._width = max(5, 2 * len(str(epochs)) + 1)
        self._columns = list(EPOCH_COLUMNS)
        for title in LEAST_WANTED:
            if room is not None and self._width + sum(c.width for c in self._columns) > room:
                self._columns = [column for column in self._columns if column.title != title]

    def header(self) -> str:
        titles = "".join(f"{column.title:>{column.width}}" for column in self._columns)
        return f"{'epoch':>{self._width}}{titles}"

    def row(self, metrics: Mapping[str, float | None]) -> str:
        """Return one epoch as a line; what was not measured is a dash."""
        epoch = f"{int(metrics['epoch'] or 0)}/{self._epochs}"
        cells = []
        for column in self._columns:
            value = metrics.get(column.metric)
            cells.append(f"{'-' if value is None else column.show(value):>{column.width}}")
        return f"{epoch:>{self._width}}{''.join(cells)}"


def plan_lines(plan: TrainingPlan) -> list[str]:
    """Return what a run is about to do."""
    held_out = [
        f"{count:,} {name}"
        for name, count in (("validation", plan.val_images), ("test", plan.test_images))
        if count
    ]
    processes = f" in each of {plan.processes} processes" if plan.processes > 1 else ""
    images = ", ".join([f"{plan.train_images:,} training", *held_out])
    return [
        f"{plan.run}",
        f"  {plan.backbone} ({plan.parameters / 1e6:.1f}M parameters), {plan.method}, "
        f"{plan.image_size} px, {plan.device} {plan.precision}",
        f"  {images} images, {plan.classes} classes",
        f"  {counted(plan.epochs, 'epoch')} of {counted(plan.batches, 'batch')} of "
        f"{plan.batch_size}{processes}, {plan.optimizer} {plan.lr:g}, "
        f"{counted(plan.workers, 'worker')}",
    ]


@dataclass
class _Stage:
    """Speed and time left of one stage of the work."""

    name: str = ""
    done: int = 0
    first: int = 0  # what was done when it was first heard of
    started: float = 0.0

    def update(self, name: str, done: int) -> bool:
        """Take over progress; True if a new stage began."""
        is_new = name != self.name or done < self.done
        if is_new:
            self.name, self.first, self.started = name, done, time.monotonic()
        self.done = done
        return is_new

    def seconds_left(self, total: int | None) -> float | None:
        elapsed = time.monotonic() - self.started
        if total is None or self.done == self.first or elapsed < 1.0:
            return None
        return elapsed * (total - self.done) / (self.done - self.first)


class _RunClock:
    """Time left of the whole run."""

    def __init__(self, plan: TrainingPlan) -> None:
        self._plan = plan
        self._started = time.monotonic()
        self.finished = 0  # epochs, in this process

    @property
    def epochs(self) -> int:
        return self._plan.epochs - self._plan.first_epoch

    def seconds_left(self, share_of_epoch: float) -> float | None:
        done = self.finished + share_of_epoch
        elapsed = time.monotonic() - self._started
        if done <= 0 or elapsed < 1.0:
            return None
        return elapsed * (self.epochs - done) / done


class _LiveObserver(Observer):
    """Bars that move at the bottom of the terminal; finished epochs scroll above them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
            redirect_stdout=False,  # data stays on stdout, even where both are one terminal
        )
        self._stage = _Stage()
        self._stage_bar: TaskID | None = None
        self._run_bar: TaskID | None = None
        self._run: _RunClock | None = None
        self._table: EpochTable | None = None

    def stop(self) -> None:
        self._progress.stop()

    def note(self, message: str) -> None:
        self._print(message)

    def training_started(self, plan: TrainingPlan) -> None:
        first, *others = plan_lines(plan)
        self._print(first, "bold")
        for line in others:
            self._print(line)
        self._table = EpochTable(plan.epochs, self._console.width)
        self._print(LEGEND, "dim")
        self._print(self._table.header(), "bold")
        self._run = _RunClock(plan)

    def progress(self, stage: str, done: int, total: int | None) -> None:
        is_new = self._stage.update(stage, done)
        self._progress.start()
        if self._stage_bar is None:
            self._stage_bar = self._progress.add_task(stage, total=total, left="")
            if self._run is not None:
                self._run_bar = self._progress.add_task("all epochs", total=1.0, left="")
        elif is_new:
            self._progress.reset(self._stage_bar, total=total, description=stage)
        left = _left(self._stage.seconds_left(total))
        self._progress.update(self._stage_bar, completed=done, total=total, left=left)
        if self._run is not None and self._run_bar is not None and stage.startswith("epoch "):
            share = done / total if total else 0.0
            self._progress.update(
                self._run_bar,
                completed=(self._run.finished + share) / max(self._run.epochs, 1),
                left=_left(self._run.seconds_left(share)),
            )

    def epoch_finished(self, metrics: Mapping[str, float]) -> None:
        if self._run is not None and self._table is not None:
            self._run.finished += 1
            self._print(self._table.row(metrics))

    def _print(self, line: str, style: str = "") -> None:
        self._console.print(Text(_printable(line), style=style), soft_wrap=True)


class _PlainObserver(Observer):
    """Lines for a log file: one per epoch, and one now and then in between."""

    def __init__(self) -> None:
        self._stage = _Stage()
        self._said_at = time.monotonic()
        self._run: _RunClock | None = None
        self._table: EpochTable | None = None

    def note(self, message: str) -> None:
        say(message)

    def training_started(self, plan: TrainingPlan) -> None:
        self._table = EpochTable(plan.epochs)
        self._run = _RunClock(plan)
        say(*plan_lines(plan), LEGEND, self._table.header())

    def progress(self, stage: str, done: int, total: int | None) -> None:
        self._stage.update(stage, done)
        if time.monotonic() - self._said_at < SECONDS_BETWEEN_LINES:
            return
        self._said_at = time.monotonic()
        line = f"{stage}: {done:,}" if total is None else f"{stage}: {done:,} of {total:,} images"
        parts = [line, _left(self._stage.seconds_left(total))]
        if self._run is not None and total and stage.startswith("epoch "):
            whole = self._run.seconds_left(done / total)
            parts.append("" if whole is None else f"{clock(whole)} for all epochs")
        say(", ".join(part for part in parts if part))

    def epoch_finished(self, metrics: Mapping[str, float]) -> None:
        if self._run is not None and self._table is not None:
            self._run.finished += 1
            say(self._table.row(metrics))


def _left(seconds: float | None) -> str:
    return "" if seconds is None else f"{clock(seconds)} left"


def _printable(text: str) -> str:
    """Return lines that a terminal shows and does not obey."""
    return "\n".join(printable(line) for line in text.split("\n"))


def _stderr() -> Console:
    # FORCE_COLOR asks for colours in a log, not for bars that move.
    is_log = not sys.stderr.isatty()
    return Console(stderr=True, highlight=False, force_interactive=False if is_log else None)
