"""The review page as text: what is embedded, how large, and how it is escaped."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from elrcli.audit.report import headline, load_picture, render_report
from elrcli.audit.result import AuditResult, DuplicateGroup
from elrcli.data.manifest import Manifest, StringTable

HOSTILE = "<img src=x onerror=alert(1)>"
CLASSES = ("cat", "dog", HOSTILE)


def make_manifest(
    root: Path,
    names: list[str],
    labels: list[int],
    classes: tuple[str, ...] = CLASSES,
    side: int = 24,
) -> Manifest:
    """Write one image of noise per name; every fourth row is in `val`."""
    rng = np.random.default_rng(0)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name, "PNG")
    return Manifest(
        root=root,
        paths=StringTable(names),
        labels=np.array(labels, dtype=np.int32),
        splits=np.array([int(i % 4 == 3) for i in range(len(names))], dtype=np.int8),
        classes=classes,
    )


def make_audit(manifest: Manifest, **changes: Any) -> AuditResult:
    """Rank the rows in manifest order with falling probability; each suggests the next class."""
    count, classes = len(manifest), manifest.num_classes
    probability = np.linspace(0.99, 0.01, count).astype(np.float32)
    suggested = (manifest.labels + 1) % classes
    last = [np.flatnonzero(manifest.labels == label)[::-1][:12] for label in range(classes)]
    matrix = np.full((classes, classes), 0.2 / max(1, classes - 1))
    np.fill_diagonal(matrix, 0.8)
    flagged = probability >= 0.5
    summary = {
        "samples": count,
        "classes": classes,
        "flagged": int(flagged.sum()),
        "threshold": 0.5,
        "estimated_errors": {"estimate": float(probability.sum()), "low": 1.2, "high": count - 1},
        "estimated_error_rate": 0.5,
        "per_class": [
            {"class": name, "samples": count, "flagged": 1, "estimated_error_rate": 0.1}
            for name in manifest.classes
        ],
        "noise_matrix": matrix.tolist(),
        "most_confused": [
            {"true": manifest.classes[1], "given": manifest.classes[0], "probability": 0.1}
            | {"samples": 3.0}
        ],
        "unreadable": [{"path": f"{HOSTILE}.jpg", "reason": "the file is empty"}],
        "run": f"runs/{HOSTILE}",
        "version": "1.0",
        "backbone": "resnet18",
        "method": "elr",
        "epochs": 3,
    }
    top = np.stack([suggested, manifest.labels], axis=1).astype(np.int32)
    fields: dict[str, Any] = {
        "rows": np.arange(count, dtype=np.int64),
        "labels": manifest.labels,
        "suggested": suggested.astype(np.int32),
        "score": probability,
        "error_probability": probability,
        "flagged": flagged,
        "top_classes": top,
        "top_probabilities": np.tile(np.float32([0.9, 0.1]), (count, 1)),
        "exemplars": dict(enumerate(last)),
        "summary": summary,
        "duplicates": (),
    }
    return AuditResult(**(fields | changes))


def page_data(html: str) -> dict[str, Any]:
    """Return the JSON that the page carries."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert found is not None
    return json.loads(found[1])


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_manifest(tmp_path, [f"a/{i}.png" for i in range(8)], [0, 1, 2, 0, 1, 2, 0, 1])


def test_headline_counts_and_says_how_sure():
    summary = {
        "samples": 12_000,
        "flagged": 401,
        "threshold": 0.5,
        "estimated_errors": {"estimate": 411.6, "low": 350.2, "high": 480.0},
        "estimated_error_rate": 0.0343,
    }
    first, detail = headline(summary)
    assert first == "About 412 of 12,000 labels are wrong"
    assert detail == (
        "3.4% of all labels, between 350 and 480 with 90% confidence."
        " 401 are flagged: wrong with a probability of at least 0.5."
    )


