"""From reviewed decisions to a corrected dataset; the source is only read."""

from __future__ import annotations

import csv
import os
import signal
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elrcli.api import apply_decisions
from elrcli.audit.apply import (
    Change,
    Plan,
    folder_targets,
    plan_corrections,
    write_csv,
    write_folder,
)
from elrcli.config import Reading
from elrcli.data.manifest import Manifest, StringTable, load_data
from elrcli.errors import ConfigError, DataError, Interrupted, NotWritten
from elrcli.tables import write_table

HEADER = "path,label,decision,new_label\n"


def make_manifest(
    root: Path, rows: list[tuple[str, str, str]], extra_classes: tuple[str, ...] = ()
) -> Manifest:
    """Write one small file per (path, label, split); the content is the path."""
    for path, _, _ in rows:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(os.fsencode(path))
    classes = tuple(sorted({label for _, label, _ in rows} | set(extra_classes)))
    return Manifest(
        root=root,
        paths=StringTable(path for path, _, _ in rows),
        labels=np.array([classes.index(label) for _, label, _ in rows], dtype=np.int32),
        splits=np.array([("train", "val", "test").index(s) for *_, s in rows], dtype=np.int8),
        classes=classes,
    )


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    rows = [
        ("images/1.png", "cat", "train"),
        ("images/2.png", "cat", "train"),
        ("images/3.png", "dog", "train"),
        ("images/4.png", "dog", "val"),
        ("images/5.png", "cow", "train"),
    ]
    return make_manifest(tmp_path / "source", rows)


