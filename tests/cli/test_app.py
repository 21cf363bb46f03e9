from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import elrcli
from elrcli import errors
from elrcli.cli.app import app

COMMANDS = (
    "train",
    "predict",
    "audit",
    "apply",
    "evaluate",
    "export",
    "noise",
    "tune",
    "backbones",
    "doctor",
    "demo",
)


def all_options() -> list[tuple[str, str]]:
    """Return (command, option) for every option that --help shows."""
    commands = typer.main.get_command(app).commands
    return [
        (name, option)
        for name, command in commands.items()
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
        if option.startswith("-")
    ]


@pytest.mark.parametrize(("command", "option"), all_options())
def test_every_option_is_exercised(command, option):
    source = Path(__file__).with_name(f"test_{command}.py").read_text()
    assert f'"{option}"' in source


def test_help_lists_every_command(elr):
    outcome = elr("--help")
    assert outcome.code == 0
    for name in COMMANDS:
        assert f" {name} " in outcome.out


def test_no_arguments_show_the_help(elr):
    outcome = elr()
    assert outcome.code == 2
    assert "Usage: elr" in outcome.err


def test_help_is_whole_on_a_narrow_terminal(elr, monkeypatch):
    """No option is cut, texts stand beside options, in the panels that the options name."""
    monkeypatch.setenv("COLUMNS", "80")
    page = elr("train", "--help").out
    assert "…" not in page
    assert all(len(line) <= 80 for line in page.splitlines())
    assert "  --checkpoint-minutes <float>\n      " in page
    assert "  --beta <float>              Momentum of the targets.  [default: 0.7;\n" in page
    titles = [line for line in page.splitlines() if line.endswith(":") and line[0] != " "]
    panels = ["Settings:", "Output:", "Data:", "Model:", "Method:"]
    panels += ["Optimisation:", "Images:", "Machine:"]
    assert titles == ["Arguments:", *panels, "Options:"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(elr, command):
    for flag in ("--help", "-h"):
        outcome = elr(command, flag)
        assert outcome.code == 0
        assert f"Usage: elr {command}" in outcome.out


def test_version(elr):
    assert elr("--version").out == f"elr {elrcli.__version__}\n"


def test_completion_can_be_shown():
    done = subprocess.run(
        [sys.executable, "-m", "elrcli", "--show-completion", "bash"],
        capture_output=True,
        text=True,
        env={"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1", "PATH": ""},
        check=True,
    )
    assert "_ELR_COMPLETE=complete_bash" in done.stdout


def test_a_mistyped_command_is_a_usage_error(elr):
    outcome = elr("trian", "data")
    assert outcome.code == 2
    assert "No such command 'trian'. Did you mean 'train'?" in outcome.err


def test_a_mistyped_option_is_a_usage_error(elr):
    outcome = elr("train", "data", "--epoch", "3")
    assert outcome.code == 2
    assert "--epoch" in outcome.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.DataError("data: bad"), 1),
        (errors.Interrupted(2, "go on"), 130),
        (errors.Interrupted(15, "go on"), 143),
    ],
)
def test_an_error_is_one_line_and_a_code(elr, monkeypatch, error, code):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("elrcli.api.list_backbones", fail)
    outcome = elr("backbones")
    assert outcome == (code, "", f"error: {error}\n")


def test_markup_in_an_error_is_text(elr, monkeypatch):
    def fail(*_, **__):
        raise errors.DataError("[red]x[/] " + "long " * 60 + "\udcff")

    monkeypatch.setattr("elrcli.api.list_backbones", fail)
    assert elr("backbones").err == "error: [red]x[/] " + "long " * 60 + "\\udcff\n"


def test_ctrl_c_before_training_is_130(elr, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("elrcli.api.list_backbones", interrupt)
    assert elr("backbones").code == 130


def test_a_reader_that_leaves_is_no_error():
    command = f"'{sys.executable}' -m elrcli train --help | head -n 1"
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, check=True, executable="/bin/bash"
    )
    assert done.stderr == ""


