"""The review page: one HTML file that works from the disk, without network or account.

The page is made of the files in `page`, with style and scripts inlined. What comes from the data
travels as JSON, so a path or a class name is never read as markup.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from elrcli.audit.result import AuditResult, DuplicateGroup
from elrcli.data.images import ImageProblem, read_image
from elrcli.data.manifest import Manifest
from elrcli.data.rows import SPLITS

PAGE = Path(__file__).parent / "page"
SCRIPTS = ("logic.js", "summary.js", "state.js", "drawing.js", "events.js")
EXEMPLARS = 4  # pictures beside a suspect, per class
POOL = 24  # exemplars of a class on the whole page: each costs its bytes and a decoding
MATRIX_CLASSES = 20  # a larger heat map cannot be read
CONFUSED_PAIRS = 30
DUPLICATE_GROUPS = 60
TWINS = 12  # of a group: the most suspicious; a placeholder picture may be there a thousand times
UNREADABLE = 200
HISTOGRAM_BINS = 20
SAMPLED = 12  # pictures that tell how large the others will be
ASPECT = 1.5  # a longer picture is made smaller, so that it costs no more than others


class Sizes(NamedTuple):
    """Short sides in pixels."""

    suspect: int
    exemplar: int


# Tried from the top: the first that fits into the page's budget is taken.
LADDER = (
    Sizes(384, 160),
    Sizes(320, 128),
    Sizes(256, 128),
    Sizes(224, 112),
    Sizes(192, 96),
    Sizes(160, 80),
    Sizes(128, 64),
    Sizes(96, 48),
    Sizes(64, 32),
)


class Picture(NamedTuple):
    """A thumbnail as a data URI, or the reason why there is none."""

    uri: str
    width: int = 0
    height: int = 0
    problem: str = ""


class _Suspect(NamedTuple):
    """A sample on the page, as manifest rows."""

    row: int
    given: Sequence[int]  # exemplars of its given class
    suggested: Sequence[int]


def render_report(
    result: AuditResult,
    manifest: Manifest,
    *,
    curves_svg: str | None = None,
    apply_to: Path | None = None,
    can_accept: bool = True,
    max_suspects: int = 500,
    max_bytes: int = 25_000_000,
) -> str:
    """Return the review page with the first `max_suspects` samples, as HTML.

    It names `apply_to` (default: the run) for `elr apply`, and --accept-above if `can_accept`.
    Pictures become as large as `max_bytes` allows; if even the smallest are too many, the least
    suspicious samples are left out.
    """
    groups = _duplicates(result, manifest)
    positions = _positions(result, groups, max_suspects)
    suspects = _suspects(result, positions)
    content = _overall(result, manifest, groups, curves_svg)
    content |= {"applyTo": _text(apply_to or content["run"]), "canAccept": can_accept}
    items = _items(result, manifest, positions, groups)
    references = (1 + 2 * EXEMPLARS) * len(f"{len(result)},") + len("[[][]],")  # to its pictures
    texts = [len(_script_json(item)) + references for item in items["items"]]
    frame = _page(content | items | {"items": [], "isFull": False}, result.summary)
    budget = max_bytes - len(frame.encode())
    shown, pictures = _fit_pictures(manifest, suspects, texts, budget)
    content |= _items(result, manifest, positions[:shown], groups)
    content |= {"isFull": shown < len(positions)}
    content |= _gallery(manifest, suspects[:shown], pictures)
    return _page(content, result.summary)


def headline(summary: Mapping[str, Any]) -> tuple[str, str]:
    """Return the first sentence of the page and the one that says how sure it is."""
    samples, flagged = int(summary["samples"]), int(summary["flagged"])
    errors = summary["estimated_errors"]
    estimate, low, high = (round(float(errors[name])) for name in ("estimate", "low", "high"))
    if errors["high"] > 0.01 * samples:  # of very few labels half a one is much
        high = max(high, 1)
    rate = _percent(float(summary["estimated_error_rate"]))
    detail = f"{rate} of all labels, between {low:,} and {high:,} with 90% confidence."
    if estimate == 0 and high <= 0.01 * samples:
        first = f"Hardly any of {samples:,} labels looks wrong"
    elif estimate > 0 and high - low <= max(estimate, 1) and low >= estimate / 3:
        verb = "is" if estimate == 1 else "are"
        first = f"About {estimate:,} of {samples:,} labels {verb} wrong"
    else:  # one number would claim too much
        span = f"Between {low:,} and {high:,}" if low else f"Up to {high:,}"
        first = f"{span} of {samples:,} labels may be wrong"
        detail = f"Best estimate: {estimate:,}, {detail}"
    if flagged == 0:
        none = f"None reaches the threshold of {float(summary['threshold']):g}"
        return first, f"{detail} {none}; the first of the order may be worth a look all the same."
    verb = "is" if flagged == 1 else "are"
    return first, (
        f"{detail} {flagged:,} {verb} flagged: wrong with a probability of at least"
        f" {float(summary['threshold']):g}."
    )


def load_picture(path: Path, side: int) -> Picture:
    """Return an image file as a JPEG whose short side is `side`, never enlarged."""
    try:
        pixels = read_image(path, _short_side(path, side))
    except ImageProblem as problem:
        return Picture("", problem=str(problem))
    height, width = pixels.shape[:2]
    buffer = io.BytesIO()
    is_tiny = max(height, width) <= 96  # will be shown enlarged, so artefacts would show too
    quality, subsampling = (95, "4:4:4") if is_tiny else (82, "4:2:0")
    Image.fromarray(pixels).save(
        buffer, "JPEG", quality=quality, subsampling=subsampling, optimize=True
    )
    return Picture(_data_uri("image/jpeg", buffer.getvalue()), width, height)


def _short_side(path: Path, side: int) -> int:
    """Return `side`, or less for an image that is smaller or very long."""
    if not os.path.isfile(path):
        return side  # opening a pipe might wait for ever
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about images that it reads all the same
            with Image.open(path) as image:
                short, long = sorted(image.size)
    except Exception:  # Pillow raises nearly anything; `read_image` will name the reason
        return side
    return max(1, min(side, short, round(ASPECT * side * short / long)))


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


# --- which samples, how large ---


def _duplicates(result: AuditResult, manifest: Manifest) -> list[tuple[bool, DuplicateGroup]]:
    """Return (labels differ, group): different labels first, then the same files."""
    groups = [(group.labels_differ(manifest.labels), group) for group in result.duplicates]
    return sorted(
        groups, key=lambda pair: (not pair[0], not pair[1].exact, not pair[1].partly_exact)
    )


def _positions(
    result: AuditResult, groups: Sequence[tuple[bool, DuplicateGroup]], max_suspects: int
) -> list[int]:
    """Return the positions in the ranking to show: the first ones, then contradicting twins."""
    first = min(max_suspects, len(result))
    twins: set[int] = set()
    for differs, group in groups[:DUPLICATE_GROUPS]:
        if differs:
            ranked = np.flatnonzero(np.isin(result.rows, group.rows))
            twins.update(ranked[:TWINS].tolist())
    return [*range(first), *sorted(i for i in twins if i >= first)]


def _suspects(result: AuditResult, positions: Sequence[int]) -> list[_Suspect]:
    """Return the samples at `positions`, each with four exemplars of both of its classes.

    Those are its nearest ones in the class's pool, filled up with others of the pool. Neither the
    suspect itself nor its duplicates are among them.
    """
    chosen = list(positions)
    rows, given, suggested = (
        column[chosen].tolist() for column in (result.rows, result.labels, result.suggested)
    )
    picture_of = {row: group.rows[0] for group in result.duplicates for row in group.rows}

    def others(suspect: int, candidates: Iterable[int]) -> list[int]:
        seen = {picture_of.get(suspect, suspect): suspect}
        for row in map(int, candidates):
            seen.setdefault(picture_of.get(row, row), row)
        return list(seen.values())[1:]

    nearest = {
        (row, label): others(row, result.nearest.get(row, {}).get(label, ()))
        for row, pair in zip(rows, zip(given, suggested, strict=True), strict=True)
        for label in pair
    }
    pools = _pools(nearest, result.exemplars)

    def exemplars(row: int, label: int) -> list[int]:
        pool = pools[label]
        near = [other for other in nearest[row, label] if other in pool]
        return others(row, [*near, *pool])[:EXEMPLARS]

    return [
        _Suspect(row, exemplars(row, label), exemplars(row, other))
        for row, label, other in zip(rows, given, suggested, strict=True)
    ]


def _pools(
    nearest: Mapping[tuple[int, int], Sequence[int]], exemplars: Mapping[int, np.ndarray]
) -> dict[int, list[int]]:
    """Return per class the rows that most suspects are near to, then those surest of the class.

    `nearest` holds the exemplars of (suspect, class), nearest first.
    """
    votes: dict[int, Counter[int]] = defaultdict(Counter)
    for place in range(EXEMPLARS):  # by place: among equal counts the nearest come first
        for (_, label), rows in nearest.items():
            votes[label].update(rows[place : place + 1])
    pools = {}
    for label, counts in votes.items():
        wanted = [row for row, _ in counts.most_common(POOL)]
        surest = map(int, exemplars.get(label, ()))
        pools[label] = list(dict.fromkeys([*wanted, *surest]))[:POOL]
    return pools


def _fit_pictures(
    manifest: Manifest, suspects: Sequence[_Suspect], texts: Sequence[int], budget: int
) -> tuple[int, dict[int, Picture]]:
    """Return how many suspects fit into `budget` bytes, and pictures by manifest row.

    `texts` are the bytes of each suspect without its pictures. The largest sizes at which all of
    them fit are taken.
    """
    large = [suspect.row for suspect in suspects]
    beside = {row for _, *pair in suspects for rows in pair for row in rows}
    small = sorted(beside - set(large))
    for sizes in LADDER[:-1]:
        estimate = sum(texts) + _estimate(manifest, large, sizes.suspect)
        estimate += _estimate(manifest, small, sizes.exemplar)
        if estimate <= budget:
            shown, pictures = _embed(manifest, suspects, texts, sizes, budget)
            if shown == len(suspects):
                return shown, pictures
    return _embed(manifest, suspects, texts, LADDER[-1], budget)


def _estimate(manifest: Manifest, rows: Sequence[int], side: int) -> float:
    """Return the bytes that the pictures of `rows` will take, judged by a few of them."""
    if not rows:
        return 0.0
    sample = rows[:: math.ceil(len(rows) / SAMPLED)]
    costs = [_cost(load_picture(manifest.file(row), side), manifest.paths[row]) for row in sample]
    return len(rows) * sum(costs) / len(costs)


def _embed(
    manifest: Manifest,
    suspects: Sequence[_Suspect],
    texts: Sequence[int],
    sizes: Sizes,
    budget: int,
) -> tuple[int, dict[int, Picture]]:
    """Load suspects in order, each with its exemplars, until `budget` is spent."""
    large = {suspect.row for suspect in suspects}
    pictures: dict[int, Picture] = {}
    for shown, suspect in enumerate(suspects):
        wanted = {suspect.row, *suspect.given, *suspect.suggested} - pictures.keys()
        new = {
            row: load_picture(manifest.file(row), sizes.suspect if row in large else sizes.exemplar)
            for row in sorted(wanted)
        }
        budget -= sum(_cost(picture, manifest.paths[row]) for row, picture in new.items())
        budget -= texts[shown]
        if budget < 0:
            return shown, pictures
        pictures |= new
    return len(suspects), pictures


def _cost(picture: Picture, path: str) -> int:
    return len(_script_json([*picture, path])) + 1


# --- content ---


def _overall(
    result: AuditResult,
    manifest: Manifest,
    groups: Sequence[tuple[bool, DuplicateGroup]],
    curves_svg: str | None,
) -> dict[str, Any]:
    """Return what the page says about the whole data set, with class ids for names."""
    summary = result.summary
    class_ids = {name: i for i, name in enumerate(manifest.classes)}
    per_class = [
        [
            class_ids[row["class"]],
            row["samples"],
            row["flagged"],
            _number(row["estimated_error_rate"]),
        ]
        for row in summary.get("per_class", ())
    ]
    confused = [
        [
            class_ids[row["true"]],
            class_ids[row["given"]],
            _number(row["probability"]),
            _number(row["samples"]),
        ]
        for row in summary.get("most_confused", ())
    ]
    counts = np.histogram(result.error_probability, bins=HISTOGRAM_BINS, range=(0.0, 1.0))[0]
    unreadable = list(summary.get("unreadable", ()))
    return {
        "key": f"elr-review-{_identity(result, manifest)}",
        "run": _text(summary.get("run", "")),
        "appliesToRun": bool(summary.get("applies_to_run", True)),
        "about": {
            name: _text(summary[name])
            for name in ("version", "backbone", "method", "epochs")
            if summary.get(name) is not None
        },
        "classes": manifest.classes,
        "samples": int(summary["samples"]),
        "flagged": int(summary["flagged"]),
        "threshold": float(summary["threshold"]),
        "truth": {name: _number(x) for name, x in (summary.get("truth") or {}).items()},
        "perClass": per_class,
        "confused": confused[:CONFUSED_PAIRS],
        "matrix": _matrix(summary.get("noise_matrix"), manifest),
        "histogram": counts.tolist(),
        "duplicates": {
            "exact": sum(group.has_same_file for _, group in groups),
            "alike": sum(not group.has_same_file for _, group in groups),
            "differ": sum(differs for differs, _ in groups),
        },
        "unreadable": len(unreadable),
        "unreadableShown": [
            [_text(row["path"]), _text(row["reason"])] for row in unreadable[:UNREADABLE]
        ],
        "curves": None if curves_svg is None else _data_uri("image/svg+xml", curves_svg.encode()),
        "hasNearest": bool(result.nearest),
        "pictures": [],
        "gallery": [],
    }


def _items(
    result: AuditResult,
    manifest: Manifest,
    positions: Sequence[int],
    groups: Sequence[tuple[bool, DuplicateGroup]],
) -> dict[str, Any]:
    """Return the samples at `positions` of the ranking, and a count of those left out."""
    chosen = list(positions)
    probability = result.error_probability.astype(np.float64)
    item_of = {int(result.rows[i]): item for item, i in enumerate(chosen)}
    twins: list[dict[str, Any]] = [
        {
            "exact": group.exact,
            "partlyExact": group.partly_exact,
            "differ": differs,
            "count": len(group.rows),
            "items": sorted(item_of[row] for row in group.rows if row in item_of)[:TWINS],
        }
        for differs, group in groups
    ]
    return {
        "items": [
            {
                "path": manifest.paths[int(result.rows[i])],
                "rank": i + 1,
                "split": SPLITS[manifest.splits[result.rows[i]]],
                "label": int(result.labels[i]),
                "suggested": int(result.suggested[i]),
                "p": _number(probability[i]),
                "flagged": bool(result.flagged[i]),
                "top": [
                    [int(label), _number(p)]
                    for label, p in zip(
                        result.top_classes[i], result.top_probabilities[i], strict=True
                    )
                ],
            }
            for i in chosen
        ],
        "twins": [group for group in twins if len(group["items"]) > 1][:DUPLICATE_GROUPS],
        "rest": {
            "count": len(result) - len(chosen),
            "flagged": int(result.flagged.sum() - result.flagged[chosen].sum()),
            "expected": _number(probability.sum() - probability[chosen].sum()),
        },
    }


def _gallery(
    manifest: Manifest, suspects: Sequence[_Suspect], pictures: Mapping[int, Picture]
) -> dict[str, Any]:
    """Return all pictures once, and for every suspect the places of its own and its exemplars."""
    place = {row: i for i, row in enumerate(pictures)}
    return {
        "pictures": [[*picture, manifest.paths[row]] for row, picture in pictures.items()],
        "gallery": [
            [place[row], *([place[i] for i in rows if pictures[i].uri] for rows in beside)]
            for row, *beside in suspects
        ],
    }


def _matrix(noise_matrix: Any, manifest: Manifest) -> dict[str, Any] | None:
    """Return P(given | true) of all classes, or of the most confused ones if they are many."""
    if noise_matrix is None or len(noise_matrix) == 0:
        return None
    matrix = np.asarray(noise_matrix, dtype=np.float64)
    shown = np.arange(len(matrix))
    if len(matrix) > MATRIX_CLASSES:
        counts = np.bincount(manifest.labels, minlength=len(matrix))
        wrong = np.nan_to_num(matrix) * counts[:, None]
        np.fill_diagonal(wrong, 0.0)
        # A pair ranks both of its classes, so that the largest cells are in the picture.
        strength = np.maximum(wrong.max(axis=0), wrong.max(axis=1))
        shown = np.sort(np.argsort(-strength, kind="stable")[:MATRIX_CLASSES])
    return {
        "classes": shown.tolist(),
        "values": [[_number(x) for x in row] for row in matrix[np.ix_(shown, shown)]],
    }


def _identity(result: AuditResult, manifest: Manifest) -> str:
    """Return a hash of the run and its labels: decisions in the browser belong to it."""
    digest = hashlib.sha256()

    def add(parts: Iterable[str]) -> None:
        for part in parts:
            digest.update(part.encode("utf-8", "surrogatepass") + b"\0")

    add([os.path.abspath(result.summary.get("run", "")), str(manifest.root)])
    add(manifest.classes)
    add(manifest.paths)
    digest.update(manifest.labels.astype("<i4").tobytes())
    return digest.hexdigest()[:24]


def _number(value: Any) -> float | int | None:
    """Return a short JSON number; None where there is no figure."""
    if value is None or not math.isfinite(value):
        return None
    return int(value) if float(value).is_integer() else round(float(value), 4)


def _percent(share: float) -> str:
    if 0 < share < 0.0005:
        return "<0.1%"
    return f"{100 * share:.1f}%" if 0 < share < 0.0995 else f"{100 * share:.0f}%"


def _text(value: Any) -> str:
    """Return text that UTF-8 can write."""
    return str(value).encode("utf-8", "backslashreplace").decode("utf-8")


# --- page ---


def _page(content: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    first, detail = headline(summary)
    css = (PAGE / "page.css").read_text(encoding="utf-8")
    js = "".join((PAGE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    environment = Environment(
        loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("page.html.j2").render(
        run=content["run"],
        headline=first,
        detail=detail,
        cautions=summary.get("cautions", []),
        css=Markup(css),
        css_hash=_sha256(css),
        js=Markup(js),
        js_hash=_sha256(js),
        data=Markup(_script_json(content)),
    )


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _script_json(content: Any) -> str:
    """Return JSON that cannot end a script element; characters beyond ASCII are escaped."""
    text = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