@pytest.mark.parametrize(
    ("estimate", "low", "high", "first"),
    [
        (0.2, 0.0, 3.0, "Hardly any of 12,000 labels looks wrong"),
        (1.0, 0.6, 1.4, "About 1 of 12,000 labels is wrong"),
        (60.0, 3.0, 400.0, "Between 3 and 400 of 12,000 labels may be wrong"),
        (423.0, 193.0, 530.0, "About 423 of 12,000 labels are wrong"),
        (71.2, 4.3, 71.2, "Between 4 and 71 of 12,000 labels may be wrong"),
        (60.0, 0.0, 400.0, "Up to 400 of 12,000 labels may be wrong"),
        (0.0, 0.0, 900.0, "Up to 900 of 12,000 labels may be wrong"),
    ],
)
def test_headline_claims_no_more_than_the_interval(
    estimate: float, low: float, high: float, first: str
):
    summary = {
        "samples": 12_000,
        "flagged": 0,
        "threshold": 0.5,
        "estimated_errors": {"estimate": estimate, "low": low, "high": high},
        "estimated_error_rate": estimate / 12_000,
    }
    assert headline(summary)[0] == first
    detail = headline(summary)[1]
    assert f"between {low:.0f} and {high:.0f} with 90% confidence." in detail
    assert " None reaches the threshold of 0.5; the first of the order may be worth" in detail


@pytest.mark.parametrize(
    ("rate", "text"), [(0.0, "0%"), (0.0004, "<0.1%"), (0.0005, "0.1%"), (0.2, "20%")]
)
def test_headline_does_not_call_a_small_share_none(rate: float, text: str):
    summary = {
        "samples": 12_000,
        "flagged": 1,
        "threshold": 0.5,
        "estimated_errors": {"estimate": 1, "low": 1, "high": 1},
        "estimated_error_rate": rate,
    }
    assert headline(summary)[1].startswith(f"{text} of all labels")


def test_half_a_label_of_one_is_not_hardly_any():
    summary = {
        "samples": 1,
        "flagged": 0,
        "threshold": 0.5,
        "estimated_errors": {"estimate": 0.26, "low": 0.0, "high": 0.4},
        "estimated_error_rate": 0.26,
    }
    first, detail = headline(summary)
    assert first == "Up to 1 of 1 labels may be wrong"
    assert detail.startswith("Best estimate: 0, 26% of all labels, between 0 and 1 with")


def test_page_carries_the_ranking_with_pictures(manifest: Manifest):
    data = page_data(render_report(make_audit(manifest), manifest))
    assert [item["path"] for item in data["items"]] == list(manifest.paths)
    assert data["items"][3] == {
        "path": "a/3.png",
        "rank": 4,
        "split": "val",
        "label": 0,
        "suggested": 1,
        "p": 0.57,
        "flagged": True,
        "top": [[1, 0.9], [0, 0.1]],
    }
    own, given, suggested = data["gallery"][3]
    uri, width, height, problem, path = data["pictures"][own]
    assert uri.startswith("data:image/jpeg;base64,")
    assert (width, height, problem, path) == (24, 24, "", "a/3.png")
    paths = [picture[4] for picture in data["pictures"]]
    assert [paths[i] for i in given] == ["a/6.png", "a/0.png"]  # the cats, surest first; not 3
    assert [paths[i] for i in suggested] == ["a/7.png", "a/4.png", "a/1.png"]
    assert sorted(paths) == list(manifest.paths)  # each picture once
    assert data["rest"] == {"count": 0, "flagged": 0, "expected": 0}
    assert sum(data["histogram"]) == 8


def test_same_audit_gives_the_same_page(manifest: Manifest):
    result = make_audit(manifest)
    assert render_report(result, manifest) == render_report(result, manifest)


def test_samples_beyond_the_page_are_counted(manifest: Manifest):
    data = page_data(render_report(make_audit(manifest), manifest, max_suspects=3))
    assert len(data["items"]) == 3
    # 0.99, 0.85, 0.71 are shown; 0.57, 0.43, 0.29, 0.15, 0.01 are not
    assert data["rest"] == {"count": 5, "flagged": 1, "expected": 1.45}


def beside(data: dict[str, Any], item: int) -> list[list[str]]:
    """Return the paths of an item's exemplars, of its given and of its suggested class."""
    return [[data["pictures"][i][4] for i in places] for places in data["gallery"][item][1:]]