def program(command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a shell line whose $ELR is the program that prints what it is told to."""
    code = (
        "import sys, typer\nfrom elrcli.cli import app\n"
        "def show(text: str) -> None:\n"
        "    typer.echo(text if text != '-' else sys.stdin.read())\n"
        "def hand_over() -> None:\n"
        "    from elrcli.cli import console\n"
        "    console.result('text')\n    raise typer.Exit(5)\n"
        "def fail() -> None:\n"
        "    sys.stdout.write('text')\n    raise typer.Exit(5)\n"
        "def talk() -> None:\n"
        "    from elrcli.cli import console\n"
        "    console.say('text')\n    sys.stderr.write('text')\n    raise typer.Exit(5)\n"
        "def stop(path: str) -> None:\n"
        "    import os, pathlib\n    from elrcli.files import atomic_path\n"
        "    with atomic_path(pathlib.Path(path)):\n        os.kill(os.getpid(), 15)\n"
        "def load(folder: str) -> None:\n    sys.path.append(folder)\n    import stopped\n"
        "for command in (show, hand_over, fail, talk, stop, load):\n"
        "    app.app.command()(command)\n"
        "sys.argv[0] = 'elr'\napp.main()"
    )
    environment |= {"ELR": f"{sys.executable}", "CODE": code, "NO_COLOR": "1"}
    return subprocess.run(
        ["/bin/bash", "-c", command.replace("elr ", '"$ELR" -c "$CODE" ')],
        capture_output=True,
        env=os.environ | {"PYTHONUNBUFFERED": ""} | environment,
        check=False,
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_is_one_line(unbuffered):
    done = program("elr show text > /dev/full", PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 1
    assert done.stderr == (
        b"error: stdout: cannot be written (No space left on device)."
        b" Make room, or write elsewhere.\n"
    )


@pytest.mark.parametrize("command", ["fail", "hand-over"])
def test_a_reader_that_leaves_changes_no_exit_code(command):
    line = f"(sleep 0.2; elr {command}) | true; exit ${{PIPESTATUS[0]}}"
    done = program(line)
    assert (done.returncode, done.stderr) == (5, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "line",
    [
        "elr talk 2> /dev/full",
        "elr talk 2>&-",
        "(sleep 0.2; elr talk) 2>&1 | true; exit ${PIPESTATUS[0]}",
    ],
)
def test_work_goes_on_where_nobody_hears_of_it(line, unbuffered):
    done = program(line, PYTHONUNBUFFERED=unbuffered)
    assert (done.returncode, done.stdout, done.stderr) == (5, b"", b"")


def test_closed_streams_hold_nothing():
    for line in ("elr show text >&-", "elr show - <&-"):
        done = program(line)
        assert (done.returncode, done.stdout.strip(), done.stderr) == (0, b"", b"")


def test_sigterm_leaves_nothing_half_written(tmp_path):
    done = program(f"elr stop '{tmp_path / 'table.csv'}'")
    assert (done.returncode, done.stderr) == (143, b"")
    assert list(tmp_path.iterdir()) == []


def test_sigterm_raises_nothing_within_an_import(tmp_path):
    """Torch would end with SIGABRT."""
    lines = ("import os", "try:", "    os.kill(os.getpid(), 15)", "finally:", "    os._exit(134)")
    (tmp_path / "stopped.py").write_text("\n".join(lines))
    assert program(f"elr load '{tmp_path}'").returncode == 143


def test_names_that_are_not_utf8_come_and_go():
    done = program(r"printf '\xff.png' | elr show -", PYTHONIOENCODING="utf-8")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\xff.png\n", b"")


def test_what_the_encoding_of_stdout_lacks_is_named():
    done = program("elr show 猫.png", PYTHONIOENCODING="latin-1")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr == (b"error: stdout: no '\\u732b' in latin-1. Set PYTHONIOENCODING=utf-8.\n")


@pytest.mark.parametrize(
    "typed",
    [
        ("train", "{}"),
        ("train", "data", "--out", "{}", "--device", "cpu"),
        ("audit", "{}"),
        ("predict", "{}", "x.png"),
        ("apply", "{}", "d.csv", "--out", "o.csv"),
        ("noise", "{}", "--out", "n.csv", "--rate", "0.1"),
    ],
)
def test_a_path_that_cannot_be_looked_at_is_named(elr, typed):
    name = "x" * 300
    outcome = elr(*(word.format(name) for word in typed))
    assert (outcome.code, outcome.out) == (1, "")
    place = f"error: {'x' * 200}...: "
    assert outcome.err == f"{place}File name too long. Check the path and who may use it.\n"
