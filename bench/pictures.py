"""The pictures of the docs: what a person sees of the demo, in a terminal and in a browser.

python bench/pictures.py --out docs/images

Runs `elr demo`, then the commands of the picture in a terminal of 118 columns, and opens the review
page in Chromium (`ELR_CHROMIUM`, or one on the PATH). An existing demo is used as it is.
"""

from __future__ import annotations

import argparse
import io
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

COLUMNS = 118
COMMANDS = (
    "elr audit elr-demo/run-elr",
    "elr apply elr-demo/run-elr --accept-above 0.95 --out corrected.csv",
    "elr predict elr-demo/run-elr elr-demo/digits/test/7 | head -4",
)
MESSAGE = 8000  # milliseconds after which what was done is no longer said
REVIEWED = 8  # suspects, before the picture of the review is taken
COLOURS = [(36, 41, 47), (207, 34, 46), (26, 127, 55), (138, 97, 0)]  # black to yellow
COLOURS += [(9, 105, 218), (130, 80, 223), (27, 124, 131), (110, 119, 129)]  # blue to white
PAPER = TerminalTheme((250, 250, 248), COLOURS[0], COLOURS)
# As rich's own, but with the fonts that the reader has: nothing is fetched.
SVG = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" \
role="img" aria-label="elr audit, elr apply and elr predict in a terminal">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, \
"DejaVu Sans Mono", monospace; font-size: {char_height}px; line-height: {line_height}px; }}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: arial; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def run_in_terminal(command: str, folder: Path) -> str:
    """Run a command line as on a terminal and return what it shows, with its colours."""
    mine, its_own = pty.openpty()
    where = {"COLUMNS": str(COLUMNS), "TERM": "xterm-256color", "PATH": _path()}
    process = subprocess.Popen(
        ["bash", "-c", command],
        cwd=folder,
        env=os.environ | where,
        stdin=subprocess.DEVNULL,
        stdout=its_own,
        stderr=its_own,
    )
    os.close(its_own)
    shown = b""
    while True:
        try:
            shown += os.read(mine, 65536)
        except OSError:  # Linux says so at the end
            break
    os.close(mine)
    if process.wait() != 0:
        raise SystemExit(f"{command}: exit code {process.returncode}\n{shown.decode()}")
    return shown.decode().replace("\r\n", "\n").replace(str(folder), "/home/me")


def _path() -> str:
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def draw_terminal(folder: Path, out: Path) -> None:
    """Draw the commands and what they show; bars that move are gone by the end of a line."""
    console = Console(record=True, file=io.StringIO(), width=COLUMNS, force_terminal=True)
    for number, command in enumerate(COMMANDS):
        if number > 0:
            console.print()
        console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
        lines = run_in_terminal(command, folder).rstrip("\n").split("\n")
        for line in lines:
            console.print(Text.from_ansi(line.rpartition("\x1b[2K")[2]), soft_wrap=True)
    console.print()
    out.write_text(console.export_svg(title="elr", theme=PAPER, unique_id="elr", code_format=SVG))


def draw_page(browser: Browser, report: Path, out: Path) -> None:
    """Draw summary and review in both colour schemes, and both on a narrow screen."""
    for scheme in ("light", "dark"):
        page = _opened(browser, report, 1280, 800, scheme)
        _save(page.screenshot(), out / f"summary-{scheme}.png")
        page.keyboard.press("Enter")
        for _ in range(REVIEWED):
            page.keyboard.press("Enter")
        page.wait_for_timeout(MESSAGE)
        _save(page.screenshot(), out / f"report-{scheme}.png")
    page = _opened(browser, report, 420, 860, "light")
    summary = Image.open(io.BytesIO(page.screenshot()))
    page.keyboard.press("Enter")
    page.wait_for_timeout(500)
    both = Image.new("RGB", (860, 860), "white")
    both.paste(summary, (0, 0))
    both.paste(Image.open(io.BytesIO(page.screenshot())), (440, 0))
    both.save(out / "report-narrow.png", optimize=True)


def _opened(browser: Browser, report: Path, width: int, height: int, scheme: str) -> Page:
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if scheme == "dark" else "light",
    )
    page = context.new_page()
    page.goto(report.resolve().as_uri())
    page.wait_for_timeout(500)
    return page


def _save(picture: bytes, out: Path) -> None:
    Image.open(io.BytesIO(picture)).convert("RGB").save(out, optimize=True)


def main() -> None:
    """Run the demo where it is not there, and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=Path("demo"), help="where the demo is, or goes"
    )
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    folder: Path = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    if not (folder / "elr-demo").exists():
        print(run_in_terminal(f"elr demo --epochs {args.epochs} | cat", folder))
    for name in ("corrected.csv", "corrected.changes.csv"):  # of pictures drawn before
        (folder / name).unlink(missing_ok=True)
    draw_terminal(folder, args.out / "terminal.svg")
    chromium = os.environ.get("ELR_CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        draw_page(browser, folder / "elr-demo" / "run-elr" / "audit" / "report.html", args.out)
        browser.close()
    print("\n".join(sorted(path.name for path in args.out.iterdir())))


if __name__ == "__main__":
    main()
