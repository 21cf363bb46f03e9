"""The documentation is tested: its Python runs, its commands parse, its links lead somewhere.

Every ```python block runs, in order, page by page, in a folder that holds `photos/`.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import elrcli
from elrcli.audit.run import TABLE_COLUMNS
from elrcli.cli.app import app
from elrcli.config import TrainConfig, option_name, read_toml
from elrcli.engine.metrics import METRIC_COLUMNS
from tests.shapes import write_shapes

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OPERATORS = re.compile(r"[|&;<>()]+")
ELR: Any = get_command(app)  # typer's own copy of click has no types


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> Iterator[tuple[int, str]]:
    """Yield (number of the first line, text) of every fenced block in one of the languages."""
    fence = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    text = page.read_text(encoding="utf-8")
    for found in fence.finditer(text):
        if found[1] in languages:
            yield text[: found.start()].count("\n") + 2, found[2]


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands(line: str) -> Iterator[list[str]]:
    """Yield the arguments of every `elr` in one shell line, also behind a pipe or in Docker."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for token in [*lexer, ";"]:
        if not OPERATORS.fullmatch(token):
            words.append(token)
            continue
        if words[:2] == ["docker", "run"]:
            words = words[words.index("elr") :]
        if "elrcli" in words:  # behind `python -m` or torchrun
            words = ["elr", *words[words.index("elrcli") + 1 :]]
        if words[:1] == ["elr"]:
            yield words[1:]
        words = []


def command_lines() -> list[Any]:
    found = []
    for page in PAGES:
        for start, text in blocks(page, "console", "bash", "sh"):
            lines = text.replace("\\\n", " ").splitlines()  # continued ones are one
            for number, line in enumerate(lines, start):
                line = line.removeprefix("$ ").replace("$(", ";(")
                if not re.search(r"\belr(cli)?\b", line):
                    continue
                place = f"{name_of(page)}:{number}"
                found += [pytest.param(words, id=place) for words in commands(line)]
    return found


def anchors(page: Path) -> set[str]:
    """Return the anchors that headings get."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.strip().replace(" ", "-") for heading in plain}


def test_commands_are_found_in_shell_lines():
    assert list(commands("find . -name '*.jpg' | elr predict r - --out p.csv")) == [
        ["predict", "r", "-", "--out", "p.csv"]
    ]
    assert list(commands("docker run --gpus all -v cache:/cache elr train /data")) == [
        ["train", "/data"]
    ]
    assert list(commands("srun torchrun --nnodes 2 -m elrcli train a -e 2")) == [
        ["train", "a", "-e", "2"]
    ]
    assert list(commands("run=;(elr train photos --quiet)")) == [["train", "photos", "--quiet"]]
    assert list(commands("pip install elr")) == []


@pytest.mark.parametrize("words", command_lines())
def test_every_command_line_parses(words):
    if words[0].startswith("-"):
        assert any(words[0] in option.opts for option in ELR.params)
        return
    command = ELR.commands[words[0]]
    command.make_context(words[0], words[1:])  # raises for options and values that do not exist


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_pictures_resolve(page):
    targets = re.findall(r"\]\(([^)\s]+)\)|src(?:set)?=\"([^\"]+)\"", prose(page))
    missing = []
    for target in filter(None, (first or second for first, second in targets)):
        path, _, anchor = target.partition("#")
        if path.startswith("https://"):
            continue
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            missing.append(target)
    assert missing == []


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(blocks(page, "python"))], ids=name_of
)
def test_python_blocks_run(page, tmp_path, monkeypatch, capsys):
    classes = ("circle", "square", "triangle")
    write_shapes(tmp_path / "photos", per_class=8, classes=classes, flip_share=0.1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "elrcli.engine.automatic.worker_count", lambda requested: 0
    )  # faster to start
    names: dict[str, Any] = {"__name__": "page"}
    for start, text in blocks(page, "python"):
        place = f"{name_of(page)}:{start}"
        exec(compile("\n" * (start - 1) + text, place, "exec"), names)  # line numbers of the page
    assert capsys.readouterr().out


def test_the_loop_of_the_python_page_finds_wrong_labels(capsys):
    _, example = next(iter(blocks(ROOT / "docs/python.md", "python")))
    exec(compile(example, "docs/python.md", "exec"), {})
    suspects, found, wrong = map(int, re.findall(r"\d+", capsys.readouterr().out))
    assert found / wrong > 0.8
    assert found / suspects > 0.8


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_config_files_are_valid(page, tmp_path):
    for _, text in blocks(page, "toml"):
        (tmp_path / "settings.toml").write_text(text)
        TrainConfig.from_dict(read_toml(tmp_path / "settings.toml"))


def test_every_setting_is_described():
    text = "\n".join(page.read_text("utf-8") for page in PAGES)
    options = [option_name(spec.name) for spec in dataclasses.fields(TrainConfig)]
    assert [name for name in options if name not in text and name != "--data"] == []


def test_every_option_has_a_place_on_the_page_of_commands():
    page = prose(ROOT / "docs/cli.md")
    missing = []
    for name, command in ELR.commands.items():
        for option in command.params:
            flag = max(option.opts, key=len)
            if flag.startswith("--") and not re.search(rf"`{flag}[` ]", page):
                missing.append(f"{name} {flag}")
    assert missing == []


def test_defaults_are_as_described():
    table = re.findall(r"^\| `(--[\w-]+)` \| `([^`]+)` \|", prose(ROOT / "docs/training.md"), re.M)
    described = dict(table)
    assert len(described) > 8
    for spec in dataclasses.fields(TrainConfig):
        option = option_name(spec.name)
        if option in described and isinstance(spec.default, bool):
            assert described[option] == option[2:] if spec.default else f"no-{option[2:]}"
        elif option in described:
            assert described[option] == str(spec.default)


def test_every_public_name_is_described():
    text = (ROOT / "docs/python.md").read_text("utf-8")
    assert [name for name in elrcli.__all__ if name not in text] == []


@pytest.mark.parametrize(
    ("page", "columns"),
    [("docs/training.md", METRIC_COLUMNS), ("docs/auditing.md", TABLE_COLUMNS)],
)
def test_every_column_is_described_in_order(page, columns):
    rows = re.findall(r"^\| `(\w+)` \|", prose(ROOT / page), re.MULTILINE)
    assert [row for row in rows if row in columns] == list(columns)


def test_figures_of_the_readme_are_in_the_benchmarks():
    benchmarks = (ROOT / "docs/benchmarks.md").read_text("utf-8")
    figures = re.findall(r"\b0\.\d{3}\b", prose(ROOT / "README.md"))
    assert [figure for figure in figures if figure not in benchmarks] == []