def test_exemplars_are_the_nearest_ones_then_the_surest(tmp_path: Path):
    names = [f"{i:02d}.png" for i in range(20)]
    manifest = make_manifest(tmp_path, names, [i % 2 for i in range(20)], CLASSES[:2])
    nearest = {
        0: {0: np.array([2, 4, 6, 8, 10]), 1: np.array([1, 3, 5, 7])},
        1: {1: np.array([19, 17, 15, 13]), 0: np.array([12])},
    }
    sure = {0: np.array([18, 16, 14]), 1: np.array([11])}
    audit = make_audit(manifest, exemplars=sure, nearest=nearest)
    data = page_data(render_report(audit, manifest, max_suspects=3))
    assert beside(data, 0) == [
        ["02.png", "04.png", "06.png", "08.png"],
        ["01.png", "03.png", "05.png", "07.png"],
    ]
    # One cat is near to 1. The others are those that most suspects have beside them.
    assert beside(data, 1)[1] == ["12.png", "02.png", "04.png", "06.png"]
    # Nothing is near to 2: it shows the same cats, but not itself.
    assert beside(data, 2)[0] == ["12.png", "04.png", "06.png", "08.png"]


def test_no_exemplar_is_the_suspect_or_its_duplicate(manifest: Manifest):
    near = {0: {0: np.array([0, 3, 6]), 1: np.array([7, 4, 1])}}
    audit = make_audit(
        manifest,
        nearest=near,
        exemplars={0: np.array([0, 3])},
        duplicates=(DuplicateGroup((0, 3), True), DuplicateGroup((1, 4), False)),
    )
    data = page_data(render_report(audit, manifest, max_suspects=1))
    assert beside(data, 0) == [["a/6.png"], ["a/7.png", "a/4.png"]]  # 1 is the same as 4


def test_pictures_beside_the_suspects_are_bounded(tmp_path: Path):
    count = 200
    names = [f"{i:03d}.png" for i in range(count)]
    manifest = make_manifest(tmp_path, names, [i % 2 for i in range(count)], CLASSES[:2], side=4)
    rng = np.random.default_rng(0)
    rows = {label: np.arange(60 + label, count, 2) for label in range(2)}
    nearest = {
        row: {label: rng.permutation(rows[label])[:8] for label in range(2)} for row in range(60)
    }
    data = page_data(
        render_report(make_audit(manifest, nearest=nearest), manifest, max_suspects=60)
    )
    shown = [{path for item in range(60) for path in beside(data, item)[side]} for side in (0, 1)]
    assert len(shown[0] | shown[1]) <= 48
    assert len(data["pictures"]) <= 60 + 48
    assert all(len(paths) == 4 for item in range(60) for paths in beside(data, item))


def test_duplicates_with_different_labels_are_on_the_page(manifest: Manifest):
    groups = (
        DuplicateGroup((0, 3), True),  # the same label
        DuplicateGroup((2, 4), False, partly_exact=True),  # hostile and dog
        DuplicateGroup((6, 7), True),  # cat and dog
    )
    audit = make_audit(manifest, duplicates=groups)
    data = page_data(render_report(audit, manifest, max_suspects=2))
    assert [item["path"][2] for item in data["items"]] == ["0", "1", "2", "4", "6", "7"]
    assert data["twins"] == [
        {"exact": True, "partlyExact": False, "differ": True, "count": 2, "items": [4, 5]},
        {"exact": False, "partlyExact": True, "differ": True, "count": 2, "items": [2, 3]},
    ]
    assert data["duplicates"] == {"exact": 3, "alike": 0, "differ": 2}
    data = page_data(render_report(audit, manifest))
    assert data["twins"][2]["exact"]
    assert data["twins"][2]["items"] == [0, 3]
    assert not data["twins"][2]["differ"]


def test_a_picture_that_is_everywhere_does_not_fill_the_page(tmp_path: Path):
    names = [f"{i:02d}.png" for i in range(40)]
    manifest = make_manifest(tmp_path, names, [i % 3 for i in range(40)])
    audit = make_audit(manifest, duplicates=(DuplicateGroup(tuple(range(40)), True),))
    data = page_data(render_report(audit, manifest, max_suspects=2))
    assert len(data["items"]) == 12
    assert data["twins"][0]["count"] == 40


