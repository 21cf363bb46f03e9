from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from elrcli.config import Reading
from elrcli.data import folders as module
from elrcli.data.folders import left_out
from elrcli.data.manifest import (
    load_data,
    manifest_text,
    read_manifest,
)
from tests.data.files import error_of, labels_by_path, touch


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


def test_pictures_of_other_kinds_are_counted(tmp_path):
    touch(
        tmp_path, "a/1.png", "a/2.HEIC", "a/._2.heic", "b/3.png", "b/x/4.heic", "b/5.dng", "c/6.txt"
    )
    others = f"{tmp_path}: 3 pictures of a kind that is not read (.heic, .dng), left out. Convert"
    assert left_out(tmp_path)[0].startswith(others)
    for name in "a/1.png", "b/3.png":
        (tmp_path / name).unlink()
    assert others in error_of(tmp_path)


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


def test_a_split_that_a_loose_image_makes_a_class_is_told(tmp_path):
    touch(tmp_path, "train/0.png", "train/a/1.png", "train/b/2.png", "bus/3.png", "tram/x/4.png")
    assert left_out(tmp_path) == [
        f"{tmp_path}/train: taken for a class: images lie beside its folders"
    ]


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


def test_images_that_are_not_taken_are_named(tmp_path):
    touch(tmp_path, "train/a/1.png", "val/a/1.png", "train/2.png", "3.png", ".4.png", "notes.txt")
    touch(tmp_path, "more/b/5.png", "more/b/6.png", "tables/b.csv", "train/sub.png/7.png")
    assert left_out(tmp_path) == [
        f"{tmp_path}: images in no class folder, left out: 1",
        f"{tmp_path}/train: images in no class folder, left out: 1",
        f"{tmp_path}/more: left out, because the folders beside it are splits",
    ]


def test_class_folders_alone_leave_nothing_out(tmp_path):
    touch(tmp_path, "a/1.png", "b/c/2.png")
    assert left_out(tmp_path) == []
    touch(tmp_path, "3.png", "4.jpg")
    assert left_out(tmp_path) == [f"{tmp_path}: images in no class folder, left out: 2"]


def test_class_folders_without_images_are_named(tmp_path):
    touch(tmp_path, "train/a/1.png", "train/b/2", "train/c/3.vda", "val/a/1.png", "other/notes.txt")
    (tmp_path / "val/d").mkdir()
    assert left_out(tmp_path) == [
        f"{tmp_path}/train/b: holds no image, left out",
        f"{tmp_path}/train/c: holds no image, left out",
        f"{tmp_path}/val/d: holds no image, left out",
    ]


def test_without_train_the_names_of_splits_are_classes(tmp_path):
    touch(tmp_path, "val/1.png", "test/2.png")
    assert load_data(tmp_path).classes == ("test", "val")


def test_other_splits_without_train_are_no_classes(tmp_path):
    touch(tmp_path, "val/a/1.png", "val/b/2.png", "test/a/3.png", "test/b/4.png")
    assert f"{tmp_path}: holds test and val, but no train. Name one of" in error_of(tmp_path)


def test_what_cannot_be_listed_is_left_out_without_a_word(tmp_path, monkeypatch):
    touch(tmp_path, "train/a/1.png", "val/a/1.png", "lost+found/b/2.png")
    scandir = os.scandir

    def closed(folder: str):
        if folder == f"{tmp_path}/lost+found":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", closed)
    assert left_out(tmp_path) == []


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
    assert list(load_data(tmp_path / "data", Reading(follow_links=True)).paths) == [
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
    assert "c/3.png" in load_data(tmp_path / "data", Reading(follow_links=True)).paths


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
    assert len(load_data(csv, Reading(follow_links=True))) == 4


def test_no_link_takes_the_place_of_what_it_leads_to(tmp_path):
    touch(tmp_path / "data", "a/real/1.png", "b/2.png")
    touch(tmp_path, "elsewhere/3.png")
    (tmp_path / "data/a/first").symlink_to(tmp_path / "data/a/real")
    for name in ("two", "one", "three"):
        (tmp_path / "data/b" / name).symlink_to(tmp_path / "elsewhere")
    # of several links to one folder, the first by name
    manifest = load_data(tmp_path / "data", Reading(follow_links=True))
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
