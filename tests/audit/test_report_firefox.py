"""The review page in Firefox, driven over Marionette, the remote control that is built into it."""

from __future__ import annotations

import csv
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elrcli.audit.report import render_report
from tests.audit.test_report import make_audit, make_manifest

SECONDS = 60  # to start, and to wait for an answer
KEYS = {"Enter": "\ue006", "Escape": "\ue00c", "Space": " ", "ArrowRight": "\ue014"}
KEYS |= {"Shift": "\ue008", "Control": "\ue009"}


class Firefox:
    """A headless Firefox with a profile of its own; files are saved to `folder`/downloads."""

    def __init__(self, program: str, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.downloads = folder / "downloads"
        self.downloads.mkdir()
        profile = folder / "profile"
        profile.mkdir()
        settings = {
            "marionette.port": port,
            "browser.download.folderList": 2,
            "browser.download.dir": str(self.downloads),
        }
        lines = (f"user_pref({json.dumps(k)}, {json.dumps(v)});\n" for k, v in settings.items())
        (profile / "user.js").write_text("".join(lines), encoding="utf-8")
        command = [program, "--headless", "--marionette", "--no-remote", "--profile", str(profile)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            with self._connect(port) as connection:  # the stream keeps it open
                self.stream = connection.makefile("rwb")
            self._read()  # the greeting
            self.do("WebDriver:NewSession")
        except BaseException:
            self.process.kill()
            raise

    def _connect(self, port: int) -> socket.socket:
        end = time.monotonic() + SECONDS
        while True:
            try:
                return socket.create_connection(("127.0.0.1", port), timeout=SECONDS)
            except ConnectionRefusedError:
                if time.monotonic() > end or self.process.poll() is not None:
                    raise
                time.sleep(0.1)

    def _read(self) -> Any:
        size = b""
        while not size.endswith(b":"):
            size += self.stream.read(1)
        return json.loads(self.stream.read(int(size[:-1])))

    def do(self, name: str, **parameters: Any) -> Any:
        message = json.dumps([0, 1, name, parameters]).encode()
        self.stream.write(b"%d:%s" % (len(message), message))
        self.stream.flush()
        _, _, error, result = self._read()
        assert error is None, error
        return result

    def evaluate(self, expression: str) -> Any:
        return self.do("WebDriver:ExecuteScript", script=f"return {expression}", args=[])["value"]

    def text(self, selector: str) -> str:
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")

    def press(self, keys: str) -> None:
        for key in keys.split():
            codes = [KEYS.get(part, part) for part in key.split("+")]
            steps = [{"type": "keyDown", "value": code} for code in codes]
            steps += [{"type": "keyUp", "value": code} for code in reversed(codes)]
            source = {"type": "key", "id": "keyboard", "actions": steps}
            self.do("WebDriver:PerformActions", actions=[source])

    def click(self, selector: str) -> None:
        self.evaluate(f"document.querySelector({json.dumps(selector)}).click()")

    def close(self) -> None:
        self.do("Marionette:Quit", flags=["eForceQuit"])
        self.stream.close()
        self.process.wait(SECONDS)


@pytest.fixture
def firefox(tmp_path: Path) -> Iterator[Firefox]:
    names = (os.environ.get("ELR_FIREFOX"), "firefox", "firefox-esr")
    program = next(filter(None, (shutil.which(name) for name in names if name)), None)
    if program is None:
        pytest.skip("no Firefox: set ELR_FIREFOX or put firefox on the PATH")
    firefox = Firefox(program, tmp_path)
    yield firefox
    firefox.close()


def wait_for(test: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not test():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_review_by_keyboard_survives_a_reload(firefox: Firefox, tmp_path: Path):
    names = [f"a/{i:02d}.png" for i in range(24)]
    manifest = make_manifest(tmp_path / "data", names, [i % 3 for i in range(24)])
    audit = make_audit(manifest, flagged=np.ones(24, dtype=bool))
    page = tmp_path / "report.html"
    page.write_text(render_report(audit, manifest), encoding="utf-8", newline="")

    firefox.do("WebDriver:Navigate", url=page.as_uri())
    firefox.press("Enter")
    firefox.press("Enter k r u " * 5)
    assert firefox.text("#reviewed") == "20 of 24 flagged reviewed"
    firefox.press("z z")
    assert firefox.text("#facts .path") == "a/18.png"
    firefox.press("/ 2 Enter")
    assert firefox.text("#position") == "3 / 6"  # 02, 12, 20 to 23: 20 is open
    firefox.click("#clear-filters")

    firefox.do("WebDriver:Refresh")
    assert firefox.text("#reviewed") == "18 of 24 flagged reviewed"
    assert firefox.text("#facts .path") == "a/18.png"
    firefox.press("p d o g Enter g Space Shift+ArrowRight k")
    assert firefox.text("#reviewed") == "21 of 24 flagged reviewed"
    firefox.press("Control+z")
    assert firefox.text("#reviewed") == "19 of 24 flagged reviewed"

    firefox.click("[data-do=export]")
    saved = firefox.downloads / "decisions.csv"
    wait_for(lambda: saved.is_file() and saved.stat().st_size > 0)
    with saved.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert len(rows) == 20
    assert rows[1] == ["a/00.png", "cat", "relabel", "dog"]
    assert rows[2:4] == [
        ["a/01.png", "dog", "keep", ""],
        ["a/02.png", manifest.classes[2], "remove", ""],
    ]
    assert rows[-1][0] == "a/18.png"
