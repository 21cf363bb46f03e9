from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elrcli.config import TrainConfig
from elrcli.data.manifest import (
    Manifest,
    StringTable,
    draw_validation,
    load_data,
    manifest_text,
    natural_key,
    read_manifest,
)
from elrcli.data.rows import is_inside
from elrcli.data.samples import load_samples
from elrcli.errors import ConfigError, DataError
from tests.data.files import labels_by_path, touch

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


def test_no_share_is_drawn_beside_validation_images_of_the_data(tmp_path):
    images = [f"{label}/{number}.png" for label in "ab" for number in range(10)]
    data = touch(tmp_path / "data", *images)
    assert len(load_samples(TrainConfig(data=data, val_fraction=0.25)).rows("val")) == 5
    split = touch(tmp_path / "split", *(f"train/{image}" for image in images), "val/a/v.png")
    with pytest.raises(ConfigError, match=r"--val-fraction 0\.25: .*split has validation images"):
        load_samples(TrainConfig(data=split, val_fraction=0.25))
    for unasked in TrainConfig(data=split), TrainConfig(data=split, val_fraction=0.0):
        assert len(load_samples(unasked).rows("val")) == 1


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
    true_ids = st.lists(st.integers(-1, len(classes) - 1), min_size=len(paths), max_size=len(paths))
    codes = st.lists(st.integers(0, 2), min_size=len(paths), max_size=len(paths))
    manifest = Manifest(
        root=Path("/data"),
        paths=StringTable(sorted(paths)),
        labels=np.array(data.draw(ids), dtype=np.int32),
        splits=np.array(data.draw(codes), dtype=np.int8),
        classes=tuple(classes),
        truth=np.array(data.draw(true_ids), dtype=np.int32) if has_truth else None,
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