def decisions(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "decisions.csv"
    path.write_text(HEADER + "".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def labels_of(plan: Plan) -> dict[str, str]:
    names = plan.manifest.classes
    return {
        plan.manifest.paths[int(row)]: names[label]
        for row, label in zip(plan.rows, plan.labels, strict=True)
    }


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return content and link count of every file."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- plan ---


def test_each_decision_does_what_it_says(tmp_path: Path, manifest: Manifest):
    file = decisions(
        tmp_path,
        "images/1.png,cat,keep,",
        "images/2.png,cat,relabel,dog",
        "images/3.png,dog,remove,",
        "images/4.png,dog,unsure,",
    )
    plan = plan_corrections(manifest, file)
    assert labels_of(plan) == {
        "images/1.png": "cat",
        "images/2.png": "dog",
        "images/4.png": "dog",
        "images/5.png": "cow",
    }
    assert plan.changes == (
        Change("images/2.png", "cat", "dog", "reviewed: relabel"),
        Change("images/3.png", "dog", "", "reviewed: remove"),
    )
    assert plan.decided == {"keep": 1, "relabel": 1, "remove": 1, "unsure": 1}
    assert plan.emptied == ()


def test_relabelling_to_the_given_label_changes_nothing(tmp_path: Path, manifest: Manifest):
    plan = plan_corrections(manifest, decisions(tmp_path, "images/1.png,cat,relabel,cat"))
    assert plan.changes == ()
    assert plan.decided == {"keep": 1}


def test_a_class_that_loses_all_samples_is_named(tmp_path: Path, manifest: Manifest):
    plan = plan_corrections(manifest, decisions(tmp_path, "images/5.png,cow,remove,"))
    assert plan.emptied == ("cow",)


def test_emptied_classes_are_in_the_order_of_the_classes(tmp_path: Path, manifest: Manifest):
    lines = [f"images/{i}.png,{name},remove," for i, name in ((5, "cow"), (1, "cat"), (2, "cat"))]
    assert plan_corrections(manifest, decisions(tmp_path, *lines)).emptied == ("cat", "cow")


def test_a_decision_may_repeat_the_given_label_and_leave_cells_out(
    tmp_path: Path, manifest: Manifest
):
    file = decisions(
        tmp_path,
        "images/1.png, cat , keep ,cat",
        "images/2.png,cat,unsure",  # no cell for new_label
        " , ,",
        "images/3.png,dog,relabel, cow ",
        "images/3.png,dog,relabel,cow",
    )
    plan = plan_corrections(manifest, file)
    assert plan.decided == {"keep": 1, "unsure": 1, "relabel": 1}
    assert plan.changes == (Change("images/3.png", "dog", "cow", "reviewed: relabel"),)


def test_two_new_labels_for_one_sample_are_refused(tmp_path: Path, manifest: Manifest):
    file = decisions(tmp_path, "images/1.png,cat,relabel,dog", "images/1.png,cat,relabel,cow")
    with pytest.raises(DataError, match=r":3: 'images/1\.png' is decided otherwise on line 2"):
        plan_corrections(manifest, file)


def test_every_bad_line_is_in_one_error_with_its_number(tmp_path: Path, manifest: Manifest):
    file = decisions(
        tmp_path,
        "images/9.png,cat,keep,",
        "images/1.png,dog,keep,",
        "images/2.png,cat,relabel,catt",
        "images/2.png,cat,relabel,",
        "images/3.png,dog,delete,",
        "images/4.png,dog,keep,cat",
        "images/5.png,cow,keep,,more",
        "images/5.png,cow,keep,",
        "images/5.png,cow,keep,",
        "images/5.png,cow,remove,",
    )
    with pytest.raises(DataError) as caught:
        plan_corrections(manifest, file)
    problems = str(caught.value).replace(str(file), "F").splitlines()
    assert problems == [
        "F:2: 'images/9.png' is not a path of this run",
        "F:3: 'images/1.png' has the label 'dog' here, but 'cat' in the run."
        " Use the files that belong together.",
        "F:4: unknown class 'catt'. Did you mean 'cat'?",
        "F:5: relabel needs a new_label",
        "F:6: unknown decision 'delete'. Known: keep, relabel, remove, unsure.",
        "F:7: 'keep' with the new_label 'cat'. Did you mean 'relabel'?",
        "F:8: 5 cells, but the header has 4",
        "F:11: 'images/5.png' is decided otherwise on line 9. Keep one of the two lines.",
        "To leave out what is not of this run: --skip-foreign",
    ]


def test_decisions_of_another_round_can_be_left_out(tmp_path: Path, manifest: Manifest):
    lines = ("images/9.png,cat,keep,", "images/1.png,dog,remove,", "images/2.png,cat,relabel,dog")
    file = decisions(tmp_path, *lines)
    plan = plan_corrections(manifest, file, skip_foreign=True)
    assert plan.skipped == 2
    assert [change.path for change in plan.changes] == ["images/2.png"]
    file = decisions(tmp_path, *lines, "images/3.png,dog,relabel,catt")
    with pytest.raises(DataError) as caught:
        plan_corrections(manifest, file, skip_foreign=True)
    assert str(caught.value) == f"{file}:5: unknown class 'catt'. Did you mean 'cat'?"


def test_paths_of_decisions_may_be_written_by_hand(tmp_path: Path, manifest: Manifest):
    file = decisions(
        tmp_path, "./images/1.png,cat,remove,", f"{manifest.root}/images/2.png,cat,remove,"
    )
    plan = plan_corrections(manifest, file)
    assert [change.path for change in plan.changes] == ["images/1.png", "images/2.png"]


def test_very_many_bad_lines_are_counted(tmp_path: Path, manifest: Manifest):
    file = decisions(tmp_path, *(f"no/{i}.png,cat,keep," for i in range(50)))
    with pytest.raises(DataError, match="and 30 more"):
        plan_corrections(manifest, file)


def test_twenty_bad_lines_are_listed(tmp_path: Path, manifest: Manifest):
    for count, last in ((20, ":21: 'no/19.png' is not a path of this run"), (21, "and 1 more")):
        file = decisions(tmp_path, *(f"no/{i}.png,cat,keep," for i in range(count)))
        with pytest.raises(DataError) as caught:
            plan_corrections(manifest, file)
        *lines, hint = str(caught.value).splitlines()
        assert len(lines) == count
        assert lines[-1].endswith(last)
        assert hint.endswith("--skip-foreign")


def test_reading_stops_after_a_thousand_bad_lines(tmp_path: Path, manifest: Manifest):
    rows = (f"no/{i}.png,cat,keep," for i in range(3000))
    with pytest.raises(DataError, match="and at least 980 more"):
        plan_corrections(manifest, decisions(tmp_path, *rows))


def test_a_spreadsheets_csv_is_read(tmp_path: Path, manifest: Manifest):
    file = tmp_path / "decisions.csv"
    text = "path; label ;decision;new_label\r\nimages/1.png;cat;relabel;dog\r\n;;;\r\n"
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert labels_of(plan_corrections(manifest, file))["images/1.png"] == "dog"


def test_missing_column_and_missing_file_are_named(tmp_path: Path, manifest: Manifest):
    file = tmp_path / "decisions.csv"
    with pytest.raises(DataError, match="cannot be read"):
        plan_corrections(manifest, file)
    file.write_text("path,label,decision\n")
    with pytest.raises(DataError) as caught:
        plan_corrections(manifest, file)
    assert str(caught.value) == (
        f"{file}:1: no column 'new_label'; there are: path, label, decision."
        " The columns must be path,label,decision,new_label."
    )


@pytest.mark.parametrize(
    "name", ['=HYPERLINK("x").png', "+1.png", "-1.png", "@a.png", 'a,"b"\n\rc.png', " x .png"]
)
def test_odd_names_are_found_and_written_as_they_are(tmp_path: Path, name: str):
    manifest = make_manifest(tmp_path / "source", [(name, "=cat", "train"), ("z", "dog", "train")])
    file = tmp_path / "decisions.csv"
    with file.open("w", newline="") as handle:
        csv.writer(handle).writerows([HEADER.strip().split(","), [name, "=cat", "relabel", "dog"]])
    plan = plan_corrections(manifest, file)
    write_csv(plan, tmp_path / "out.csv", Reading(split_column=None))
    with (tmp_path / "out.csv").open(newline="") as handle:
        assert next(iter(csv.DictReader(handle))) == {"path": name, "label": "dog"}


# --- suggestions without review ---


def audit_csv(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "audit.csv"
    header = "rank,path,split,label,suggested,score,error_probability,flagged\n"
    path.write_text(header + "".join(f"{line}\n" for line in lines))
    return path


def test_accept_above_takes_sure_suggestions_that_nobody_reviewed(
    tmp_path: Path, manifest: Manifest
):
    audit = audit_csv(
        tmp_path,
        "1,images/1.png,train,cat,dog,0.99,0.99,1",  # reviewed: kept
        "2,images/2.png,train,cat,cow,0.98,0.95,1",
        "3,images/3.png,train,dog,cat,0.97,0.94,1",  # not sure enough
        "4,images/4.png,val,dog,dog,0.96,0.99,1",  # suggests the given label
        "5,images/5.png,train,cow,cat,0.95,,0",  # no probability
    )
    file = decisions(tmp_path, "images/1.png,cat,keep,")
    plan = plan_corrections(manifest, file, audit_csv=audit, accept_above=0.95)
    assert plan.changes == (
        Change("images/2.png", "cat", "cow", "accepted: error probability 0.95"),
    )
    assert plan.decided == {"keep": 1, "accepted": 1}
    alone = plan_corrections(manifest, None, audit_csv=audit, accept_above=0.95)
    assert labels_of(alone)["images/1.png"] == "dog"


@pytest.mark.parametrize(("accept_above", "accepted"), [(0.0, ["1", "2", "3"]), (1.0, ["3"])])
def test_accept_above_may_be_nought_or_one(
    tmp_path: Path, manifest: Manifest, accept_above: float, accepted: list[str]
):
    cells = ["cat,dog,0,0", "cat,cow,0,0.5", "dog,cow,0,1", "dog,cat,0,"]
    lines = (f"1,images/{i}.png,train,{row},1" for i, row in enumerate(cells, start=1))
    plan = plan_corrections(
        manifest, None, audit_csv=audit_csv(tmp_path, *lines), accept_above=accept_above
    )
    assert [change.path for change in plan.changes] == [f"images/{i}.png" for i in accepted]


def test_accept_above_refuses_what_it_cannot_use(tmp_path: Path, manifest: Manifest):
    audit = audit_csv(tmp_path, "1,images/1.png,train,dog,cat,0.9,0.9,1", "2,no.png,,cat,cat,1,x,1")
    with pytest.raises(ConfigError, match=r"--accept-above 1\.5"):
        plan_corrections(manifest, None, audit_csv=audit, accept_above=1.5)
    with pytest.raises(ConfigError, match=r"--accept-above -0\.1"):
        plan_corrections(manifest, None, audit_csv=audit, accept_above=-0.1)
    with pytest.raises(ConfigError, match="Run `elr audit` first"):
        plan_corrections(manifest, None, accept_above=0.9)
    with pytest.raises(DataError, match="Run `elr audit` on the run with --format csv --out"):
        plan_corrections(manifest, None, audit_csv=tmp_path / "no.csv", accept_above=0.9)
    with pytest.raises(DataError) as caught:
        plan_corrections(manifest, None, audit_csv=audit, accept_above=0.9)
    assert "audit.csv:2: 'images/1.png' has the label 'dog' here" in str(caught.value)
    assert "audit.csv:3: not of this run" in str(caught.value)


# --- CSV ---


def test_csv_has_the_form_of_the_input(tmp_path: Path, manifest: Manifest):
    file = decisions(tmp_path, "images/2.png,cat,relabel,dog", "images/3.png,dog,remove,")
    plan = plan_corrections(manifest, file)
    out = tmp_path / "new" / "corrected.csv"
    log = write_csv(plan, out, Reading(None, "file", "kind", "part"))
    assert out.read_text() == (
        "file,kind,part\nimages/1.png,cat,train\nimages/2.png,dog,train\n"
        "images/4.png,dog,val\nimages/5.png,cow,train\n"
    )
    assert log == tmp_path / "new" / "corrected.changes.csv"
    assert log.read_text() == (
        "path,from,to,reason\nimages/2.png,cat,dog,reviewed: relabel\n"
        "images/3.png,dog,,reviewed: remove\n"
    )
    again = load_data(
        out,
        Reading(root=manifest.root, path_column="file", label_column="kind", split_column="part"),
    )
    assert dict(zip(again.paths, again.labels, strict=True)) == dict(
        zip(manifest.paths[:2] + manifest.paths[3:], [0, 2, 2, 1], strict=True)
    )


def test_csv_has_the_usual_columns(tmp_path: Path, manifest: Manifest):
    out = tmp_path / "corrected.csv"
    write_csv(plan_corrections(manifest, None), out, Reading())
    assert out.read_text().splitlines()[:2] == ["path,label,split", "images/1.png,cat,train"]
    assert load_data(out, Reading(root=manifest.root)).splits.tolist() == manifest.splits.tolist()


def test_csv_overwrites_nothing(tmp_path: Path, manifest: Manifest):
    plan = plan_corrections(manifest, decisions(tmp_path))
    out = tmp_path / "corrected.csv"
    write_csv(plan, out, Reading(split_column=None))
    with pytest.raises(DataError, match=r"corrected\.csv: exists"):
        write_csv(plan, out, Reading(split_column=None))
    out.unlink()
    with pytest.raises(DataError, match=r"changes\.csv: exists"):
        write_csv(plan, out, Reading(split_column=None))


def test_csv_is_not_written_through_a_dangling_link(tmp_path: Path, manifest: Manifest):
    for name in ("fixed.CSV", "fixed.changes.csv"):
        (tmp_path / name).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(DataError, match=f"{name}: exists"):
            write_csv(
                plan_corrections(manifest, None), tmp_path / "fixed.CSV", Reading(split_column=None)
            )
        (tmp_path / name).unlink()
    write_csv(plan_corrections(manifest, None), tmp_path / "fixed.CSV", Reading(split_column=None))
    assert not (tmp_path / "elsewhere").exists()


# --- folders ---


@pytest.mark.parametrize("mode", ["copy", "hardlink", "symlink"])
def test_folder_holds_the_corrected_classes(tmp_path: Path, manifest: Manifest, mode: str):
    before = snapshot(manifest.root)
    file = decisions(tmp_path, "images/2.png,cat,relabel,dog", "images/3.png,dog,remove,")
    out = tmp_path / "corrected"
    log = write_folder(plan_corrections(manifest, file), out, mode=mode, with_split=False)
    files = {str(p.relative_to(out)): p for p in sorted(out.rglob("*")) if not p.is_dir()}
    assert list(files) == ["cat/1.png", "cow/5.png", "dog/2.png", "dog/4.png"]
    assert files["dog/2.png"].read_bytes() == b"images/2.png"
    source = manifest.file(1)
    assert files["dog/2.png"].is_symlink() == (mode == "symlink")
    assert files["dog/2.png"].samefile(source) == (mode != "copy")
    assert snapshot(manifest.root) == before
    assert log == tmp_path / "corrected.changes.csv"
    assert sorted(os.listdir(tmp_path)) == [
        "corrected", "corrected.changes.csv", "decisions.csv", "source",
    ]  # fmt: skip


def test_folder_keeps_splits_that_the_user_gave(tmp_path: Path, manifest: Manifest):
    plan = plan_corrections(manifest, decisions(tmp_path, "images/4.png,dog,relabel,cat"))
    assert folder_targets(plan, with_split=True) == [
        "train/cat/1.png", "train/cat/2.png", "train/dog/3.png", "val/cat/4.png", "train/cow/5.png",
    ]  # fmt: skip


def test_names_that_collide_get_numbers_and_unmoved_files_keep_theirs(tmp_path: Path):
    rows = [
        ("a/x.png", "dog", "train"),
        ("b/X.PNG", "cat", "train"),
        ("c/x-1.png", "cat", "train"),
        ("d/x.png", "cat", "train"),
        ("e/x", "cat", "train"),
        ("f/x", "cat", "train"),
    ]
    manifest = make_manifest(tmp_path / "source", rows)
    plan = plan_corrections(manifest, decisions(tmp_path, "a/x.png,dog,relabel,cat"))
    assert folder_targets(plan, with_split=False) == [
        "cat/x-3.png", "cat/X.PNG", "cat/x-1.png", "cat/x-2.png", "cat/x", "cat/x-1",
    ]  # fmt: skip


def test_names_that_differ_in_unicode_form_get_numbers(tmp_path: Path):
    forms = [unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD")]
    rows = [(f"{i}/{name}", "cat", "train") for i, name in enumerate(forms)]
    plan = plan_corrections(make_manifest(tmp_path / "source", [*rows, ("d", "dog", "val")]), None)
    first, second, _ = folder_targets(plan, with_split=False)
    assert first == f"cat/{forms[0]}"
    assert second == f"cat/{forms[1].replace('.', '-1.')}"


def test_names_with_capitals_get_numbers_too(tmp_path: Path):
    rows = [(f"{name}/X.PNG", name[:3], "train") for name in ("cat1", "cat2", "cat3", "dog")]
    plan = plan_corrections(make_manifest(tmp_path / "source", rows), None)
    assert folder_targets(plan, with_split=False) == [
        "cat/X.PNG", "cat/X-1.PNG", "cat/X-2.PNG", "dog/X.PNG",
    ]  # fmt: skip


def test_sub_folders_of_a_class_are_kept(tmp_path: Path):
    rows = [
        ("cat/day/1.png", "cat", "train"),
        ("cat/night/1.png", "cat", "train"),
        ("dog/.old/2.png", "dog", "train"),
        ("dog/day/1.png", "dog", "train"),
    ]
    manifest = make_manifest(tmp_path / "source", rows)
    plan = plan_corrections(manifest, decisions(tmp_path, "dog/day/1.png,dog,relabel,cat"))
    targets = ["cat/day/1.png", "cat/night/1.png", "dog/2.png", "cat/day/1-1.png"]
    assert folder_targets(plan, with_split=False) == targets


def test_the_log_of_a_folder_says_where_changed_and_renamed_images_are(tmp_path: Path):
    rows = [(f"{name}/1.png", "cat", "train") for name in "abc"] + [("d/1.png", "dog", "train")]
    manifest = make_manifest(tmp_path / "source", rows)
    plan = plan_corrections(
        manifest, decisions(tmp_path, "a/1.png,cat,remove,", "d/1.png,dog,relabel,cat")
    )
    log = write_folder(plan, tmp_path / "out", mode="copy", with_split=False)
    assert log.read_text().splitlines() == [
        "path,from,to,reason,file",
        "a/1.png,cat,,reviewed: remove,",
        "d/1.png,dog,cat,reviewed: relabel,cat/1-2.png",
        "c/1.png,cat,cat,renamed: its name was taken,cat/1-1.png",
    ]
    assert (tmp_path / "out/cat/1-2.png").read_bytes() == b"d/1.png"


def test_a_class_named_like_a_split_is_no_folder(tmp_path: Path):
    rows = [("1.png", "Test", "train"), ("2.png", "dog", "train")]
    plan = plan_corrections(make_manifest(tmp_path / "source", rows), None)
    with pytest.raises(DataError, match="class 'Test': a folder of that name is a split"):
        write_folder(plan, tmp_path / "out", mode="copy", with_split=False)
    assert "train/Test/1.png" in folder_targets(plan, with_split=True)


@pytest.mark.parametrize("name", ["..", ".", ".hidden", "a/b", "../evil", "a\\b", "", "a\0b"])
def test_class_names_that_are_no_folder_names_are_refused(tmp_path: Path, name: str):
    manifest = make_manifest(
        tmp_path / "source", [("1.png", name, "train"), ("2.png", "dog", "train")]
    )
    plan = plan_corrections(manifest, None)
    with pytest.raises(DataError, match="cannot be the name of a folder"):
        write_folder(plan, tmp_path / "out", mode="copy", with_split=False)
    assert sorted(os.listdir(tmp_path)) == ["source"]


def test_hostile_names_stay_inside_the_target(tmp_path: Path):
    name = "<img src=x onerror=alert(1)>"
    rows = [(f"a/{name}.png", name, "train"), ("a/..png", "dog", "train")]
    manifest = make_manifest(tmp_path / "source", rows)
    out = tmp_path / "out"
    write_folder(plan_corrections(manifest, None), out, mode="copy", with_split=False)
    assert (out / name / f"{name}.png").is_file()
    assert (out / "dog" / "..png").is_file()


def test_target_must_be_new_or_empty(tmp_path: Path, manifest: Manifest):
    plan = plan_corrections(manifest, None)
    out = tmp_path / "out"
    out.mkdir()
    write_folder(plan, out, mode="copy", with_split=False)
    (tmp_path / "out.changes.csv").unlink()
    with pytest.raises(DataError, match="not an empty folder"):
        write_folder(plan, out, mode="copy", with_split=False)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with pytest.raises(DataError, match="not an empty folder"):
        write_folder(plan, tmp_path / "link", mode="copy", with_split=False)


@pytest.mark.parametrize("folder", ["dog", " dog "])  # classes carry no space around them
def test_target_among_class_folders_is_refused(tmp_path: Path, folder: str):
    rows = [("cat/1.png", "cat", "train"), (f"{folder}/2.png", "dog", "train")]
    manifest = make_manifest(tmp_path / "source", rows)
    plan = plan_corrections(manifest, None)
    with pytest.raises(DataError, match="would become a class"):
        write_folder(plan, manifest.root / "fixed", mode="copy", with_split=False)


def test_one_label_that_is_not_its_folder_does_not_make_it_safe(tmp_path: Path):
    rows = [("cat/1.png", "cat", "train"), ("dog/2.png", "cat", "train"), ("d/3", "dog", "train")]
    manifest = make_manifest(tmp_path / "source", rows)
    with pytest.raises(DataError, match="would become a class"):
        write_folder(
            plan_corrections(manifest, None), manifest.root / "x", mode="copy", with_split=False
        )


@pytest.mark.parametrize("target", ["out", "new/deep/out"])
def test_target_in_a_root_without_class_folders_may_be_anywhere(
    tmp_path: Path, manifest: Manifest, target: str
):
    out = manifest.root / target
    log = write_folder(plan_corrections(manifest, None), out, mode="copy", with_split=True)
    assert sorted(os.listdir(out)) == ["train", "val"]
    assert (out / "val/dog/4.png").read_bytes() == b"images/4.png"
    assert log == out.with_name("out.changes.csv")
    assert sorted(os.listdir(out.parent)) == sorted(
        {"out", "out.changes.csv"} | ({"images"} if target == "out" else set())
    )


def test_target_among_the_class_folders_of_a_split_is_refused(tmp_path: Path):
    rows = [("train/cat/1.png", "cat", "train"), ("val/dog/2.png", "dog", "val")]
    plan = plan_corrections(make_manifest(tmp_path / "source", rows), None)
    with pytest.raises(DataError, match="would become a class"):
        write_folder(plan, tmp_path / "source/train/new", mode="copy", with_split=False)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "source")
    with pytest.raises(DataError, match="would become a class"):
        write_folder(
            replace(plan, manifest=replace(plan.manifest, root=link)),
            tmp_path / "source/new",
            mode="copy",
            with_split=False,
        )
    beside = tmp_path / "source2"  # its name begins like the root
    write_folder(plan, beside, mode="copy", with_split=False)
    assert (beside / "cat/1.png").is_file()


def test_class_names_deep_in_the_paths_are_no_class_folders(tmp_path: Path):
    rows = [("by/day/cat/1.png", "cat", "train"), ("by/day/dog/2.png", "dog", "train")]
    manifest = make_manifest(tmp_path / "source", rows)
    out = manifest.root / "fixed"
    write_folder(plan_corrections(manifest, None), out, mode="copy", with_split=False)
    assert sorted(os.listdir(out)) == ["cat", "dog"]


def test_twenty_missing_images_are_named(tmp_path: Path):
    rows = [(f"{i:02d}.png", ("cat", "dog")[i % 2], "train") for i in range(30)]
    manifest = make_manifest(tmp_path / "source", rows)
    for row in range(5, 27):
        manifest.file(row).unlink()
    with pytest.raises(DataError) as caught:
        write_folder(
            plan_corrections(manifest, None), tmp_path / "out", mode="copy", with_split=False
        )
    *named, last = str(caught.value).splitlines()
    assert named == [f"{manifest.root}/{i:02d}.png: no such file." for i in range(5, 25)]
    assert last == "and 2 more"


def test_without_any_image_left_the_folder_is_empty(tmp_path: Path):
    rows = [("1.png", "cat", "train"), ("2.png", "dog", "train")]
    manifest = make_manifest(tmp_path / "source", rows)
    plan = plan_corrections(manifest, decisions(tmp_path, "1.png,cat,remove,", "2.png,dog,remove,"))
    write_folder(plan, tmp_path / "out", mode="copy", with_split=False)
    assert os.listdir(tmp_path / "out") == []


def test_missing_images_are_named_before_anything_is_written(tmp_path: Path, manifest: Manifest):
    manifest.file(2).unlink()
    with pytest.raises(DataError, match=r"3\.png: no such file"):
        write_folder(
            plan_corrections(manifest, None), tmp_path / "out", mode="copy", with_split=False
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_midway_leaves_nothing(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, number: int
):
    monkeypatch.setattr("shutil.copy2", lambda *_: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted, match=r"Continue with: the same command$") as caught:
        write_folder(
            plan_corrections(manifest, None), tmp_path / "out", mode="copy", with_split=False
        )
    assert caught.value.exit_code == 128 + number
    assert sorted(os.listdir(tmp_path)) == ["source"]


def test_the_root_of_all_folders_is_refused(manifest: Manifest):
    with pytest.raises(DataError, match=r"^/: exists and is not an empty folder"):
        write_folder(plan_corrections(manifest, None), Path("/"), mode="copy", with_split=False)


def test_failure_midway_leaves_nothing(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
):
    made = []

    def link(source: str, place: Path) -> None:
        if made:
            raise OSError(18, "Invalid cross-device link")
        made.append(place)

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(DataError, match="Try --mode copy"):
        write_folder(
            plan_corrections(manifest, None), tmp_path / "out", mode="hardlink", with_split=False
        )
    assert sorted(os.listdir(tmp_path)) == ["source"]


def test_a_full_disk_has_no_other_mode_as_remedy(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
):
    def copy(source: Path, place: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copy2", copy)
    out = tmp_path / "out"
    with pytest.raises(DataError) as caught:
        write_folder(plan_corrections(manifest, None), out, mode="copy", with_split=False)
    problem = "cannot be written (No space left on device). Make room there."
    assert str(caught.value) == f"{out}: {problem}"
    assert sorted(os.listdir(tmp_path)) == ["source"]


def test_a_table_or_log_that_cannot_be_written_leaves_no_half(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
):
    plan = plan_corrections(manifest, None)
    for which in ("out.csv", "out.changes.csv"):

        def write(path: Path, *rest: Any, which: str = which) -> None:
            if path.name == which:
                raise NotWritten(f"{path}: cannot be written (No space left on device).")
            write_table(path, *rest)

        monkeypatch.setattr("elrcli.audit.apply.write_table", write)
        with pytest.raises(NotWritten):
            write_csv(plan, tmp_path / "out.csv", Reading())
        if which == "out.changes.csv":
            with pytest.raises(NotWritten):
                write_folder(plan, tmp_path / "out", mode="copy", with_split=False)
        assert sorted(os.listdir(tmp_path)) == ["source"]


def test_hard_link_leads_to_the_image_behind_a_link(tmp_path: Path, manifest: Manifest):
    real = tmp_path / "real.png"
    manifest.file(0).rename(real)
    manifest.file(0).symlink_to(real)
    out = tmp_path / "out"
    write_folder(plan_corrections(manifest, None), out, mode="hardlink", with_split=False)
    assert not (out / "cat" / "1.png").is_symlink()
    assert (out / "cat" / "1.png").samefile(real)


@pytest.mark.parametrize("dry_run", [False, True])
def test_unknown_mode_is_refused(tmp_path: Path, dry_run: bool):
    with pytest.raises(ConfigError, match="copy, hardlink, symlink"):
        apply_decisions(
            tmp_path, accept_above=0.9, out=tmp_path / "out", mode="move", dry_run=dry_run
        )
