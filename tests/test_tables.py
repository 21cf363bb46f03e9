from __future__ import annotations

import csv
import io
import json
import sys

import pytest

from elrcli.errors import ConfigError, RunError
from elrcli.tables import table_format, write_csv, write_table

COLUMNS = ("path", "label", "confidence")
ROWS = [
    {"path": "a.png", "label": "cat", "confidence": 0.75},
    {"path": 'b,"c".png', "label": "größe", "confidence": 0.5},
    {"path": "broken.png"},
]


def test_csv(tmp_path):
    write_table(tmp_path / "t.csv", COLUMNS, ROWS)
    assert (tmp_path / "t.csv").read_text(encoding="utf-8") == (
        'path,label,confidence\na.png,cat,0.75\n"b,""c"".png",größe,0.5\nbroken.png,,\n'
    )


def test_no_header_stands_alone_where_the_first_row_fails():
    def rows():
        raise ConfigError("no such device")
        yield {}

    file = io.StringIO()
    with pytest.raises(ConfigError, match="no such device"):
        write_csv(file, COLUMNS, rows())
    assert file.getvalue() == ""
    write_csv(file, COLUMNS, [])
    assert file.getvalue() == "path,label,confidence\n"


def test_json_lines_have_every_column(tmp_path):
    write_table(tmp_path / "t.jsonl", COLUMNS, ROWS)
    lines = (tmp_path / "t.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == ROWS[0]
    assert json.loads(lines[2]) == {"path": "broken.png", "label": None, "confidence": None}
    assert "größe" in lines[1]


def test_parquet_keeps_types(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    write_table(tmp_path / "t.parquet", COLUMNS, ROWS)
    table = parquet.read_table(tmp_path / "t.parquet")
    assert table.column_names == list(COLUMNS)
    assert table["label"].to_pylist() == ["cat", "größe", None]
    assert table["confidence"].to_pylist() == [0.75, 0.5, None]


def test_parquet_tables_can_be_joined_where_a_column_is_empty(tmp_path):
    dataset = pytest.importorskip("pyarrow.dataset")
    rows = [{"path": "a.png"}, {"path": "b.png", "error": "the file is empty"}]
    files = [tmp_path / "1.parquet", tmp_path / "2.parquet"]
    for file, row in zip(files, rows, strict=True):
        write_table(file, ("path", "error"), [row])
    errors = dataset.dataset(files).to_table()["error"]
    assert errors.to_pylist() == [None, "the file is empty"]


def test_no_rows_give_a_header(tmp_path):
    write_table(tmp_path / "t.csv", COLUMNS, [])
    assert (tmp_path / "t.csv").read_text() == "path,label,confidence\n"


def test_a_carriage_return_in_a_name_survives(tmp_path):
    write_table(tmp_path / "t.csv", ("path", "label"), [{"path": "a\rb.png", "label": "x"}])
    with (tmp_path / "t.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["path", "label"], ["a\rb.png", "x"]]


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet"])
def test_a_file_name_that_is_not_utf8_is_written(tmp_path, name):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    path = b"\xff.png".decode("utf-8", "surrogateescape")
    write_table(tmp_path / name, ("path",), [{"path": path}])
    assert b".png" in (tmp_path / name).read_bytes()


def test_json_is_utf8_whatever_the_file_names(tmp_path):
    names = ["größe.png", b"\xff.png".decode("utf-8", "surrogateescape")]
    write_table(tmp_path / "t.jsonl", ("path",), [{"path": name} for name in names])
    lines = (tmp_path / "t.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines == ['{"path": "größe.png"}', r'{"path": "\udcff.png"}']
    assert [json.loads(line)["path"] for line in lines] == names


@pytest.mark.parametrize("name", ["t.xlsx", "t", "t.json"])
def test_an_unknown_suffix_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=r"unknown kind of table\. End the name in \.csv"):
        write_table(tmp_path / name, COLUMNS, ROWS)
    assert list(tmp_path.iterdir()) == []


def test_suffix_in_capitals(tmp_path):
    assert table_format(tmp_path / "T.CSV") == "csv"


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'elr\[parquet\]'"):
        table_format(tmp_path / "t.parquet")


def test_a_failure_half_way_leaves_the_old_file(tmp_path):
    def rows():
        yield ROWS[0]
        raise OSError(28, "No space left on device")

    (tmp_path / "t.csv").write_text("old")
    with pytest.raises(RunError, match=r"t\.csv: cannot be written \(No space left on device\)"):
        write_table(tmp_path / "t.csv", COLUMNS, rows())
    assert (tmp_path / "t.csv").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]