def test_hostile_names_never_become_markup(tmp_path: Path):
    names = [f"{HOSTILE}/{i}.png" for i in range(3)] + ["a/\u2028</script><b>.png"]
    manifest = make_manifest(tmp_path, [*names[:3], "a/odd.png"], [0, 1, 2, 0])
    manifest = Manifest(
        tmp_path, StringTable(names), manifest.labels, manifest.splits, manifest.classes
    )
    html = render_report(make_audit(manifest), manifest)
    assert "<img src=x" not in html
    assert "\u2028" not in html
    assert html.count("</script>") == 2
    data = page_data(html)
    assert [item["path"] for item in data["items"]] == names
    assert data["classes"][2] == HOSTILE


def test_file_names_that_are_not_utf8_survive(tmp_path: Path):
    manifest = make_manifest(tmp_path, ["a/x.png", "a/y.png"], [0, 1])
    odd = StringTable(["a/\udcff.png", "a/y.png"])
    manifest = Manifest(tmp_path, odd, manifest.labels, manifest.splits, manifest.classes)
    html = render_report(make_audit(manifest), manifest)
    html.encode("utf-8")  # can be written
    data = page_data(html)
    assert data["items"][0]["path"] == "a/\udcff.png"
    own = data["gallery"][0][0]
    assert data["pictures"][own][3:] == ["the file does not exist", "a/\udcff.png"]


def test_policy_allows_the_pages_own_blocks_and_nothing_else(manifest: Manifest):
    html = render_report(make_audit(manifest), manifest, curves_svg="<svg/>")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    style = re.search(r"<style>(.*?)</style>", html, re.S)
    script = re.search(r"<script>(.*?)</script>", html, re.S)
    assert policy is not None
    assert style is not None
    assert script is not None

    def hashed(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    assert policy[1] == (
        "default-src 'none'; img-src data:;"
        f" style-src 'sha256-{hashed(style[1])}'; script-src 'sha256-{hashed(script[1])}';"
        " base-uri 'none'; form-action 'none'"
    )
    assert set(re.findall(r"https?://[^\s\"'<]*", html)) == {"http://www.w3.org/2000/svg"}
    assert "innerHTML" not in html


@pytest.mark.parametrize("has_nearest", [False, True])
@pytest.mark.parametrize("room", [514_000, 214_000])  # beside the page's own blocks
def test_pictures_shrink_into_the_budget(tmp_path: Path, room: int, has_nearest: bool):
    names = [f"a/{i:02d}.png" for i in range(48)]
    manifest = make_manifest(tmp_path, names, [i % 3 for i in range(48)], side=200)
    rng = np.random.default_rng(0)
    sure = {label: np.arange(24 + label, 48, 3) for label in range(3)}
    nearest = {row: {label: rng.permutation(sure[label]) for label in sure} for row in range(24)}
    audit = make_audit(manifest, nearest=nearest if has_nearest else {})
    max_bytes = room + len(render_report(audit, manifest, max_suspects=0).encode())
    html = render_report(audit, manifest, max_suspects=24, max_bytes=max_bytes)
    assert len(html.encode()) <= max_bytes
    assert len(page_data(html)["items"]) == 24


def test_least_suspicious_samples_go_when_the_smallest_pictures_are_too_many(tmp_path: Path):
    names = [f"a/{i:02d}.png" for i in range(24)]
    manifest = make_manifest(tmp_path, names, [i % 3 for i in range(24)], side=200)
    audit = make_audit(manifest)
    empty = len(render_report(audit, manifest, max_suspects=0).encode())
    html = render_report(audit, manifest, max_bytes=empty + 70_000)
    data = page_data(html)
    assert len(html.encode()) <= empty + 70_000
    assert 0 < len(data["items"]) < 24
    assert len(data["items"]) == len(data["gallery"])
    assert [item["rank"] for item in data["items"]] == list(range(1, len(data["items"]) + 1))
    assert data["rest"]["count"] == 24 - len(data["items"])


def test_more_suspects_than_fit_leave_no_fewer_on_the_page(tmp_path: Path):
    manifest = make_manifest(tmp_path, [f"a/{i}.png" for i in range(200)], [0] * 200)
    audit = make_audit(manifest)
    max_bytes = len(render_report(audit, manifest, max_suspects=0).encode()) + 50_000
    few, many = (
        page_data(render_report(audit, manifest, max_suspects=count, max_bytes=max_bytes))
        for count in (20, 200)
    )
    assert len(many["items"]) >= len(few["items"]) > 0
    assert many["isFull"]


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [
        ((20, 30), 128, (20, 30)),  # never enlarged
        ((300, 200), 100, (150, 100)),
        ((600, 100), 60, (60, 15)),  # long: as high as 6:1 at 60 * 1.5, then cut to 4:1
    ],
)
def test_thumbnail_size(
    tmp_path: Path, size: tuple[int, int], side: int, expected: tuple[int, int]
):
    Image.new("RGB", size, "red").save(tmp_path / "x.png")
    picture = load_picture(tmp_path / "x.png", side)
    assert (picture.width, picture.height) == expected


