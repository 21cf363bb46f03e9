"""The review page in a real browser: opened from the disk, driven by the keyboard."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elrcli.audit.apply import plan_corrections, write_csv
from elrcli.audit.report import render_report
from elrcli.audit.result import AuditResult, DuplicateGroup
from elrcli.config import Reading
from elrcli.data.manifest import Manifest, StringTable
from tests.audit.test_report import CLASSES, HOSTILE, make_audit, make_manifest

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
Browser, Page = playwright_api.Browser, playwright_api.Page
Opener = Callable[..., Any]

SAMPLES = 24
COLOURS = ("magenta", "turquoise", "dark orange", "light green", "ivory", "crimson")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HEBREW = "\u05db\u05dc\u05d1 \u05e8\u05d5\u05e2\u05d4 \u05d2\u05d3\u05d5\u05dc"
SIXTY = tuple(f"{colour} digit {digit}" for colour in COLOURS for digit in DIGITS)
DOGS = ("Staffordshire_bull_terrier", "Old_English_sheepdog", "Shetland_sheepdog")


def find_chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("ELR_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    return found if found and Path(found).is_file() else None


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium: set ELR_CHROMIUM or put chromium on the PATH")
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-background-networking"]
        )
        yield browser
        browser.close()


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    names = [f"a/{i:02d}.png" for i in range(SAMPLES - 2)] + [f"z/{HOSTILE}.png", "z/=1+1.png"]
    return make_manifest(tmp_path / "data", names, [i % 3 for i in range(SAMPLES)])


def renamed(manifest: Manifest, classes: tuple[str, ...]) -> Manifest:
    return Manifest(manifest.root, manifest.paths, manifest.labels, manifest.splits, classes)


@pytest.fixture
def audit(manifest: Manifest) -> AuditResult:
    """24 suspects at 0.99 ... 0.76, all flagged; 0 and 1 suggest the next class, 2 suggests 0."""
    probability = np.linspace(0.99, 0.76, SAMPLES).astype(np.float32)
    audit = make_audit(
        manifest, error_probability=probability, flagged=np.ones(SAMPLES, dtype=bool)
    )
    audit.summary["flagged"] = SAMPLES
    return audit


@pytest.fixture
def open_page(browser: Browser, tmp_path: Path) -> Iterator[Opener]:
    """Open a page from the disk; at the end nothing may have gone wrong in it."""
    troubles: list[str] = []
    contexts = []

    def open_page(audit: AuditResult, manifest: Manifest, **options: Any) -> Page:
        script = options.pop("script", None)
        path = tmp_path / "report.html"
        html = render_report(audit, manifest, curves_svg=CURVES, **options.pop("render", {}))
        path.write_text(html, encoding="utf-8", newline="")
        options = {"viewport": {"width": 1280, "height": 800}, "accept_downloads": True} | options
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(5000)
        if script:
            page.add_init_script(script)
        page.on("console", lambda message: troubles.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
        page.on("dialog", lambda dialog: troubles.append(f"dialog: {dialog.message}"))
        page.on(
            "request",
            lambda request: (
                None
                if request.url.startswith(("file:", "data:", "blob:"))
                else troubles.append(f"request: {request.url}")
            ),
        )
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert troubles == []


CURVES = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9">'
    '<style>rect { fill: red }</style><rect width="9" height="9" style="stroke: blue"/></svg>'
)


def press(page: Page, keys: str) -> None:
    for key in keys.split():
        page.keyboard.press(key)


def current(page: Page) -> str:
    return page.locator("#facts .path").inner_text()


def download(page: Page, folder: Path) -> Path:
    with page.expect_download() as waiting:
        page.click("[data-do=export]")
    assert waiting.value.suggested_filename == "decisions.csv"
    target = folder / "decisions.csv"
    waiting.value.save_as(target)
    return target


def rows_of(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.reader(file))


def test_first_screen_says_how_many_how_sure_and_where(
    open_page: Opener, audit: AuditResult, manifest: Manifest
):
    page = open_page(audit, manifest)
    assert page.inner_text("h1") == "Between 1 and 23 of 24 labels may be wrong"
    assert "between 1 and 23 with 90% confidence" in page.inner_text(".lead")
    assert page.locator(".matrix tbody button").count() == 9
    assert page.locator(".matrix tbody th").all_inner_texts() == list(CLASSES)
    assert page.locator(".histogram rect").count() == 20
    assert page.locator(".histogram .threshold").count() == 1
    assert page.inner_text("#confused li").split("\n")[:3] == ["cat", "→", "dog"]
    assert page.locator("#classes li").count() == 3
    assert page.inner_text("#classes li").split("\n")[1:] == ["10%", "1 of 24 flagged"]
    assert page.locator("#curves img").evaluate("image => image.naturalWidth") == 9
    assert f"{HOSTILE}.jpg" in page.inner_text("#unreadable")
    assert page.inner_text("#reviewed") == "0 of 24 flagged reviewed"
    assert page.inner_text("#left") == "≈ 21 errors left"  # 24 * (0.99 + 0.76) / 2


@pytest.mark.parametrize(("share", "heat"), [(0.002, "20%"), (0.02, "100%"), (0.4, "100%")])
def test_the_matrix_of_clean_labels_is_pale(
    open_page: Opener, audit: AuditResult, manifest: Manifest, share: float, heat: str
):
    audit.summary["noise_matrix"] = [[1 - share, share, 0], [0, 1, 0], [0, 0, 1]]
    page = open_page(audit, manifest)
    cells = page.locator(".matrix button").all()
    shown = [cell.evaluate("cell => cell.style.getPropertyValue('--heat')") for cell in cells[:3]]
    assert shown == ["0%", heat, "0%"]


def test_twenty_suspects_by_keyboard_then_apply(
    open_page: Opener, audit: AuditResult, manifest: Manifest, tmp_path: Path
):
    page = open_page(audit, manifest)
    press(page, "Enter")  # start
    assert current(page) == "a/00.png"
    press(page, "k Enter a r Delete u")  # 00 .. 05
    assert current(page) == "a/06.png"
    press(page, "p")
    page.keyboard.type("do")
    press(page, "Enter")  # 06: picked dog
    press(page, "2")  # 07: the second of the top classes is its own label, so: keep
    press(page, "z z")
    assert current(page) == "a/06.png"
    press(page, "k k")  # 06, 07
    press(page, "ArrowRight l")
    assert current(page) == "a/10.png"
    press(page, "j ArrowLeft")
    assert current(page) == "a/08.png"
    press(page, "Enter " * 12)  # 08 .. 19
    assert page.inner_text("#reviewed") == "20 of 24 flagged reviewed"
    # 01, 02, 03, 04 and 08 .. 19 are errors; 00, 06, 07 are kept; 05 is unsure
    assert page.inner_text("#precision") == "84% were errors (16 of 19)"

    page.reload()
    assert current(page) == "a/20.png"
    assert page.inner_text("#reviewed") == "20 of 24 flagged reviewed"
    press(page, "z")
    assert current(page) == "a/19.png"
    press(page, "Enter")

    file = download(page, tmp_path)
    rows = rows_of(file)
    assert rows[0] == ["path", "label", "decision", "new_label"]
    assert rows[1] == ["a/00.png", "cat", "keep", ""]
    assert rows[2] == ["a/01.png", "dog", "relabel", HOSTILE]
    assert rows[4] == ["a/03.png", "cat", "remove", ""]
    assert rows[6] == ["a/05.png", HOSTILE, "unsure", ""]
    assert len(rows) == 21

    write_csv(plan_corrections(manifest, file), tmp_path / "corrected.csv", Reading())
    names = [manifest.classes[label] for label in manifest.labels]
    expected = [["path", "label", "split"]]
    for i, path in enumerate(manifest.paths):
        if i in (3, 4):
            continue
        accepted = i in (1, 2) or 8 <= i <= 19
        label = manifest.classes[audit.suggested[i]] if accepted else names[i]
        expected.append([path, label, "val" if i % 4 == 3 else "train"])
    assert rows_of(tmp_path / "corrected.csv") == expected


def test_hostile_names_stay_text(
    open_page: Opener, audit: AuditResult, manifest: Manifest, tmp_path: Path
):
    page = open_page(audit, manifest)
    press(page, "Enter g")
    page.locator("#cards li").nth(22).dblclick()
    assert current(page) == f"z/{HOSTILE}.png"
    press(page, "p")
    assert HOSTILE in page.locator("#pick-list").inner_text()
    press(page, "Escape ? Escape")
    press(page, "Enter Enter")  # also the file that looks like a formula
    press(page, "s")
    assert page.locator("[src='x'], [onerror]").count() == 0
    file = download(page, tmp_path)
    assert [row[0] for row in rows_of(file)[1:]] == [f"z/{HOSTILE}.png", "z/=1+1.png"]
    assert len(plan_corrections(manifest, file).changes) == 2


def test_filters_narrow_the_queue(open_page: Opener, audit: AuditResult, manifest: Manifest):
    page = open_page(audit, manifest)
    page.click(f".matrix button[title^='{HOSTILE} labelled dog']")  # row: true, column: given
    assert page.inner_text("#position") == "1 / 8"
    assert current(page) == "a/01.png"
    press(page, "Enter")
    assert current(page) == "a/04.png"
    page.select_option("select[name=decision]", "open")
    assert page.inner_text("#position") == "1 / 7"
    page.select_option("select[name=split]", "val")
    assert current(page) == "a/07.png"
    page.click("#clear-filters")
    press(page, "/")
    page.keyboard.type("Z/")
    press(page, "Enter")  # leave the field
    assert page.inner_text("#position") == "1 / 2"
    press(page, "k k")
    assert "All of these are reviewed." in page.inner_text("#finished")
    press(page, "f")
    page.keyboard.type("nothing like it")
    assert "No sample passes these filters." in page.inner_text("#finished")
    press(page, "Escape s")
    page.locator("#classes button", has_text="dog").click()
    assert page.inner_text("#position") == "2 / 8"  # the first is decided


def test_keys_decide_again_after_a_filter_is_chosen_by_mouse(
    open_page: Opener, audit: AuditResult, manifest: Manifest
):
    page = open_page(audit, manifest)
    press(page, "Enter")
    field = page.locator("select[name=label]")
    field.focus()
    field.dispatch_event("pointerdown")
    field.select_option("1")
    press(page, "k")
    assert page.inner_text("#reviewed") == "1 of 24 flagged reviewed"
    page.locator("select[name=scope]").focus()
    press(page, "Tab d")  # by keyboard the field keeps the keys: d for dog
    assert page.evaluate("document.activeElement.name") == "label"


def test_enter_decides_again_after_a_button_is_pressed_by_mouse(
    open_page: Opener, audit: AuditResult, manifest: Manifest, tmp_path: Path
):
    page = open_page(audit, manifest)
    press(page, "Enter k")
    download(page, tmp_path)
    press(page, "Enter")
    assert page.inner_text("#reviewed") == "2 of 24 flagged reviewed"
    page.locator("[data-do=theme]").focus()
    press(page, "Enter")  # by keyboard Enter presses the button, and the focus stays there
    assert page.evaluate("document.activeElement.dataset.do") == "theme"
    assert page.inner_text("#reviewed") == "2 of 24 flagged reviewed"


def test_a_screen_reader_says_each_question_once(
    open_page: Opener, audit: AuditResult, manifest: Manifest
):
    page = open_page(audit, manifest)
    press(page, "Enter")
    assert page.get_attribute("#question", "aria-live") == "polite"
    page.evaluate(
        """() => {
            window.said = 0;
            const seen = new MutationObserver((changes) => (window.said += changes.length));
            seen.observe(document.getElementById("question"), { childList: true });
        }"""
    )
    press(page, "k")
    assert page.evaluate("window.said") == 1
    page.click("[data-do=theme]")  # draws the same sample again
    press(page, "j")
    assert page.evaluate("window.said") == 2


def test_finished_review_is_finished_after_a_reload(
    open_page: Opener, audit: AuditResult, manifest: Manifest
):
    page = open_page(audit, manifest)
    press(page, "Enter " + "k " * SAMPLES)
    page.reload()
    press(page, "Enter")  # would change the first label to the suggestion
    assert "All of these are reviewed." in page.inner_text("#finished")
    assert page.inner_text("#precision") == "0% were errors (0 of 24)"
    press(page, "l")
    assert current(page) == "a/00.png"


def test_undo_says_that_the_sample_is_not_shown(
    open_page: Opener, audit: AuditResult, manifest: Manifest
):
    page = open_page(audit, manifest)
    press(page, "Enter k")  # a cat
    page.select_option("select[name=label]", "1")
    press(page, "Escape k z")
    assert page.inner_text("#message") == "1 decision undone."
    press(page, "z")
    assert page.inner_text("#message") == "1 decision undone, outside these filters."


def test_second_look_at_the_unsure_ones_goes_from_one_to_the_next(
    open_page: Opener, audit: AuditResult, manifest: Manifest
):
    page = open_page(audit, manifest)
    press(page, "Enter")
    press(page, "u u u " + "k " * (SAMPLES - 3))
    page.select_option("select[name=decision]", "unsure")
    press(page, "Escape k")
    assert page.inner_text("#position") == "1 / 2"
    assert current(page) == "a/01.png"
    press(page, "u a")  # 01 stays unsure, 02 is decided and the last
    assert "All of these are reviewed." in page.inner_text("#finished")
    page.locator("#finished button", has_text="Clear filters").click()
    assert current(page) == "a/01.png"
    press(page, "r")
    assert current(page) == "a/02.png"


def test_grid_without_a_sample_says_why(open_page: Opener, audit: AuditResult, manifest: Manifest):
    page = open_page(audit, manifest)
    press(page, "g f")
    page.keyboard.type("nothing like it")
    assert "No sample passes these filters." in page.inner_text("#finished")
    page.locator("#finished button", has_text="Clear filters").click()
    assert page.locator("#cards li:focus").count() == 1


def test_grid_decides_for_a_selection(open_page: Opener, audit: AuditResult, manifest: Manifest):
    page = open_page(audit, manifest)
    press(page, "g")
    press(page, "Space Shift+ArrowRight Shift+ArrowRight")
    assert page.inner_text("#selected") == "3 selected"
    cards = page.locator("#cards li")
    cards.nth(7).click(modifiers=["Shift"])
    assert page.locator("#cards li[aria-selected=true]").count() == 8
    press(page, "Enter")
    assert page.inner_text("#message") == "8 samples decided. Z undoes."
    assert page.inner_text("#reviewed") == "8 of 24 flagged reviewed"
    assert cards.nth(0).locator(".badge").inner_text() == "→ dog"
    assert cards.nth(1).locator(".badge").inner_text() == f"→ {HOSTILE}"
    press(page, "Control+z")
    assert page.inner_text("#reviewed") == "0 of 24 flagged reviewed"
    press(page, "Control+a r")
    assert page.inner_text("#reviewed") == "24 of 24 flagged reviewed"
    press(page, "Control+a p")
    page.keyboard.type("cat")
    press(page, "Enter g")
    assert page.inner_text("#precision") == "67% were errors (16 of 24)"  # 8 are labelled cat
    assert "All of these are reviewed." in page.inner_text("#finished")
    press(page, "g ArrowRight o")
    assert page.inner_text("#verdict") == "→ cat"


def test_grid_decides_about_one_picture_only_in_sight(
    open_page: Opener, audit: AuditResult, manifest: Manifest
):
    page = open_page(audit, manifest, viewport={"width": 1280, "height": 500})
    press(page, "g k")
    page.locator("#filters output").click()  # no longer in use by keyboard
    outline = "cards => cards.map((card) => getComputedStyle(card).outlineStyle === 'solid')"
    framed = page.locator("#cards li").evaluate_all(outline)
    assert [place for place, is_framed in enumerate(framed) if is_framed] == [1]
    for action, key in (("keep", "k"), ("remove", "r")):
        page.locator("#cards").evaluate("cards => cards.scrollTo(0, 9999)")
        page.click(f"#actions [data-do={action}]")
        assert page.inner_text("#message") == "This one is next. Press again to decide."
        assert page.inner_text("#cards li.decided >> nth=-1").startswith("kept")
        press(page, key)
    assert page.inner_text("#reviewed") == "3 of 24 flagged reviewed"
    page.locator("#cards").evaluate("cards => cards.scrollTo(0, 9999)")
    press(page, "p")
    assert page.locator("#pick").is_hidden()


def test_a_selected_range_shrinks(open_page: Opener, audit: AuditResult, manifest: Manifest):
    page = open_page(audit, manifest)
    cards = page.locator("#cards li")
    selected = page.locator("#cards li[aria-selected=true]")
    press(page, "g")
    cards.nth(20).click()
    press(page, "Home Space Shift+ArrowRight Shift+ArrowRight Shift+ArrowRight Shift+ArrowLeft")
    assert selected.count() == 1 + 3
    cards.nth(6).click(modifiers=["Shift"])
    cards.nth(1).click(modifiers=["Shift"])
    assert selected.count() == 1 + 2
    page.click("[data-do=select]")
    assert page.locator("#actions [data-do=select]").inner_text().startswith("Select all")
    page.click("[data-do=select]")
    assert page.inner_text("#selected") == "24 selected"


def test_a_step_in_the_grid_touches_two_cards(
    open_page: Opener, audit: AuditResult, manifest: Manifest
):
    page = open_page(audit, manifest)
    press(page, "g")
    page.evaluate(
        """() => {
            window.touched = new Set();
            const note = (changes) => changes.forEach(({ target }) => touched.add(target));
            const seen = new MutationObserver(note);
            const list = document.getElementById("cards");
            seen.observe(list, { attributes: true, childList: true, subtree: true });
        }"""
    )
    press(page, "ArrowRight")
    titles = page.evaluate("[...touched].map((node) => node.closest('li').title)")
    assert set(titles) == {"a/00.png", "a/01.png"}


def test_pick_decides_about_what_it_was_opened_for(
    open_page: Opener, audit: AuditResult, manifest: Manifest, tmp_path: Path
):
    page = open_page(audit, manifest)
    press(page, "Enter")
    page.select_option("select[name=decision]", "open")
    press(page, "Escape p")
    other = page.context.new_page()
    other.goto(page.url)
    press(other, "k")
    page.locator("#reviewed", has_text="1 of 24 flagged reviewed").wait_for()
    assert current(page) == "a/01.png"  # behind the dialog
    page.keyboard.type("dog")
    press(page, "Enter")
    assert rows_of(download(page, tmp_path))[1:] == [["a/00.png", "cat", "relabel", "dog"]]


def test_grid_says_how_many_were_decided_before(
    open_page: Opener, audit: AuditResult, manifest: Manifest
):
    page = open_page(audit, manifest)
    press(page, "g k k Control+a r")
    assert page.inner_text("#message") == "24 samples decided, 2 of them again. Z undoes."


def test_pick_searches_among_a_thousand_classes(
    open_page: Opener, tmp_path: Path, manifest: Manifest
):
    classes = (*(f"class {i:03d}" for i in range(998)), "sea lion", "lion fish")
    manifest = Manifest(
        manifest.root, manifest.paths, manifest.labels, manifest.splits, classes=classes
    )
    page = open_page(make_audit(manifest), manifest)
    assert "The 20 most confused of 1,000 classes" in page.inner_text("#matrix-hint")
    press(page, "Enter p")
    assert "60 of 1,000" in page.inner_text("#pick-count")
    page.keyboard.type("lion")
    assert page.locator("#pick-list li .name").all_inner_texts() == ["lion fish", "sea lion"]
    press(page, "ArrowDown Enter ArrowLeft")
    assert page.inner_text("#verdict") == "→ sea lion"
    press(page, "p")
    page.keyboard.type("no such class")
    assert page.inner_text("#pick-count") == "No class has such a name."
    press(page, "Enter Escape")
    assert page.inner_text("#verdict") == "→ sea lion"


def test_dialog_closes_by_a_press_beside_it_and_by_no_other(
    open_page: Opener, audit: AuditResult, manifest: Manifest
):
    page = open_page(audit, manifest)
    press(page, "Enter p")
    page.keyboard.type("dog")
    dialog = page.locator("#pick").bounding_box()
    field = page.locator("#pick-text").bounding_box()
    page.mouse.click(dialog["x"] + 5, field["y"])  # the padding
    page.mouse.move(field["x"] + 40, field["y"] + 10)
    page.mouse.down()
    page.mouse.move(dialog["x"] - 40, field["y"] + 10)  # selects the text, ends outside
    page.mouse.up()
    assert page.locator("#pick").is_visible()
    page.mouse.click(dialog["x"] - 40, field["y"])
    assert page.locator("#pick").is_hidden()
    assert page.inner_text("#reviewed") == "0 of 24 flagged reviewed"


def test_long_names_can_be_told_apart_where_one_is_chosen(
    open_page: Opener, audit: AuditResult, manifest: Manifest
):
    prefix = "07234_Plantae_Tracheophyta_Magnoliopsida_Asterales_Asteraceae_Symphyotrichum_"
    classes = tuple(prefix + end for end in ("lanceolatum", "laeve", "lateriflorum"))
    manifest = renamed(manifest, classes)
    page = open_page(make_audit(manifest), manifest)
    is_cut = "names => names.map((name) => name.scrollWidth > name.clientWidth)"
    press(page, "Enter")
    assert page.locator("#top .name").evaluate_all(is_cut) == [False, False]
    press(page, "p")
    assert page.locator("#pick-list .name").evaluate_all(is_cut) == [False, False, False]


def test_right_to_left_names_are_not_cut_in_the_middle(open_page: Opener, manifest: Manifest):
    manifest = renamed(manifest, (HEBREW, f"cat ({HEBREW}) 12", "Old_English_sheepdog"))
    page = open_page(make_audit(manifest), manifest)
    press(page, "g")
    cut = page.locator("#cards .cut").all_text_contents()
    assert set(cut) == {"Old_English_sheepdog"}
    name = page.locator("#cards .name", has_text=HEBREW).first
    assert name.evaluate("node => getComputedStyle(node).direction") == "rtl"


@pytest.mark.parametrize("width", [1280, 390])
def test_message_about_long_names_says_how_to_undo(
    open_page: Opener, manifest: Manifest, width: int
):
    manifest = renamed(manifest, tuple(f"{'Tracheophyta_' * 9}{i}" for i in range(3)))
    page = open_page(make_audit(manifest), manifest, viewport={"width": width, "height": 844})
    press(page, "Enter Enter")
    message = page.locator("#message")
    assert message.inner_text().endswith(". Z undoes.")
    assert message.evaluate("node => node.scrollHeight <= node.clientHeight + 1")


@pytest.mark.parametrize("width", [1280, 390])
def test_a_long_path_shows_its_end(open_page: Opener, tmp_path: Path, width: int):
    names = [f"{'folder/' * 30}{i:04d}.png" for i in range(2)]
    manifest = make_manifest(tmp_path / "data", names, [0, 1])
    page = open_page(make_audit(manifest), manifest, viewport={"width": width, "height": 844})
    press(page, "Enter")
    path = page.locator("#facts .path")
    assert path.inner_text() == names[0]
    line, file = path.bounding_box(), path.locator("bdi").last.bounding_box()
    assert line["x"] <= file["x"]
    assert file["x"] + file["width"] <= line["x"] + line["width"] + 1


def shown_names(page: Page, selector: str) -> list[tuple[str, str, bool]]:
    """Return of each name its text, the end that is always shown, and whether that is in view.

    Left to right: a vertical name is measured along its line.
    """
    found = page.locator(selector).evaluate_all(
        """names => names.map((name) => [
            name.textContent,
            getComputedStyle(name, "::after").content.split('"')[1],
            name.scrollWidth <= name.clientWidth && name.scrollHeight <= name.clientHeight,
        ])"""
    )
    return [(text, end, fits) for text, end, fits in found]


@pytest.mark.parametrize("size", [(1400, 900), (1024, 700), (390, 844)])
def test_long_names_show_their_beginning_and_end(
    open_page: Opener, manifest: Manifest, size: tuple[int, int]
):
    manifest = renamed(manifest, SIXTY)
    viewport = {"width": size[0], "height": size[1]}
    page = open_page(make_audit(manifest), manifest, viewport=viewport)
    rows = shown_names(page, ".matrix tbody th .name")
    assert [text for text, _, _ in rows] == list(SIXTY[:20])
    places = (".matrix tbody th", ".matrix thead th", "#confused", "#classes")
    shown = [name for place in places for name in shown_names(page, f"{place} .cut")]
    press(page, "g")
    shown += shown_names(page, "#cards .cut") + shown_names(page, "#actions .cut")
    assert len(shown) >= 20 + 20 + 2 + 60 + 2 * 12 + 2
    assert all(text.endswith(end) and len(end) == 7 and fits for text, end, fits in shown)
    assert page.locator("#cards .change .name").first.inner_text() == "magenta digit zero"  # once


def test_narrow_cells_of_the_grid_have_a_line_for_each_name(open_page: Opener, manifest: Manifest):
    manifest = renamed(manifest, (*SIXTY[:2], "pug"))
    page = open_page(make_audit(manifest), manifest, viewport={"width": 390, "height": 844})
    press(page, "g")
    tops = "card => [...card.querySelectorAll('.change .name')].map((name) => name.offsetTop)"
    given, suggested = page.locator("#cards li").first.evaluate(tops)
    assert suggested > given


def test_names_of_the_evidence_break_between_words(open_page: Opener, manifest: Manifest):
    manifest = renamed(manifest, DOGS)
    page = open_page(make_audit(manifest), manifest, viewport={"width": 1024, "height": 700})
    press(page, "Enter")
    lines = """name => {
        const range = document.createRange();
        return [...name.childNodes].filter((node) => node.data).map((node) => {
            range.selectNodeContents(node);
            return [node.data, range.getClientRects().length];
        });
    }"""
    names = page.locator("#top .name")
    assert names.evaluate_all(f"names => names.map({lines})") == [
        [["Old_", 1], ["English_", 1], ["sheepdog", 1]],
        [["Staffordshire_", 1], ["bull_", 1], ["terrier", 1]],
    ]
    name, bar = (page.locator(f"#top {part}").first.bounding_box() for part in (".name", ".track"))
    assert name["width"] > 1.5 * bar["width"]


@pytest.mark.parametrize("count", [10, 60])
@pytest.mark.parametrize("width", [1024, 390])
def test_cells_of_the_matrix_can_be_hit_by_a_finger(
    open_page: Opener, manifest: Manifest, width: int, count: int
):
    manifest = renamed(manifest, SIXTY[:count])
    viewport = {"width": width, "height": 844}
    page = open_page(make_audit(manifest), manifest, viewport=viewport)
    sizes = page.locator(".matrix button").evaluate_all(
        "cells => cells.map((cell) => Math.min(cell.offsetWidth, cell.offsetHeight))"
    )
    assert len(sizes) == min(count, 20) ** 2
    assert min(sizes) >= 24
    assert page.evaluate("document.querySelector('#summary').scrollWidth") <= width
    last = page.locator(".matrix tr:last-child button").last
    last.scroll_into_view_if_needed()
    name = page.locator(".matrix tbody th").last.bounding_box()  # stays beside its row
    card = page.locator("#matrix").bounding_box()
    cell = last.bounding_box()
    assert card["x"] <= name["x"]
    assert cell["x"] + cell["width"] <= card["x"] + card["width"]


@pytest.mark.parametrize(("count", "has_scale"), [(10, False), (60, True)])
def test_the_matrix_has_numbers_or_a_scale(
    open_page: Opener, manifest: Manifest, count: int, has_scale: bool
):
    manifest = renamed(manifest, SIXTY[:count])
    audit = make_audit(manifest)
    matrix = np.full((count, count), 0.001)
    matrix[0, 1] = 0.3
    audit.summary["noise_matrix"] = matrix.tolist()
    page = open_page(audit, manifest)
    assert (page.locator(".matrix button").nth(1).inner_text() == "30") != has_scale
    assert page.locator("#scale").is_visible() == has_scale
    if has_scale:
        assert page.inner_text("#scale").split() == ["0%", "30%"]
        colour = "node => getComputedStyle(node).backgroundColor"
        colours = [
            page.locator(place).evaluate(colour)
            for place in ("#scale .heat:last-child", ".matrix td:nth-child(3) .heat >> nth=0")
        ]
        assert colours[0] == colours[1]


def test_a_matrix_without_a_visible_cell_is_hidden(open_page: Opener, manifest: Manifest):
    manifest = renamed(manifest, SIXTY)
    audit = make_audit(manifest)
    audit.summary["noise_matrix"] = np.eye(60).tolist()
    page = open_page(audit, manifest)
    assert page.locator("#matrix-card").is_hidden()
    assert page.locator("#histogram-card").is_visible()


def test_accessible_names_hold_what_is_seen(
    open_page: Opener, audit: AuditResult, manifest: Manifest
):
    audit.summary["noise_matrix"] = [[0.986, 0.014, 0.0004], [0, 1, 0], [0, 0, 1]]
    page = open_page(audit, manifest)
    for name, text in (("cat labelled dog: 1%", "1"), (f"cat labelled {HOSTILE}: <0.1%", "")):
        assert page.locator(f'.matrix button[aria-label="{name}"]').inner_text() == text
    assert page.evaluate("[0, 0.0004, 0.0005].map(percent)") == ["0%", "<0.1%", "0.1%"]
    press(page, "g k")
    for name in ("kept cat → dog 99%", f"dog → {HOSTILE} 98%"):
        page.get_by_role("option", name=name, exact=True).first.wait_for()


def test_search_finds_a_name_in_either_unicode_form(
    open_page: Opener, audit: AuditResult, manifest: Manifest
):
    classes = ("Cafe\u0301", "th\u00e9", "eau")  # accents as a Mac and as others spell them
    manifest = Manifest(
        manifest.root, manifest.paths, manifest.labels, manifest.splits, classes=classes
    )
    page = open_page(make_audit(manifest), manifest)
    press(page, "Enter p")
    for text, name in (("caf\u00e9", classes[0]), ("the\u0301", classes[1])):
        page.fill("#pick-text", text)
        assert page.locator("#pick-list li .name").all_inner_texts() == [name]
    press(page, "Escape")
    page.fill("input[name=text]", "caf\u00e9")
    assert page.inner_text("#position") == "1 / 8"  # of twelve flagged: its label or suggested


def test_keys_of_an_input_method_choose_characters(
    open_page: Opener, audit: AuditResult, manifest: Manifest
):
    composing = """node => node.dispatchEvent(new KeyboardEvent(
        "keydown", { key: "Enter", isComposing: true, bubbles: true, cancelable: true }))"""
    page = open_page(audit, manifest)
    press(page, "Enter p")
    page.locator("#pick-text").evaluate(composing)
    assert page.locator("#pick").is_visible()
    press(page, "Escape f")
    page.locator("input[name=text]").evaluate(composing)
    assert page.evaluate("document.activeElement.name") == "text"
    assert page.inner_text("#reviewed") == "0 of 24 flagged reviewed"


def test_keys_are_found_by_their_place_on_a_french_keyboard(
    open_page: Opener, audit: AuditResult, manifest: Manifest
):
    page = open_page(audit, manifest)
    press(page, "Enter")
    page.evaluate(
        """() => document.body.dispatchEvent(
            new KeyboardEvent("keydown", { key: "&", code: "Digit1", bubbles: true }))"""
    )
    press(page, "Backspace ArrowLeft")
    assert page.inner_text("#verdict") == "removed"
    press(page, "ArrowLeft")
    assert page.inner_text("#verdict") == "→ dog"  # the first of the likeliest


def test_import_takes_what_fits_and_names_the_rest(
    open_page: Opener, audit: AuditResult, manifest: Manifest, tmp_path: Path
):
    odd = [*manifest.paths[:-1], 'z/\udcff,"ü"\n=.png']
    manifest = Manifest(
        manifest.root, StringTable(odd), manifest.labels, manifest.splits, manifest.classes
    )
    rows = [
        ["path", "label", "decision", "new_label"],
        ["a/00.png", "cat", "relabel", "dog"],
        ["a/01.png", "cat", "keep", ""],  # line 3: its label is dog
        ["a/02.png", HOSTILE, "relabel", "wolf"],  # line 4: no such class
        ["a/03.png", "cat", "drop", ""],  # line 5: no such decision
        [odd[-1], HOSTILE, "remove", ""],  # lines 6 and 7
        ["elsewhere.png", "dog", "unsure", ""],  # of a larger page: stays
        [" ", "", "\t", ""],  # blank
    ]
    file = tmp_path / "mine.csv"
    with file.open("w", encoding="utf-8", errors="surrogateescape", newline="") as handle:
        csv.writer(handle).writerows(rows)
    page = open_page(audit, manifest)
    page.set_input_files("#import-file", file)
    page.locator("#message", has_text="imported").wait_for()
    assert page.inner_text("#message") == (
        "3 decisions imported. 1 of them not on this page. 3 lines left out: line 3: another label;"
        " line 4: unknown class; line 5: unknown decision."
    )
    assert page.inner_text("#reviewed") == "2 of 24 flagged reviewed"
    exported = rows_of(download(page, tmp_path))
    assert exported == [rows[0], rows[1], rows[5], rows[6]]
    file.write_text("path,label\n", encoding="utf-8")
    page.set_input_files("#import-file", file)
    page.locator("#message", has_text="cannot be read: the first line must name").wait_for()


def test_import_reads_files_as_apply_does(
    open_page: Opener, audit: AuditResult, manifest: Manifest, tmp_path: Path
):
    rows = [
        ["path", " label", "decision", "new_label"],
        ["a/00.png", " cat ", "relabel", "cat"],  # the label that it has: kept
        ["elsewhere.png", "wolf", "keep", ""],  # line 3: no class here
        ["a/01.png", "dog", "keep", "cat"],  # line 4: keep or relabel?
        ["a/03.png", "cat", "remove", ""],
        ["a/03.png", "cat", "remove", ""],
        ["a/03.png", "cat", "relabel", "dog"],  # line 7: no longer removed?
    ]
    file = tmp_path / "mine.csv"
    file.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    page = open_page(audit, manifest)
    page.set_input_files("#import-file", file)
    page.locator("#message", has_text="imported").wait_for()
    assert page.inner_text("#message") == (
        "2 decisions imported. 3 lines left out: line 3: unknown class; line 4: keep with a new"
        " label; line 7: decided twice."
    )
    assert rows_of(download(page, tmp_path))[1:] == [
        ["a/00.png", "cat", "keep", ""],
        ["a/03.png", "cat", "remove", ""],
    ]


def test_import_says_which_decisions_it_replaces(
    open_page: Opener, audit: AuditResult, manifest: Manifest, tmp_path: Path
):
    file = tmp_path / "mine.csv"
    file.write_text(
        "path,label,decision,new_label\na/00.png,cat,remove,\na/01.png,dog,keep,\n"
        "a/03.png,cat,keep,\n",
        encoding="utf-8",
    )
    page = open_page(audit, manifest)
    press(page, "Enter k k")  # 00 and 01
    page.set_input_files("#import-file", file)
    page.locator("#message", has_text="imported").wait_for()
    assert page.inner_text("#message") == (
        "3 decisions imported. 1 of them in place of another one: Z undoes."
    )
    press(page, "z")
    assert page.inner_text("#precision") == "0% were errors (0 of 2)"


def test_pairs_are_only_those_of_doubted_labels(
    open_page: Opener, audit: AuditResult, manifest: Manifest
):
    suggested = audit.suggested.copy()
    suggested[:12] = audit.labels[:12]
    page = open_page(replace(audit, suggested=suggested), manifest)
    options = page.locator("select[name=pair] option").all_text_contents()
    assert sorted(options) == sorted(
        ["any pair", "cat → dog (4)", f"dog → {HOSTILE} (4)", f"{HOSTILE} → cat (4)"]
    )


def test_advice_follows_what_the_review_finds(
    open_page: Opener, audit: AuditResult, manifest: Manifest
):
    page = open_page(audit, manifest)
    press(page, "Enter")
    assert page.inner_text("#advice") == "Go on: about 18 errors in the next 20."
    press(page, "k " * 12)
    # 12 kept of 11.2 expected errors: 10 / 21.2 of the probabilities of the other 12 remains
    assert page.inner_text("#left") == "≈ 5 errors left"
    advice = page.locator("#advice").text_content()  # hidden by the message for a while
    assert advice == "Still worth a look: about 5 errors in the next 12."


@pytest.mark.parametrize("lowest", [0.95, 0.8])
def test_accepting_unseen_is_advised_only_where_it_takes_the_next(
    open_page: Opener, tmp_path: Path, lowest: float
):
    names = [f"a/{i:02d}.png" for i in range(60)]
    manifest = make_manifest(tmp_path / "data", names, [i % 3 for i in range(60)])
    probability = np.linspace(0.99, lowest, 60).astype(np.float32)
    audit = make_audit(manifest, error_probability=probability, flagged=probability > 0.5)
    page = open_page(audit, manifest)
    press(page, "Enter " + "a " * 30)
    advice = page.locator("#advice").text_content()
    assert ("--accept-above 0.9" in advice) == (lowest >= 0.9)


def test_nobody_is_told_to_stop_before_the_first_decision(
    open_page: Opener, audit: AuditResult, manifest: Manifest
):
    probability = np.full(SAMPLES, 0.08, dtype=np.float32)
    none = np.zeros(SAMPLES, dtype=bool)
    page = open_page(replace(audit, error_probability=probability, flagged=none), manifest)
    assert page.inner_text("#advice") == "Few suspects: about 2 errors in the next 20."
    press(page, "Enter k")
    advice = page.locator("#advice").text_content()
    assert advice == "You can stop: about 2 errors in the next 20."


def test_advice_about_one_suspect_does_not_speak_of_zero_errors(
    open_page: Opener, audit: AuditResult, manifest: Manifest
):
    probability = np.linspace(0.48, 0.02, SAMPLES).astype(np.float32)
    audit = replace(audit, error_probability=probability)
    page = open_page(audit, manifest, render={"max_suspects": 1})
    press(page, "Enter")
    advice = "Still worth a look: less than one error in the next one."
    assert page.inner_text("#advice") == advice


def test_below_the_threshold_only_on_request(open_page: Opener, manifest: Manifest):
    page = open_page(make_audit(manifest), manifest)  # 0.99 ... 0.01: twelve are flagged
    press(page, "Enter")
    press(page, "Enter " * 12)
    assert page.inner_text("#reviewed") == "12 of 12 flagged reviewed"
    assert "elr apply" in page.inner_text("#finished .command")
    page.locator("#finished button", has_text="Go on below the threshold: 12 more").click()
    assert current(page) == "a/12.png"
    press(page, "Enter")
    assert page.inner_text("#reviewed") == "13 of 24 on this page reviewed"


@pytest.mark.parametrize("is_full", [True, False])
def test_flagged_ones_beyond_the_page_are_promised_only_where_they_fit(
    open_page: Opener, audit: AuditResult, manifest: Manifest, is_full: bool
):
    empty = len(render_report(audit, manifest, max_suspects=0).encode())
    limit = {"max_bytes": empty + 30_000} if is_full else {"max_suspects": 6}
    page = open_page(audit, manifest, render=limit)
    press(page, "Enter " + "k " * SAMPLES)
    finished = page.inner_text("#finished")
    assert "more are flagged, but not on this page." in finished
    assert ("It is full: correct these, then audit again." in finished) == is_full
    assert (f"--report-images {SAMPLES}" in finished) != is_full


def examples(page: Page) -> list[list[str]]:
    """Return the titles of the pictures beside a suspect: of its given and suggested class."""
    titles = "images => images.map((image) => image.title)"
    sides = ("given", "suggested")
    return [page.locator(f"#{side} .four img").evaluate_all(titles) for side in sides]


def test_each_suspect_has_its_own_nearest_examples(
    open_page: Opener, audit: AuditResult, manifest: Manifest
):
    # 0 and 3 are both labelled cat and look like a dog; row 22 has a hostile name
    nearest = {
        0: {0: np.array([6, 9, 12, 15]), 1: np.array([4, 7, 10, 13])},
        3: {0: np.array([18, 21, 9, 6]), 1: np.array([16, 19, 10, 13])},
        1: {1: np.array([22, 4, 7, 10]), 2: np.array([23, 5, 8, 22])},
    }
    page = open_page(replace(audit, nearest=nearest), manifest)
    press(page, "Enter")
    assert page.inner_text("#beside-title") == "Nearest sure examples"
    assert examples(page) == [
        ["a/06.png", "a/09.png", "a/12.png", "a/15.png"],
        ["a/04.png", "a/07.png", "a/10.png", "a/13.png"],
    ]
    press(page, "l")
    assert examples(page)[0][0] == f"z/{HOSTILE}.png"
    assert page.locator("[src='x'], [onerror]").count() == 0
    press(page, "l l")
    assert current(page) == "a/03.png"
    assert examples(page) == [
        ["a/18.png", "a/21.png", "a/09.png", "a/06.png"],
        ["a/16.png", "a/19.png", "a/10.png", "a/13.png"],
    ]


def test_suspect_that_looks_like_its_label_has_one_side(
    open_page: Opener, audit: AuditResult, manifest: Manifest
):
    page = open_page(replace(audit, suggested=audit.labels), manifest)
    press(page, "Enter")
    assert page.inner_text("#question") == "Labelled cat, and it looks like it"
    assert page.inner_text("#beside-title") == "Sure examples"
    assert page.locator("#given").is_visible()
    assert page.locator("#suggested").is_hidden()
    press(page, "g")
    assert page.inner_text("#cards .change >> nth=0") == "cat"


def test_duplicates_lead_to_each_other(open_page: Opener, audit: AuditResult, manifest: Manifest):
    groups = (DuplicateGroup((0, 3), True), DuplicateGroup((2, 9), False))
    page = open_page(replace(audit, duplicates=groups), manifest)
    assert page.locator("#duplicates figcaption").all_inner_texts() == [
        "Looks the same, different labels",
        "Same file, same label",
    ]
    about = page.inner_text("#about")
    assert "2 groups: 1 same file, 1 looks the same; 1 with different labels" in about
    page.locator("#duplicates .twin").nth(1).click()
    assert current(page) == "a/09.png"
    assert page.inner_text("#twins figcaption") == "Looks the same"
    page.locator("#twins .twin").click()
    assert current(page) == "a/02.png"
    page.select_option("select[name=scope]", "twins")
    assert page.inner_text("#position") == "2 / 4"
    press(page, "l")
    assert current(page) == "a/03.png"
    assert page.inner_text("#twins figcaption") == "Same file"


def test_groups_of_duplicates_are_counted(
    open_page: Opener, audit: AuditResult, manifest: Manifest
):
    groups = (DuplicateGroup((0, 3), False), DuplicateGroup((2, 9), False))
    page = open_page(replace(audit, duplicates=groups), manifest)
    assert "2 groups: 0 same file, 2 look the same; 1 with" in page.inner_text("#about")
    groups = (DuplicateGroup((0, 3), False, partly_exact=True), DuplicateGroup((2, 9), False))
    page = open_page(replace(audit, duplicates=groups), manifest)
    assert "2 groups: 1 same file, 1 looks the same; 1 with" in page.inner_text("#about")
    named = page.locator("#duplicates figcaption").all_inner_texts()
    assert named[1] == "Looks the same, some are the same file, same label"


@pytest.mark.parametrize("applies", [True, False])
def test_command_to_apply_is_there_only_where_it_works(
    open_page: Opener, audit: AuditResult, manifest: Manifest, applies: bool
):
    audit.summary.update(run="runs/it's mine", applies_to_run=applies)
    page = open_page(audit, manifest)
    command = "elr apply 'runs/it'\\''s mine' decisions.csv --out corrected.csv"
    press(page, "?")
    page.locator("#help").wait_for(state="visible")
    assert (command in page.inner_text("#help")) == applies
    press(page, "Escape")
    page.locator("#help").wait_for(state="hidden")
    press(page, "Enter")
    press(page, "Enter " * SAMPLES)
    finished = page.inner_text("#finished")
    assert (command in finished) == applies
    assert ("decisions.csv lists the changes for this data" in finished) != applies
    assert ("elr apply" in page.text_content("body main")) == applies


def test_unreadable_suspect_says_why(open_page: Opener, audit: AuditResult, manifest: Manifest):
    manifest.file(0).unlink()
    page = open_page(audit, manifest)
    press(page, "Enter")
    assert page.inner_text("#problem") == "This image cannot be shown: the file does not exist."
    press(page, "k")
    assert page.locator("#picture").evaluate("image => image.naturalWidth") == 24


def test_tiny_pictures_are_enlarged_with_sharp_pixels(
    open_page: Opener, audit: AuditResult, manifest: Manifest
):
    page = open_page(audit, manifest)
    press(page, "Enter")
    picture = page.locator("#picture")
    assert picture.bounding_box()["width"] == 240
    assert picture.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"


def test_page_works_where_the_browser_keeps_nothing(
    open_page: Opener, audit: AuditResult, manifest: Manifest, tmp_path: Path
):
    denied = "Object.defineProperty(window, 'localStorage', { get() { throw new Error('no'); } });"
    page = open_page(audit, manifest, script=denied)
    press(page, "Enter k")
    assert "keeps no decisions" in page.locator("#advice").text_content()
    assert len(rows_of(download(page, tmp_path))) == 2


def test_decisions_are_kept_where_there_is_no_room_for_the_steps_to_undo(
    open_page: Opener, audit: AuditResult, manifest: Manifest
):
    full = """const setItem = Storage.prototype.setItem;
        Storage.prototype.setItem = function (key, value) {
            if (value.length > 5000) throw new DOMException("full", "QuotaExceededError");
            setItem.call(this, key, value);
        };"""
    page = open_page(audit, manifest, script=full)
    press(page, "g Control+a k Control+a r Control+a u Control+a k")
    assert "keeps no decisions" not in page.locator("#advice").text_content()
    page.reload()
    assert page.inner_text("#reviewed") == "24 of 24 flagged reviewed"
    assert page.inner_text("#precision") == "0% were errors (0 of 24)"


def test_two_tabs_share_their_decisions(open_page: Opener, audit: AuditResult, manifest: Manifest):
    page = open_page(audit, manifest)
    other = page.context.new_page()
    other.goto(page.url)
    press(page, "Enter k r")
    other.locator("#reviewed", has_text="2 of 24 flagged reviewed").wait_for()
    press(other, "Enter")  # not what the first tab has decided
    assert current(other) == "a/02.png"
    press(other, "k")
    page.locator("#reviewed", has_text="3 of 24 flagged reviewed").wait_for()
    assert page.inner_text("#precision") == "33% were errors (1 of 3)"


def test_theme_can_be_chosen_and_stays(open_page: Opener, audit: AuditResult, manifest: Manifest):
    page = open_page(audit, manifest, color_scheme="light")
    background = "() => getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.click("[data-do=theme]")
    dark = page.evaluate(background)
    assert dark != light
    page.reload()
    assert page.evaluate(background) == dark


def test_keyboard_alone_reaches_everything(
    open_page: Opener, audit: AuditResult, manifest: Manifest
):
    page = open_page(audit, manifest)
    press(page, "?")
    assert page.locator("#help").is_visible()
    press(page, "Escape")
    page.locator(".matrix button").nth(1).focus()
    press(page, "ArrowRight ArrowDown")
    assert page.evaluate("document.activeElement.title").startswith(f"dog labelled {HOSTILE}")
    press(page, "s Enter")  # Enter presses the cell in focus: nothing here looks like that
    assert "None of the 24 samples" in page.inner_text("#message")
    page.locator(".matrix button").nth(1).focus()
    press(page, "Shift+Tab")
    assert page.evaluate("document.activeElement.dataset.do") == "start"
    press(page, "Enter")
    assert page.evaluate("document.activeElement.id") == "stage"
    page.locator("[data-do=unsure]").focus()
    press(page, "Enter")  # presses the button; the focus goes back to the picture
    assert current(page) == "a/01.png"
    assert page.evaluate("document.activeElement.id") == "stage"
    assert page.inner_text("#message").startswith("cat unsure")


def test_each_list_of_the_summary_is_one_stop(
    open_page: Opener, audit: AuditResult, manifest: Manifest
):
    page = open_page(audit, manifest)
    for place in (".matrix", "#confused", "#classes"):
        assert page.locator(f"{place} button[tabindex='0']").count() == 1
    title = "document.activeElement.title"
    page.locator("#classes button").first.focus()
    press(page, "ArrowDown ArrowDown ArrowUp ArrowRight")
    assert page.evaluate(title) == "dog: 1 of 24 flagged"
    page.locator(".matrix button").nth(1).focus()
    press(page, "ArrowRight ArrowRight")  # the last cell of its row
    assert page.evaluate(title).startswith(f"cat labelled {HOSTILE}")


def test_summary_prints_whole(open_page: Opener, audit: AuditResult, manifest: Manifest):
    page = open_page(audit, manifest, color_scheme="light")
    page.click("[data-do=theme]")  # dark, but not on paper
    page.emulate_media(media="print")
    assert page.evaluate("document.documentElement.scrollHeight") > 800
    is_cut = "parts => parts.filter((part) => part.scrollHeight > part.clientHeight + 1).length"
    assert page.locator("body, main, #summary, .card, .bars").evaluate_all(is_cut) == 0
    assert page.locator("[data-do]:visible, [data-view]:visible").count() == 0
    style = page.locator(".matrix button").nth(1)
    assert style.evaluate("cell => getComputedStyle(cell).printColorAdjust") == "exact"
    assert style.evaluate("cell => getComputedStyle(cell).colorScheme") == "light"


def test_forced_colours_keep_the_matrix_and_the_current_view(
    open_page: Opener, audit: AuditResult, manifest: Manifest
):
    audit.summary["noise_matrix"] = [[0.7, 0.3, 0.01], [0, 1, 0], [0, 0, 1]]
    page = open_page(audit, manifest, forced_colors="active")
    colour = "nodes => nodes.map((node) => getComputedStyle(node).backgroundColor)"
    assert len(set(page.locator(".matrix button").evaluate_all(colour)[1:4])) == 3
    current, *others = page.locator("[data-view]").evaluate_all(colour)
    assert current not in others


def test_summary_scrolls_by_keys(open_page: Opener, audit: AuditResult, manifest: Manifest):
    page = open_page(audit, manifest)
    is_scrolled = "document.querySelector('#summary').scrollTop > 0"
    press(page, "PageDown")
    page.wait_for_function(is_scrolled)
    press(page, "Home g s PageDown")
    page.wait_for_function(is_scrolled)


@pytest.mark.parametrize("size", [(1024, 640), (640, 400), (390, 844), (320, 568)])
def test_small_screens_hold_everything(
    open_page: Opener, audit: AuditResult, manifest: Manifest, size: tuple[int, int]
):
    page = open_page(audit, manifest, viewport={"width": size[0], "height": size[1]})
    for keys in ("s", "Enter", "g"):
        press(page, keys)
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
        assert page.evaluate("document.documentElement.scrollHeight") <= size[1]
    for action in ("import", "export", "help"):
        box = page.locator(f".tools [data-do={action}]").bounding_box()
        assert box["width"] >= 30
        assert box["x"] + box["width"] <= size[0]
    with page.expect_file_chooser():
        page.click("[data-do=import]")
    for action in ("keep", "accept", "pick", "remove", "unsure", "undo"):
        box = page.locator(f"#actions [data-do={action}]").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= size[0]
        assert box["y"] + box["height"] <= size[1]


@pytest.mark.parametrize("size", [(390, 700), (1024, 440), (740, 360)])
def test_the_next_sample_is_seen_from_its_top(
    open_page: Opener, audit: AuditResult, manifest: Manifest, size: tuple[int, int]
):
    page = open_page(audit, manifest, viewport={"width": size[0], "height": size[1]})
    press(page, "Enter")
    scrollers = page.locator("html, #desk, .evidence")
    scrollers.evaluate_all("nodes => nodes.forEach((node) => node.scrollTo(0, 9999))")
    assert sum(scrollers.evaluate_all("nodes => nodes.map((node) => node.scrollTop)")) > 20
    press(page, "k")
    assert page.locator("#canvas").bounding_box()["y"] >= 0
    assert page.locator(".evidence").evaluate("node => node.scrollTop") == 0


def test_search_has_room_on_a_narrow_screen(
    open_page: Opener, audit: AuditResult, manifest: Manifest
):
    page = open_page(audit, manifest, viewport={"width": 390, "height": 844})
    press(page, "g /")
    box = page.locator("input[name=text]").bounding_box()
    assert box["width"] >= 200
    assert box["x"] + box["width"] <= 390


@pytest.mark.parametrize("size", [(740, 360), (320, 256)])
def test_low_screens_scroll_the_whole_page(
    open_page: Opener, audit: AuditResult, manifest: Manifest, size: tuple[int, int]
):
    page = open_page(audit, manifest, viewport={"width": size[0], "height": size[1]})
    for keys in ("s", "Enter", "g"):
        press(page, keys)
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
        assert page.evaluate("document.documentElement.scrollHeight") > 1.5 * size[1]
    press(page, "g")
    actions = page.locator("#actions").bounding_box()
    assert actions["height"] <= 60
    assert actions["y"] + actions["height"] <= size[1] + 1
    canvas = page.locator("#canvas").bounding_box()
    assert canvas["y"] >= 0
    assert 100 <= canvas["height"] <= actions["y"] - canvas["y"]


def test_curves_stay_legible_on_a_narrow_screen(
    open_page: Opener, audit: AuditResult, manifest: Manifest
):
    page = open_page(audit, manifest, viewport={"width": 390, "height": 844})
    assert page.locator("#curves img").bounding_box()["width"] >= 700
    assert page.evaluate("document.querySelector('#summary').scrollWidth") <= 390


def test_window_at_twice_its_size_shows_picture_and_question(
    open_page: Opener, audit: AuditResult, manifest: Manifest
):
    page = open_page(audit, manifest, viewport={"width": 640, "height": 400})
    assert page.locator("[data-do=import]").is_visible()
    press(page, "Enter")
    bottom = page.locator("#actions").bounding_box()["y"]
    for part in ("picture", "question"):
        box = page.locator(f"#{part}").bounding_box()
        assert box["y"] + box["height"] <= bottom
