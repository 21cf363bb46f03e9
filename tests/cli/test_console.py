from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from elrcli.cli import console
from elrcli.cli.console import EpochTable, aligned, clock, cut, watch
from elrcli.engine.observer import TrainingPlan

PLAN = TrainingPlan(
    run="runs/a",
    backbone="resnet18",
    parameters=11_200_000,
    method="elr",
    device="cpu",
    precision="fp32",
    classes=3,
    train_images=1_600,
    val_images=160,
    test_images=0,
    image_size=64,
    epochs=10,
    first_epoch=0,
    batches=25,
    batch_size=64,
    optimizer="sgd",
    lr=0.02,
    workers=2,
)
ROW = {"epoch": 1, "loss": 1.23456, "train_agreement": 0.5, "lr": 0.02, "seconds": 75.0}


def on_terminal(monkeypatch, **options) -> io.StringIO:
    """Let stderr be a terminal; return what is written there."""
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=100, highlight=False, **options)
    monkeypatch.setattr(console, "_stderr", lambda: terminal)
    return screen


def test_the_plan_of_several_processes():
    *_, last = console.plan_lines(replace(PLAN, processes=4))
    assert last == "  10 epochs of 25 batches of 64 in each of 4 processes, sgd 0.02, 2 workers"


def train_two_epochs(observer):
    observer.training_started(PLAN)
    for epoch in (1, 2):
        observer.progress(f"epoch {epoch}/10", 800, 1_600)
        observer.progress(f"epoch {epoch}/10", 1_600, 1_600)
        observer.progress("validation", 160, 160)
        observer.epoch_finished(ROW | {"epoch": epoch})
    observer.note("2 images could not be read")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (7.4, "0:07"), (59.6, "1:00"), (3723, "1:02:03")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_aligned_columns():
    assert aligned(("class", "images"), [("cat", "1,200"), ("größe", "7")]) == [
        "class  images",
        "cat     1,200",
        "größe       7",
    ]


def test_wide_characters_take_two_cells():
    assert aligned(("a", "b"), [("猫", "1")]) == ["a   b", "猫  1"]


def test_a_name_with_a_line_break_stays_in_its_row():
    assert aligned(("a", "b"), [("x\ny", "1")]) == ["a     b", "x\\ny  1"]


def test_an_epoch_is_one_line_under_its_titles():
    table = EpochTable(10)
    assert table.header().split() == [
        "epoch", "loss", "agrees", "target", "changed", "val", "lr", "img/s", "time",
    ]  # fmt: skip
    assert " ".join(table.row(ROW).split()) == "1/10 1.235 50.0% - - - 0.02 - 1:15"
    assert len(table.row(ROW)) == len(table.header()) <= 80


@pytest.mark.parametrize(
    ("room", "missing"),
    [(66, []), (65, ["img/s"]), (58, ["img/s", "lr"]), (20, ["changed", "img/s", "lr"])],
)
def test_a_narrow_terminal_has_fewer_columns(room, missing):
    whole, table = EpochTable(10), EpochTable(10, room)
    titles = table.header().split()
    assert sorted(set(whole.header().split()) - set(titles)) == missing
    assert len(table.row(ROW)) == len(table.header())
    assert len(table.row(ROW).split()) == len(titles)


@pytest.mark.parametrize(
    ("text", "width", "expected"),
    [
        ("abcdef", 6, "abcdef"),
        ("abcdef", 5, "ab…ef"),
        ("猫猫猫猫", 5, "猫…猫"),
        ("a\nb", 9, "a\\nb"),
    ],
)
def test_a_text_is_cut_in_its_middle(text, width, expected):
    assert cut(text, width) == expected


def test_without_a_terminal_each_epoch_is_a_line(capsys):
    with watch(quiet=False) as observer:
        train_two_epochs(observer)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0] == "runs/a"
    assert "resnet18 (11.2M parameters), elr, 64 px, cpu fp32" in lines[1]
    assert "1,600 training, 160 validation images, 3 classes" in lines[2]
    assert [line.split()[0] for line in lines[-4:-1]] == ["epoch", "1/10", "2/10"]
    assert lines[-1] == "2 images could not be read"
    assert "\x1b" not in captured.err


def test_forced_colours_move_no_bars_in_a_log(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with watch(quiet=False) as observer:
        train_two_epochs(observer)
    text = capsys.readouterr().err
    assert "1/10" in text
    assert "\x1b[2K" not in text  # no line is erased
    assert "all epochs" not in text


def test_without_a_terminal_long_epochs_report_now_and_then(capsys, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with watch(quiet=False) as observer:
        observer.training_started(PLAN)
        for done in (100, 200, 300, 400):
            now[0] += 20.0
            observer.progress("epoch 1/10", done, 1_600)
    lines = capsys.readouterr().err.splitlines()
    # 100 images take 20 s: 14 and 12 hundreds are left; an eighth and a quarter of an epoch of
    # ten took 40 s and 80 s since the start
    assert lines[-2:] == [
        "epoch 1/10: 200 of 1,600 images, 4:40 left, 52:40 for all epochs",
        "epoch 1/10: 400 of 1,600 images, 4:00 left, 52:00 for all epochs",
    ]


def test_quiet_shows_nothing(capsys):
    with watch(quiet=True) as observer:
        train_two_epochs(observer)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_bars_and_keeps_the_table(monkeypatch, capsys):
    screen = on_terminal(monkeypatch)
    with watch(quiet=False) as observer:
        train_two_epochs(observer)
    text = screen.getvalue()
    assert "epoch 2/10" in text
    assert "all epochs" in text
    assert "1/10" in text
    assert "\x1b" in text
    assert capsys.readouterr() == ("", "")


def test_bars_leave_stdout_alone(monkeypatch, capsys):
    on_terminal(monkeypatch)
    with watch(quiet=False) as observer:
        observer.progress("predict", 1, 2)
        print("data")  # noqa: T201
    assert capsys.readouterr().out == "data\n"


def test_bars_end_with_an_error(monkeypatch):
    screen = on_terminal(monkeypatch)

    def fail():
        with watch(quiet=False) as observer:
            observer.progress("audit", 1, None)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert "\x1b[?25h" in screen.getvalue()  # the cursor is back


def test_no_color_is_honoured(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    screen = on_terminal(monkeypatch)
    console.error("bad")
    assert screen.getvalue() == "\x1b[1merror: \x1b[0mbad\n"  # bold is no colour