def test_a_pipe_in_place_of_an_image_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "a.png")
    assert load_picture(tmp_path / "a.png", 32).problem == "not a regular file"


def test_unreadable_suspect_says_why(manifest: Manifest):
    manifest.file(0).write_bytes(b"no image")
    data = page_data(render_report(make_audit(manifest), manifest))
    uri, _, _, problem, _ = data["pictures"][data["gallery"][0][0]]
    assert uri == ""
    assert problem == "not an image in a format that Pillow reads"
    assert beside(data, 3)[0] == ["a/6.png"]  # row 0 cannot be shown there either


def test_matrix_of_many_classes_shows_the_most_confused(tmp_path: Path):
    classes = tuple(f"c{i:02d}" for i in range(60))
    manifest = make_manifest(
        tmp_path, [f"{i}.png" for i in range(60)], list(range(60)), classes=classes
    )
    audit = make_audit(manifest)
    matrix = np.full((60, 60), 0.001)
    matrix[57, 3] = 0.5
    audit.summary["noise_matrix"] = matrix.tolist()
    shown = page_data(render_report(audit, manifest))["matrix"]
    assert len(shown["classes"]) == 20
    row, column = shown["classes"].index(57), shown["classes"].index(3)
    assert shown["values"][row][column] == 0.5


def test_decisions_belong_to_run_and_labels_not_to_settings(manifest: Manifest):
    audit = make_audit(manifest)
    key = page_data(render_report(audit, manifest))["key"]
    assert page_data(render_report(audit, manifest, max_suspects=2))["key"] == key
    relabelled = Manifest(
        manifest.root, manifest.paths, manifest.labels[::-1].copy(), manifest.splits, CLASSES
    )
    assert page_data(render_report(audit, relabelled))["key"] != key
    audit.summary["run"] = str(Path("runs/../" + audit.summary["run"]).absolute())
    assert (
        page_data(render_report(audit, manifest))["key"] == key
    )  # the same run, spelled otherwise
    audit.summary["run"] = "runs/other"
    assert page_data(render_report(audit, manifest))["key"] != key


def test_figures_that_are_missing_stay_out(manifest: Manifest):
    audit = make_audit(manifest)
    audit.summary["per_class"][0]["estimated_error_rate"] = None
    audit.summary["per_class"][1]["estimated_error_rate"] = float("nan")
    del audit.summary["noise_matrix"], audit.summary["most_confused"], audit.summary["unreadable"]
    data = page_data(render_report(audit, manifest))
    assert [row[3] for row in data["perClass"]] == [None, None, 0.1]
    assert data["matrix"] is None
    assert data["curves"] is None


def test_nothing_ranked_gives_a_page_too(tmp_path: Path):
    manifest = make_manifest(tmp_path, [], [])
    data = page_data(render_report(make_audit(manifest), manifest))
    assert data["items"] == []
