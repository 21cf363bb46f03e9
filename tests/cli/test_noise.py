from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pytest

from elrcli import api
from elrcli.errors import ConfigError, DataError
from tests.shapes import write_shapes

CLASSES = ("bird", "cat", "dog")


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """60 small pictures, 20 of each class."""
    monkeypatch.chdir(tmp_path)
    write_shapes(tmp_path / "data", per_class=20, classes=CLASSES, size=16)
    return tmp_path / "data"


def read(path: str | Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def flips(path: str | Path) -> Counter[tuple[str, str]]:
    """Count (true, given) of the wrong labels."""
    rows = read(path)
    return Counter(
        (row["true_label"], row["label"]) for row in rows if row["label"] != row["true_label"]
    )


def test_the_true_label_is_kept_beside_the_noisy_one(elr, data):
    outcome = elr("noise", data, "--out", "n.csv", "--rate", 0.5)
    assert outcome.code == 0
    assert outcome.out == "n.csv\n"
    rows = read("n.csv")
    assert list(rows[0]) == ["path", "label", "true_label"]
    assert len(rows) == 60
    assert all(row["path"].startswith(f"{row['true_label']}/") for row in rows)
    wrong = sum(flips("n.csv").values())
    assert 10 <= wrong <= 30  # a third of the redrawn labels hit the true class
    assert f"{wrong} of 60 training labels are now wrong" in outcome.err
    assert f"elr train n.csv --root {data} --truth-column true_label" in outcome.err


def test_noise_on_noise_is_noted(elr, data):
    assert elr("noise", data, "--out", "n.csv", "--rate", 0.5).code == 0
    outcome = elr("noise", "n.csv", "--root", data, "--out", "more.csv", "--rate", 0)
    assert "n.csv: 'label' is taken for true, its true_label is not used" in outcome.err
    assert flips("more.csv") == Counter()


def test_the_seed_decides(elr, data):
    for name, seed in (("a.csv", 1), ("b.csv", 1), ("c.csv", 2)):
        assert elr("noise", data, "-o", name, "--rate", 0.4, "--seed", seed, "-q").err == ""
    assert Path("a.csv").read_text() == Path("b.csv").read_text() != Path("c.csv").read_text()


def test_asymmetric_follows_the_mapping(elr, data):
    typed = ["--kind", "asymmetric", "--rate", 1, "--map", "cat=dog", "--map", "dog=cat"]
    assert elr("noise", data, "-o", "n.csv", *typed, "--quiet").err == ""
    assert flips("n.csv") == {("cat", "dog"): 20, ("dog", "cat"): 20}


def test_pair_takes_the_next_class(elr, data):
    assert elr("noise", data, "-o", "n.csv", "--kind", "pair", "--rate", 1).code == 0
    assert flips("n.csv") == {("bird", "cat"): 20, ("cat", "dog"): 20, ("dog", "bird"): 20}


def test_a_matrix_of_certainties(elr, data):
    Path("m.csv").write_text("1,0,0\n0,0,1\n0,0,1\n")
    assert elr("noise", data, "-o", "n.csv", "--kind", "matrix", "--matrix", "m.csv").code == 0
    assert flips("n.csv") == {("cat", "dog"): 20}


def test_a_matrix_with_a_byte_order_mark(data):
    Path("m.csv").write_text("1,0,0\n0,0,1\n0,0,1\n", encoding="utf-8-sig")
    api.make_noise(data, "n.csv", kind="matrix", matrix="m.csv")
    assert flips("n.csv") == {("cat", "dog"): 20}


def test_instance_noise_has_about_the_rate(elr, data):
    assert elr("noise", data, "-o", "n.csv", "--kind", "instance", "--rate", 0.3).code == 0
    assert 8 <= sum(flips("n.csv").values()) <= 28  # 18 on average


def test_only_training_labels_are_changed(elr, data):
    rows = read_paths(data)
    lines = [f"{path},{path.split('/')[0]},{'test' if i % 2 else ''}" for i, path in rows]
    Path("data.csv").write_text("\n".join(["file,class,part", *lines]) + "\n")
    columns = ["--path-column", "file", "--label-column", "class", "--split-column", "part"]
    typed = ["--kind", "pair", "--rate", 1, "--root", data]
    assert elr("noise", "data.csv", "-o", "n.csv", *typed, *columns).code == 0
    noisy = read("n.csv")
    assert Counter(row["split"] for row in noisy) == {"train": 30, "test": 30}
    assert {row["split"] for row in noisy if row["label"] != row["true_label"]} == {"train"}


def read_paths(data: Path) -> list[tuple[int, str]]:
    found = sorted(path.relative_to(data).as_posix() for path in data.glob("*/*.png"))
    return list(enumerate(found))


def test_nothing_is_replaced(elr, data):
    Path("n.csv").write_text("mine")
    outcome = elr("noise", data, "-o", "n.csv", "--rate", 0.4)
    assert (outcome.code, outcome.err) == (
        1,
        "error: n.csv: exists. Choose another --out, or delete it first.\n",
    )
    assert Path("n.csv").read_text() == "mine"


def test_without_training_images_there_is_nothing_to_change(elr, data):
    lines = [f"{path},{path.split('/')[0]},test" for _, path in read_paths(data)]
    Path("data.csv").write_text("\n".join(["path,label,split", *lines]) + "\n")
    outcome = elr("noise", "data.csv", "-o", "n.csv", "--rate", 0.4, "--root", data)
    assert outcome.code == 1
    assert "data.csv: no training images" in outcome.err


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--map", "cat=dog", "--map", "cat=bird"], "a class turns into one other only"),
        ([], "--kind asymmetric needs --map"),
    ],
)
def test_wrong_usage(elr, data, typed, message):
    asked = ["--kind", "asymmetric", "--rate", 0.4]
    outcome = elr("noise", data, "-o", "n.csv", *asked, *typed)
    assert outcome.code == 2
    assert message in outcome.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "pair"}, "--kind pair needs --rate"),
        ({"kind": "asymmetric", "rate": 0.1}, "--kind asymmetric needs --map"),
        ({"kind": "asymmetric", "rate": 0.1, "mapping": {}}, "--kind asymmetric needs --map"),
        ({"kind": "matrix"}, "--kind matrix needs --matrix"),
        ({"kind": "pair", "rate": 0.1, "mapping": {"cat": "dog"}}, "pair does not use --map"),
        ({"kind": "matrix", "matrix": "m.csv", "rate": 0.0}, "matrix does not use --rate"),
        ({"kind": "pair", "rate": 1.5}, "--rate 1.5: must lie between 0 and 1"),
        ({"kind": "other", "rate": 0.1}, "--kind other: choose one of symmetric"),
        (
            {"kind": "asymmetric", "rate": 0.1, "mapping": {"cat": "dgo"}},
            "--map: unknown class 'dgo'. Did you mean 'dog'?",
        ),
    ],
)
def test_nothing_is_missing_and_nothing_ignored(data, options, message):
    with pytest.raises(ConfigError) as caught:
        api.make_noise(data, "n.csv", **options)
    assert message in str(caught.value)
    assert not Path("n.csv").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,0\n0,1\n", "m.csv:1: expected 3 probabilities that sum to 1, found 2"),
        ("1,0,0\n0,1,0\n0,0.5,0.4\n", "m.csv:3: expected 3 probabilities that sum to 1"),
        ("1,0,0\n0,2,-1\n0,0,1\n", "m.csv:2: expected 3 probabilities"),
        ("1,0,0\n0,1,0\n", "m.csv: 2 lines for 3 classes"),
        ("bird,cat,dog\n", "m.csv:1: not numbers"),
    ],
)
def test_a_bad_matrix_is_named(data, text, message):
    Path("m.csv").write_text(text)
    with pytest.raises(DataError) as caught:
        api.make_noise(data, "n.csv", kind="matrix", matrix="m.csv")
    assert message in str(caught.value)


def test_a_bad_pair_is_a_usage_error(elr, data):
    outcome = elr("noise", data, "-o", "n.csv", "--kind", "asymmetric", "--map", "catdog")
    assert outcome.code == 2
    assert "expected two classes, such as cat=dog" in outcome.err


def test_the_file_must_be_csv(elr, data):
    outcome = elr("noise", data, "-o", "n.parquet", "--rate", 0.1)
    assert outcome.code == 1
    assert "End the name in .csv" in outcome.err


def test_links_out_of_the_data_are_followed_when_asked_for(elr, data):
    (data / "cat/link.png").symlink_to(Path("other.png").absolute())
    Path("other.png").touch()
    outcome = elr("noise", data, "--out", "n.csv", "--rate", 0.5, "--no-follow-links")
    assert outcome.code == 1
    assert "cat/link.png: a link to" in outcome.err
    outcome = elr("noise", data, "--out", "n.csv", "--rate", 0.5, "--follow-links")
    assert outcome.code == 0
    assert outcome.err.endswith(" --truth-column true_label --follow-links\n")
    assert len(read("n.csv")) == 61
