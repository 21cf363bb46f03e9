from __future__ import annotations

import pytest

from elrcli.config import Reading
from elrcli.data.manifest import (
    NO_CLASS,
    load_data,
)
from tests.data.files import error_of, labels_by_path, touch, write_csv


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
    assert load_data(csv_path, Reading(split_column=None)).splits.tolist() == [0, 0]


def test_columns_by_other_names(tmp_path):
    text = "file,class,fold,true\na.png,x,val,y\nb.png,y,train,y\n"
    manifest = load_data(
        write_csv(tmp_path, text, "a.png", "b.png"),
        Reading(path_column="file", label_column="class", split_column="fold"),
        truth_column="true",
    )
    assert manifest.labels.tolist() == [0, 1]
    assert manifest.truth is not None
    assert manifest.truth.tolist() == [1, 1]
    assert manifest.rows("val").tolist() == [0]


def test_classes_come_from_labels_alone(tmp_path):
    """True labels may only report: another class would be another network."""
    text = "path,label,true\na.png,x, w \nb.png,x,x\nc.png,y, x\n"
    manifest = load_data(write_csv(tmp_path, text, "a.png", "b.png", "c.png"), truth_column="true")
    assert manifest.classes == ("x", "y")
    assert manifest.labels.tolist() == [0, 0, 1]
    assert manifest.truth is not None
    assert manifest.truth.tolist() == [NO_CLASS, 0, 0]


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
    manifest = load_data(write_csv(tmp_path, text), Reading(root=tmp_path / "link"))
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
    assert load_data(csv_path, Reading(root=images)).file(0) == images / "a.png"
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
        f"{csv_path}:2: unknown class 'xyz'. Known: a, b, c, d, e and 2 more."
    )


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
