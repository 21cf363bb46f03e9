from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elrcli.data import manifest as module
from elrcli.data.manifest import (
    MOST_PROBLEMS,
    Manifest,
    StringTable,
    draw_validation,
    is_inside,
    listed,
    load_data,
    manifest_text,
    natural_key,
    read_manifest,
)
from elrcli.errors import ConfigError, DataError


def touch(root: Path, *paths: str) -> Path:
    """Make empty files: the manifest never opens an image."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def write_csv(folder: Path, text: str | bytes, *files: str) -> Path:
    touch(folder, *files)
    path = folder / "data.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def labels_by_path(manifest: Manifest) -> dict[str, str]:
    return {
        path: manifest.classes[label]
        for path, label in zip(manifest.paths, manifest.labels, strict=True)
    }


def error_of(data: Path, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        load_data(data, **options)  # type: ignore[arg-type]
    return str(caught.value)


# --- string table, natural order ---


@given(st.lists(st.text(st.characters(codec="utf-8"))))
def test_string_table_gives_back_its_strings(strings):
    table = StringTable(strings)
    assert list(table) == strings
    assert table[1:] == strings[1:]
    assert list(pickle.loads(pickle.dumps(table))) == strings


def test_string_table_keeps_bytes_that_are_not_utf8():
    assert StringTable(["a", "b\udcff.png"])[-1] == "b\udcff.png"


def test_string_table_counts_from_both_ends():
    table = StringTable(["a", "", "c"])
    assert [table[i] for i in (0, 2, -1, -3)] == ["a", "c", "c", "a"]
    for i in (3, -4):
        with pytest.raises(IndexError, match=f"row {i} of 3"):
            table[i]


def test_natural_order_counts_numbers():
    names = ["10", "2", "b", "a10", "a9", "02", "1", "a"]
    assert sorted(names, key=natural_key) == ["1", "02", "2", "10", "a", "a9", "a10", "b"]


@given(st.lists(st.text(max_size=6)))
def test_any_two_names_can_be_compared(names):
    sorted(names, key=natural_key)


# --- folders ---


def test_folder_of_classes_is_sorted_by_path(tmp_path):
    touch(tmp_path, "10/b.png", "2/a.png", "10/a.JPG")
    manifest = load_data(tmp_path)
    assert list(manifest.paths) == ["10/a.JPG", "10/b.png", "2/a.png"]
    assert manifest.classes == ("2", "10")
    assert manifest.labels.tolist() == [1, 1, 0]
    assert manifest.labels.dtype == np.int32
    assert manifest.splits.dtype == np.int8
    assert manifest.rows("train").tolist() == [0, 1, 2]
    assert manifest.rows("train").dtype == np.int64
    assert not manifest.has_val
    assert manifest.file(0) == tmp_path / "10/a.JPG"


def test_other_files_hidden_files_and_empty_folders_are_left_out(tmp_path):
    touch(tmp_path, "a/1.png", "a/notes.txt", "a/.2.png", ".git/3.png", "b/4.png", "loose.png")
    (tmp_path / "empty").mkdir()
    manifest = load_data(tmp_path)
    assert list(manifest.paths) == ["a/1.png", "b/4.png"]
    assert manifest.classes == ("a", "b")


def test_nested_folders_belong_to_their_class(tmp_path):
    touch(tmp_path, "a/x/y/1.png", "b/2.png")
    assert labels_by_path(load_data(tmp_path)) == {"a/x/y/1.png": "a", "b/2.png": "b"}


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val"])
def test_train_and_val_folders_are_splits(tmp_path, val):
    touch(tmp_path, "train/a/1.png", "train/b/2.png", f"{val}/b/3.png", "test/c/4.png")
    (tmp_path / "train/c").mkdir()  # no image here, but one in test
    manifest = load_data(tmp_path)
    assert manifest.classes == ("a", "b", "c")
    by_split = {s: [manifest.paths[i] for i in manifest.rows(s)] for s in ("train", "val", "test")}
    assert by_split == {
        "train": ["train/a/1.png", "train/b/2.png"],
        "val": [f"{val}/b/3.png"],
        "test": ["test/c/4.png"],
    }


def test_train_folder_alone_is_a_split(tmp_path):
    touch(tmp_path, "train/a/1.png", "train/b/2.png")
    assert load_data(tmp_path).classes == ("a", "b")


def test_train_may_also_be_a_class(tmp_path):
    touch(tmp_path, "train/1.png", "bus/2.png")
    assert load_data(tmp_path).classes == ("bus", "train")


def test_a_class_called_train_may_be_nested(tmp_path):
    touch(tmp_path, "train/0.png", "train/steam/1.png", "train/diesel/1.png", "bus/2.png")
    assert load_data(tmp_path).classes == ("bus", "train")


def test_class_folders_beside_what_is_no_split_are_refused(tmp_path):
    touch(tmp_path, "train/a/1.png", "train/b/2.png", "extra/3.png")
    message = error_of(tmp_path)
    assert f"{tmp_path}/train: holds class folders" in message
    assert "(extra)" in message
    assert f"Train on {tmp_path}/train" in message


def test_an_image_is_no_data(tmp_path):
    touch(tmp_path, "a/1.png", "b/2.png")
    assert "1.png: an image. Name the folder that holds the class" in error_of(tmp_path / "a/1.png")


def test_one_class_folder_leads_to_the_folder_above(tmp_path):
    touch(tmp_path, "data/a/1.png", "data/b/2.png", "alone/c/3.png")
    message = error_of(tmp_path / "data/a")
    assert message.endswith(f"Did you mean {tmp_path}/data, which holds class folders?")
    assert "Put images into one sub-folder per class" in error_of(tmp_path / "alone/c")


def test_the_folder_above_need_not_be_listed(tmp_path, monkeypatch):
    touch(tmp_path, "cat/1.png", "dog/2.png")
    scandir = os.scandir

    def closed(folder: str):
        if folder == str(tmp_path):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", closed)
    assert f"{tmp_path / 'cat'}: images but no class sub-folders" in error_of(tmp_path / "cat")


def test_without_train_the_names_of_splits_are_classes(tmp_path):
    touch(tmp_path, "val/1.png", "test/2.png")
    assert load_data(tmp_path).classes == ("test", "val")


def test_two_folders_for_one_split_are_refused(tmp_path):
    touch(tmp_path, "train/a/1.png", "val/a/1.png", "valid/b/1.png")
    assert "more than one folder for the same split (train, val, valid)" in error_of(tmp_path)


def test_links_are_followed_unless_they_loop(tmp_path):
    touch(tmp_path / "data", "a/1.png", "b/2.png")
    touch(tmp_path, "elsewhere/3.png")
    (tmp_path / "data/a/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/a/up").symlink_to(tmp_path / "data")
    (tmp_path / "data/b/self").symlink_to(tmp_path / "data/b")
    (tmp_path / "data/root").symlink_to(tmp_path / "data")
    (tmp_path / "data/a/gone.png").symlink_to(tmp_path / "gone.png")  # reported when it is read
    assert list(load_data(tmp_path / "data", follow_links=True).paths) == [
        "a/1.png",
        "a/gone.png",
        "a/more/3.png",
        "b/2.png",
    ]


def test_links_that_lead_out_of_the_folder_are_refused_unless_asked_for(tmp_path):
    touch(tmp_path / "data", "a/1.png", "b/2.png")
    touch(tmp_path, "elsewhere/3.png")
    (tmp_path / "data/a/inside.png").symlink_to(tmp_path / "data/b/2.png")
    (tmp_path / "data/a/gone.png").symlink_to(tmp_path / "gone.png")
    assert len(load_data(tmp_path / "data")) == 4
    (tmp_path / "alias").symlink_to(tmp_path / "data")  # the root itself may be a link
    assert len(load_data(tmp_path / "alias")) == 4

    (tmp_path / "data/a/file.png").symlink_to(tmp_path / "elsewhere/3.png")
    (tmp_path / "data/a/text.txt").symlink_to("/etc/hostname")  # no image
    problem = error_of(tmp_path / "data")
    assert "data: 1 links lead out of it. If you trust them, add --follow-links." in problem
    assert f"data/a/file.png: a link to {tmp_path}/elsewhere/3.png" in problem
    (tmp_path / "data/a/file.png").unlink()
    (tmp_path / "data/c").symlink_to(tmp_path / "elsewhere")  # a whole class
    assert "data/c: a link to" in error_of(tmp_path / "data")
    assert "c/3.png" in load_data(tmp_path / "data", follow_links=True).paths


def test_links_in_a_csv_that_lead_out_are_refused_unless_asked_for(tmp_path):
    touch(tmp_path, "data/a/1.png", "data/b/2.png", "elsewhere/3.png")
    (tmp_path / "data/a/file.png").symlink_to(tmp_path / "elsewhere/3.png")
    (tmp_path / "data/out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/in").symlink_to("b")
    csv = tmp_path / "data/l.csv"
    csv.write_text("path,label\na/1.png,a\nin/2.png,b\n")
    assert len(load_data(csv)) == 2
    csv.write_text("path,label\na/1.png,a\nin/2.png,b\na/file.png,b\nout/3.png,b\n")
    problem = error_of(csv)
    assert "2 links lead out of it" in problem
    assert "data/a/file.png: a link to" in problem
    assert "data/out/3.png: a link to" in problem
    assert len(load_data(csv, follow_links=True)) == 4


def test_no_link_takes_the_place_of_what_it_leads_to(tmp_path):
    touch(tmp_path / "data", "a/real/1.png", "b/2.png")
    touch(tmp_path, "elsewhere/3.png")
    (tmp_path / "data/a/first").symlink_to(tmp_path / "data/a/real")
    for name in ("two", "one", "three"):
        (tmp_path / "data/b" / name).symlink_to(tmp_path / "elsewhere")
    # of several links to one folder, the first by name
    manifest = load_data(tmp_path / "data", follow_links=True)
    assert list(manifest.paths) == ["a/real/1.png", "b/2.png", "b/one/3.png"]


def test_missing_empty_and_flat_folders_say_what_to_do(tmp_path):
    assert "no such file or folder" in error_of(tmp_path / "nowhere")
    assert f"{tmp_path}: no images found. Put images into" in error_of(tmp_path)
    touch(tmp_path, "1.png", "2.png")
    assert ": images but no class sub-folders" in error_of(tmp_path)


@pytest.mark.parametrize(("call", "folder"), [("scandir", "."), ("scandir", "b"), ("stat", "b")])
def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch, call, folder):
    touch(tmp_path, "a/1.png", "b/2.png")
    locked, real = str(tmp_path / folder), getattr(os, call)

    def refuse(path: object, *args: object, **kwargs: object) -> object:
        if str(path) == locked:
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(module.os, call, refuse)
    assert error_of(tmp_path) == f"{locked}: cannot be listed (Permission denied)."


def test_folders_named_like_images_are_no_loose_images(tmp_path):
    (tmp_path / "a.png").mkdir()
    touch(tmp_path, "notes.txt")
    assert f"{tmp_path}: no images found." in error_of(tmp_path)


def test_train_without_images_names_the_folder(tmp_path):
    touch(tmp_path, "train/1.png", "val/a/1.png")
    assert f"{tmp_path / 'train'}: images but no class sub-folders" in error_of(tmp_path)


def test_one_class_is_refused_unless_the_classes_are_given(tmp_path):
    touch(tmp_path, "cat/1.png")
    assert "only one class, 'cat'" in error_of(tmp_path)
    manifest = load_data(tmp_path, classes=["dog", "cat"])
    assert manifest.classes == ("dog", "cat")
    assert manifest.labels.tolist() == [1]


def test_given_classes_refuse_other_folders(tmp_path):
    touch(tmp_path, "catt/1.png", "dog/1.png")
    message = error_of(tmp_path, classes=["cat", "dog"])
    assert message == f"{tmp_path}: unknown class 'catt'. Did you mean 'cat'?"


def test_unknown_folders_are_listed_in_natural_order(tmp_path):
    touch(tmp_path, "a10/1.png", "a2/1.png", "dog/1.png")
    assert error_of(tmp_path, classes=["dog", "cow"]) == (
        f"{tmp_path}: unknown class 'a2'. Known: cow, dog.\n"
        f"{tmp_path}: unknown class 'a10'. Known: cow, dog."
    )


@pytest.mark.parametrize(
    "name", ["root", "path_column", "label_column", "split_column", "truth_column"]
)
def test_csv_options_are_refused_for_a_folder(tmp_path, name):
    touch(tmp_path, "a/1.png", "b/1.png")
    option = f"--{name.replace('_', '-')}"
    message = error_of(tmp_path, **{name: "x"})
    assert message == f"{tmp_path} is a folder, but {option} needs a CSV file. Leave it out."


def test_file_names_that_are_not_utf8_survive(tmp_path):
    touch(tmp_path, "a/1.png", "b/2.png")
    raw = os.fsencode(tmp_path) + b"/a/caf\xe9.png"
    try:
        Path(os.fsdecode(raw)).touch()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    manifest = load_data(tmp_path)
    assert manifest.paths[1] == "a/caf\udce9.png"
    csv_path = tmp_path / "manifest.csv"
    text = manifest_text(manifest)
    csv_path.write_text(text, encoding="utf-8", errors="surrogateescape", newline="")
    again = read_manifest(csv_path, tmp_path, manifest.classes)
    assert os.fsencode(again.file(1)) == raw
    assert labels_by_path(load_data(csv_path)) == labels_by_path(manifest)


def test_class_names_that_are_not_utf8_are_refused(tmp_path):
    touch(tmp_path, os.fsdecode(b"caf\xe9/1.png"), "b/2.png")
    assert "class 'caf\\udce9' is not UTF-8 text" in error_of(tmp_path)


def test_a_class_folder_needs_a_name(tmp_path):
    touch(tmp_path, "cat/1.png", " /2.png")
    assert error_of(tmp_path) == f"{tmp_path}: a class folder without a name, ' '. Rename it."


def test_hundred_thousand_names_need_no_call_per_file(tmp_path, monkeypatch):
    touch(tmp_path, *(f"{c}/{i}.png" for c in "ab" for i in range(50)))
    calls = []
    real_stat = os.stat
    monkeypatch.setattr(module.os, "stat", lambda *a, **k: calls.append(a) or real_stat(*a, **k))
    assert len(load_data(tmp_path)) == 100
    assert len(calls) < 20  # folders only


# --- CSV files ---


def test_csv_rows_are_sorted_and_labels_stripped(tmp_path):
    csv_path = write_csv(tmp_path, "label,path\n 10 ,b.png\n2,a.png\n", "a.png", "b.png")
    manifest = load_data(csv_path)
    assert list(manifest.paths) == ["a.png", "b.png"]
    assert manifest.classes == ("2", "10")
    assert manifest.labels.tolist() == [0, 1]
    assert manifest.root == tmp_path
    assert manifest.truth is None


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_delimiters_line_ends_and_byte_order_marks(tmp_path, delimiter, newline, bom):
    rows = ["path,label,note", "a.png,cat,x", "b.png,dog,", ",,"]
    text = bom + newline.join(row.replace(",", delimiter) for row in rows)
    csv_path = write_csv(tmp_path, text, "a.png", "b.png")
    assert labels_by_path(load_data(csv_path)) == {"a.png": "cat", "b.png": "dog"}


def test_only_the_header_decides_the_delimiter(tmp_path):
    csv_path = write_csv(tmp_path, "path,label\na;1.png,x;y;z\nb.png,c\n", "a;1.png", "b.png")
    assert labels_by_path(load_data(csv_path)) == {"a;1.png": "x;y;z", "b.png": "c"}


def test_the_delimiter_is_the_one_that_gives_the_path_column(tmp_path):
    csv_path = write_csv(tmp_path, "path;label;x,y,z,w\na.png;1;\nb.png;2;\n", "a.png", "b.png")
    assert labels_by_path(load_data(csv_path)) == {"a.png": "1", "b.png": "2"}
    message = error_of(write_csv(tmp_path, "file;label;x,y\n"))
    assert "no column 'path'; there are: file, label, x,y." in message


def test_quoted_newlines_keep_line_numbers_right(tmp_path):
    text = 'path,label\na.png,"two\nlines"\nb.png,\n'
    csv_path = write_csv(tmp_path, text, "a.png", "b.png")
    assert error_of(csv_path) == f"{csv_path}:4: no label. Fill it in, or delete the row."


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("", 0),
        ("train", 0),
        ("Training", 0),
        ("val", 1),
        ("valid", 1),
        ("validation", 1),
        (" test ", 2),
    ],
)
def test_split_names(tmp_path, name, code):
    text = f"path,label,split\na.png,x,{name}\nb.png,y,train\n"
    manifest = load_data(write_csv(tmp_path, text, "a.png", "b.png"))
    assert manifest.splits.tolist() == [code, 0]


def test_without_a_split_column_no_splits_are_read(tmp_path):
    csv_path = write_csv(tmp_path, "path,label,split\na.png,x,7\nb.png,y,8\n", "a.png", "b.png")
    assert load_data(csv_path, split_column=None).splits.tolist() == [0, 0]


def test_columns_by_other_names(tmp_path):
    text = "file,class,fold,true\na.png,x,val,y\nb.png,y,train,y\n"
    manifest = load_data(
        write_csv(tmp_path, text, "a.png", "b.png"),
        path_column="file",
        label_column="class",
        split_column="fold",
        truth_column="true",
    )
    assert manifest.labels.tolist() == [0, 1]
    assert manifest.truth is not None
    assert manifest.truth.tolist() == [1, 1]
    assert manifest.rows("val").tolist() == [0]


def test_classes_come_from_labels_and_truth_together(tmp_path):
    text = "path,label,true\na.png,x, w \nb.png,x,x\n"
    manifest = load_data(write_csv(tmp_path, text, "a.png", "b.png"), truth_column="true")
    assert manifest.classes == ("w", "x")
    assert manifest.labels.tolist() == [1, 1]
    assert manifest.truth is not None
    assert manifest.truth.tolist() == [0, 1]


def test_missing_columns_list_those_there_are(tmp_path):
    csv_path = write_csv(tmp_path, "path,labels\na.png,x\n", "a.png")
    assert error_of(csv_path) == (
        f"{csv_path}:1: no column 'label'; there are: path, labels. Did you mean 'labels'?"
        " Name it with --label-column."
    )
    assert "no column 'fold'" in error_of(csv_path, label_column="labels", split_column="fold")
    assert "no column 't'" in error_of(csv_path, label_column="labels", truth_column="t")


def test_all_bad_rows_are_collected(tmp_path):
    text = (
        "path,label,split\n"
        "a.png,x,train\n"
        ",x,train\n"
        "b.png,,train\n"
        "c.png,x,valdi\n"
        "a.png,y,train\n"
        "../d.png,x,train\n"
        "e.png,x,train,extra\n"
        "f.png\n"
    )
    csv_path = write_csv(tmp_path, text, "a.png")
    assert error_of(csv_path).splitlines() == [
        f"{csv_path}:3: no path. Fill it in, or delete the row.",
        f"{csv_path}:4: no label. Fill it in, or delete the row.",
        f"{csv_path}:5: unknown split 'valdi'. Did you mean 'val'?",
        f"{csv_path}:6: 'a.png' has label 'x' on line 2 and 'y' here. Keep one of the two lines.",
        f"{csv_path}:7: '../d.png' lies outside {tmp_path}. Set --root.",
        "and 2 more",
    ]


def test_missing_files_are_named_with_the_bad_rows(tmp_path):
    csv_path = write_csv(tmp_path, "path,label\na.png,x\ngone.png,y\nb.png,\n", "a.png", "b.png")
    assert error_of(csv_path).splitlines() == [
        f"{csv_path}:3: no such file: gone.png",
        f"{csv_path}:4: no label. Fill it in, or delete the row.",
    ]


def test_a_repeated_row_is_kept_once(tmp_path):
    text = "path,label\na.png,x\n./a.png,x\nsub/../a.png,x\nb.png,y\n"
    assert list(load_data(write_csv(tmp_path, text, "a.png", "b.png")).paths) == ["a.png", "b.png"]


def test_a_path_in_two_splits_is_refused(tmp_path):
    text = "path,label,split\na.png,x,train\na.png,x,val\n"
    message = error_of(write_csv(tmp_path, text, "a.png"))
    assert "has split 'train' on line 2 and 'val' here" in message


def test_a_path_with_two_true_labels_is_refused(tmp_path):
    text = "path,label,true\na.png,x,x\nb.png,y,y\na.png,x,y\n"
    csv_path = write_csv(tmp_path, text, "a.png", "b.png")
    assert error_of(csv_path, truth_column="true") == (
        f"{csv_path}:4: 'a.png' has true label 'x' on line 2 and 'y' here."
        " Keep one of the two lines."
    )


def test_absolute_paths_may_go_through_a_link_to_the_root(tmp_path):
    images = touch(tmp_path / "images", "a.png", "sub/b.png")
    (tmp_path / "link").symlink_to(images)
    text = f"path,label\n{images}/a.png,x\n{tmp_path}/link/sub/b.png,y\n"
    manifest = load_data(write_csv(tmp_path, text), root=tmp_path / "link")
    assert list(manifest.paths) == ["a.png", "sub/b.png"]
    assert manifest.root == tmp_path / "link"
    beside = write_csv(tmp_path, f"path,label\n{images}2/a.png,x\n")
    assert "lies outside" in error_of(beside, root=images)


def test_absolute_paths_inside_the_root_become_relative(tmp_path):
    text = f"path,label\n{tmp_path}/a.png,x\nb.png,y\n"
    csv_path = write_csv(tmp_path, text, "a.png", "b.png")
    assert list(load_data(csv_path).paths) == ["a.png", "b.png"]
    (tmp_path / "other").mkdir()
    assert f"'{tmp_path}/a.png' lies outside" in error_of(csv_path, root=tmp_path / "other")


def test_root_moves_the_paths(tmp_path):
    csv_path = write_csv(tmp_path, "path,label\na.png,x\nb.png,y\n")
    images = touch(tmp_path / "images", "a.png", "b.png")
    assert load_data(csv_path, root=images).file(0) == images / "a.png"
    assert error_of(csv_path).splitlines() == [
        f"{csv_path}: 2 of 2 files do not exist under {tmp_path}."
        " Set --root to the folder that the paths start from.",
        f"{csv_path}:2: no such file: a.png",
        f"{csv_path}:3: no such file: b.png",
    ]
    assert "Check --root" in error_of(csv_path, root=tmp_path / "nowhere")


def test_five_missing_files_are_listed(tmp_path):
    csv_path = write_csv(tmp_path, "path,label\n" + "".join(f"{i}.png,x\n" for i in range(7)))
    first, *places, last = error_of(csv_path).splitlines()
    assert "7 of 7 files do not exist" in first
    assert places == [f"{csv_path}:{i + 2}: no such file: {i}.png" for i in range(5)]
    assert last == "and 2 more"


def test_missing_files_are_listed_line_by_line(tmp_path):
    csv_path = write_csv(tmp_path, "path,label\nb.png,x\na.png,y\n")
    _, *places = error_of(csv_path).splitlines()
    assert places == [f"{csv_path}:2: no such file: b.png", f"{csv_path}:3: no such file: a.png"]


def test_a_missing_file_in_a_missing_folder_has_no_hint(tmp_path):
    csv_path = write_csv(tmp_path, "path,label\nno/a.png,x\nb.png,y\n", "b.png", "c.png")
    assert error_of(csv_path).splitlines()[1:] == [f"{csv_path}:2: no such file: no/a.png"]


def test_five_known_classes_are_listed(tmp_path):
    csv_path = write_csv(tmp_path, "path,label\na.png,xyz\n", "a.png")
    assert error_of(csv_path, classes=[*"gfedcba"]) == (
        f"{csv_path}:2: unknown class 'xyz'. Known: a, b, c, d, e."
    )


@pytest.mark.parametrize(
    ("problems", "count", "expected"),
    [
        (["a", "b"], None, "a\nb"),
        (["a", "b", "c"], None, "a\nb\nand 1 more"),
        (["a", "b"], 5, "a\nb\nand 3 more"),
        (["a"] * MOST_PROBLEMS, None, "a\na\nand at least 998 more"),
        (["a"] * MOST_PROBLEMS, MOST_PROBLEMS, "a\na\nand 998 more"),
    ],
)
def test_a_message_lists_the_first_problems(problems, count, expected):
    assert listed(problems, count, shown=2) == expected


def test_given_classes_refuse_other_labels_by_line(tmp_path):
    text = "path,label,true\na.png,catt,cat\nb.png,dog,bird\n"
    csv_path = write_csv(tmp_path, text, "a.png", "b.png")
    message = error_of(csv_path, classes=["cat", "dog"], truth_column="true")
    assert message.splitlines() == [
        f"{csv_path}:2: unknown class 'catt'. Did you mean 'cat'?",
        f"{csv_path}:3: unknown class 'bird'. Known: cat, dog.",
    ]


def test_a_missing_true_label_is_a_bad_row(tmp_path):
    csv_path = write_csv(tmp_path, "path,label,true\na.png,cat,\n", "a.png")
    assert (
        error_of(csv_path, truth_column="true") == f"{csv_path}:2: no true label in column 'true'"
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"", "no header line"),
        (b"path,label\n", "no rows below the header"),
        ("path,label\na.png,x\n".encode("utf-16"), "not a text file in UTF-8"),
        (b'path,label\na.png,"x\n', ":2: not valid CSV"),
        (b"\x89PNG\r\n\x1a\n", "no column 'path'"),
    ],
)
def test_files_that_are_no_csv(tmp_path, text, problem):
    assert problem in error_of(write_csv(tmp_path, text, "a.png"))


def test_one_label_is_refused(tmp_path):
    csv_path = write_csv(tmp_path, "path,label\na.png,x\n", "a.png")
    assert "only one class, 'x'" in error_of(csv_path)


# --- validation ---


def manifest_of(labels: list[int], splits: list[int] | None = None) -> Manifest:
    return Manifest(
        root=Path("/data"),
        paths=StringTable(f"{i:06d}.png" for i in range(len(labels))),
        labels=np.array(labels, dtype=np.int32),
        splits=np.array(splits or [0] * len(labels), dtype=np.int8),
        classes=tuple("abcdefgh"[: max(labels) + 1]),
    )


def test_validation_is_stratified():
    manifest = manifest_of([0] * 100 + [1] * 50 + [2] * 10)
    drawn = draw_validation(manifest, 0.1, seed=1)
    assert np.bincount(drawn.labels[drawn.rows("val")]).tolist() == [10, 5, 1]
    assert not manifest.has_val
    assert drawn.paths is manifest.paths


@pytest.mark.parametrize(
    ("counts", "fraction", "drawn"),
    [
        ([10, 5], 0.25, [3, 1]),  # 2.5 and 1.25 of 4: the larger remainder is rounded up
        ([5, 10], 0.25, [1, 3]),
        ([1, 9], 0.5, [0, 5]),  # the only one stays in train
        ([2, 2], 0.9, [1, 1]),
        ([30, 3], 0.01, [1, 0]),  # at least one in all
    ],
)
def test_validation_by_largest_remainders(counts, fraction, drawn):
    manifest = manifest_of([label for label, count in enumerate(counts) for _ in range(count)])
    val = draw_validation(manifest, fraction, seed=0)
    assert np.bincount(val.labels[val.rows("val")], minlength=2).tolist() == drawn


def test_validation_depends_on_the_seed_alone():
    manifest = manifest_of([0] * 100 + [1] * 50)
    first, again = (draw_validation(manifest, 0.2, seed=3).rows("val") for _ in range(2))
    other = draw_validation(manifest, 0.2, seed=4).rows("val")
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()


def test_another_class_does_not_change_what_is_drawn():
    few = draw_validation(manifest_of([0] * 100 + [1] * 10), 0.1, seed=0).rows("val")
    many = draw_validation(manifest_of([0] * 100 + [1] * 500), 0.1, seed=0).rows("val")
    assert few[few < 100].tolist() == many[many < 100].tolist()


def test_small_classes_share_the_draw():
    drawn = draw_validation(manifest_of([0, 1, 2, 3] * 5), 0.1, seed=0)  # 0.5 images per class
    counts = np.bincount(drawn.labels[drawn.rows("val")], minlength=4)
    assert sorted(counts.tolist()) == [0, 0, 1, 1]


@given(
    counts=st.lists(st.integers(1, 12), min_size=2, max_size=6),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 5),
)
def test_every_class_keeps_an_image_in_train(counts, fraction, seed):
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    drawn = draw_validation(manifest_of(labels), fraction, seed)
    assert np.bincount(drawn.labels[drawn.rows("train")], minlength=len(counts)).min() >= 1
    assert drawn.has_val == (max(counts) > 1)


def test_test_rows_stay_and_val_rows_are_respected():
    drawn = draw_validation(manifest_of([0, 1] * 20, [2] * 20 + [0] * 20), 0.5, seed=0)
    assert drawn.rows("test").tolist() == list(range(20))
    assert len(drawn.rows("val")) == 10
    assert draw_validation(drawn, 0.1, seed=0) is drawn
    plain = manifest_of([0, 1])
    assert draw_validation(plain, 0.0, seed=0) is plain
    with pytest.raises(ConfigError, match="below 1"):
        draw_validation(plain, 1.0, seed=0)
    with pytest.raises(ConfigError, match="at least 0"):
        draw_validation(plain, -0.1, seed=0)


# --- manifest.csv ---

names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)


@settings(max_examples=50, deadline=None)
@given(
    paths=st.lists(names.filter(is_inside), min_size=1, max_size=6, unique=True),
    classes=st.lists(names, min_size=1, max_size=3, unique=True),
    has_truth=st.booleans(),
    data=st.data(),
)
def test_manifest_csv_round_trip(tmp_path_factory, paths, classes, has_truth, data):
    ids = st.lists(st.integers(0, len(classes) - 1), min_size=len(paths), max_size=len(paths))
    codes = st.lists(st.integers(0, 2), min_size=len(paths), max_size=len(paths))
    manifest = Manifest(
        root=Path("/data"),
        paths=StringTable(sorted(paths)),
        labels=np.array(data.draw(ids), dtype=np.int32),
        splits=np.array(data.draw(codes), dtype=np.int8),
        classes=tuple(classes),
        truth=np.array(data.draw(ids), dtype=np.int32) if has_truth else None,
    )
    csv_path = tmp_path_factory.mktemp("run") / "manifest.csv"
    csv_path.write_text(manifest_text(manifest), encoding="utf-8", newline="")
    again = read_manifest(csv_path, Path("/data"), classes)
    assert list(again.paths) == sorted(paths)
    assert again.classes == manifest.classes
    np.testing.assert_array_equal(again.labels, manifest.labels)
    np.testing.assert_array_equal(again.splits, manifest.splits)
    assert (again.truth is None) == (not has_truth)
    if manifest.truth is not None:
        np.testing.assert_array_equal(again.truth, manifest.truth)


@settings(max_examples=50, deadline=None)
@given(
    rows=st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=6)
        .map(lambda name: name.replace("/", "_") + ".png")
        .filter(str.strip),
        names.map(lambda name: name.replace("\0", "_").strip()).filter(bool),
        min_size=2,
        max_size=5,
    )
)
def test_a_csv_of_any_names_loads_as_written(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("data")
    paths = sorted(rows)
    classes = sorted(set(rows.values()), key=natural_key)
    manifest = Manifest(
        root=folder,
        paths=StringTable(paths),
        labels=np.array([classes.index(rows[path]) for path in paths], dtype=np.int32),
        splits=np.zeros(len(paths), dtype=np.int8),
        classes=tuple(classes),
    )
    touch(folder, *paths)
    csv_path = folder / "data.csv"
    csv_path.write_text(manifest_text(manifest), encoding="utf-8", newline="")
    assert labels_by_path(load_data(csv_path, classes=classes)) == rows


def test_manifest_csv_is_plain_and_readable():
    manifest = manifest_of([0, 1, 1], [0, 1, 2])
    assert manifest_text(manifest) == (
        "path,label,split\n000000.png,a,train\n000001.png,b,val\n000002.png,b,test\n"
    )


def test_a_manifest_read_back_has_an_absolute_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("manifest.csv").write_text("path,label,split\na,x,val\n")
    manifest = read_manifest(Path("manifest.csv"), Path("images"), ["x"])
    assert manifest.root == tmp_path / "images"
    assert manifest.has_val


@pytest.mark.parametrize(
    "text",
    [
        "",
        "path,label\na,b\n",
        "path,label,split\na,zebra,train\n",
        "path,label,split\na,x\n",
        "path,label,split\na,x,later\n",
        "path,label,split,true_label\na,x,train\n",
        "path,label,split,true_label\na,x,train\nb,x,train,x,x\n",
        "path,label,split\nb,x,train\na,x,train\n",
        "path,label,split\na,x,train\na,x,val\n",
        "path,label,split\n../a,x,train\n",
        "path,label,split\na/../../b,x,train\n",
        "path,label,split\n/etc/a,x,train\n",
        "path,label,split\n,x,train\n",
    ],
)
def test_damaged_manifest_csv(tmp_path, text):
    (tmp_path / "manifest.csv").write_text(text)
    with pytest.raises(DataError, match="damaged"):
        read_manifest(tmp_path / "manifest.csv", tmp_path, ["x"])
    with pytest.raises(DataError, match="no such file"):
        read_manifest(tmp_path / "nowhere.csv", tmp_path, ["x"])
