"""CSV files that are damaged, wrongly encoded or hostile: used rightly, or refused by line."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elrcli.data import csv_files as module
from elrcli.data.manifest import load_data
from elrcli.data.rows import is_inside
from elrcli.errors import DataError, legible, printable


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with a.png, b.png and sub/c.png."""
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "b.png", "sub/c.png"):
        (tmp_path / name).touch()
    return tmp_path


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "data.csv"
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def problem_of(path: Path, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        load_data(path, **options)
    return str(caught.value).replace(f"{path}:", "")


# --- text ---


def test_a_wrong_encoding_is_named_by_line(data):
    path = write(data, "path,label\na.png,café\nb.png,tee\n".encode("latin-1"))
    assert problem_of(path) == ("2: 'caf\\udce9' is not UTF-8 text. Save the file as CSV (UTF-8).")
    truth = write(data, "path,label,true\na.png,x,café\nb.png,y,y\n".encode("latin-1"))
    assert problem_of(truth, truth_column="true").startswith("2: 'caf\\udce9' is not UTF-8 text.")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_two_byte_encodings_are_refused(data, encoding):
    path = write(data, "path,label\na.png,x\nb.png,y\n".encode(encoding))
    assert "not a text file in UTF-8" in problem_of(path)


def test_nul_bytes_are_named_by_line(data):
    path = write(data, "path,label\na.png,x\nb.png,y\0\n")
    assert problem_of(path).startswith("3: 'y\\x00' is not UTF-8 text.")
    path = write(data, "path,label\na.png,x\nb\0.png,y\n")
    assert "3: no such file: b\\x00.png" in problem_of(path)
    unchecked = write(data, "path,label\na.png,x\nfolder\0/b.png,y\n")
    assert len(load_data(unchecked, check_files=False)) == 2


def test_a_file_without_line_ends_is_not_read_into_memory(data, monkeypatch):
    monkeypatch.setattr(module, "LONGEST_HEADER", 64)
    assert "not a text file" in problem_of(write(data, "x" * 1000))


def test_a_very_long_cell_is_refused_by_line(data):
    path = write(data, f"path,label\na.png,x\nb.png,{'y' * 200_000}\n")
    assert "3: not valid CSV: field larger than field limit" in problem_of(path)


def test_a_very_long_header_is_refused(data):
    problem = problem_of(write(data, f"path,{'x' * 200_000}\na.png,x\n"))
    assert problem.startswith("1: not valid CSV: field larger than field limit")


def test_a_long_name_does_not_fill_the_screen(data):
    path = write(data, f"path,label\na.png,x\n{'y' * 100_000}.png,y\n")
    assert len(problem_of(path)) < 1000


def test_names_cannot_command_the_terminal(data):
    path = write(data, "path,label\n\x1b[2J\u202eevil.png,x\nb.png,y\n")
    assert "2: no such file: \\x1b[2J\\u202eevil.png" in problem_of(path)
    assert printable("café 漢字 = <b>") == "café 漢字 = <b>"
    assert legible("a\tb\x9b\udcff") == "a\\tb\\x9b\\udcff"


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_semicolons_line_ends_and_marks(data, newline, bom):
    rows = ["path;label", '"a.png";"x\n2"', "sub/c.png;y"]
    manifest = load_data(write(data, bom + newline.join(rows) + newline))
    assert list(manifest.paths) == ["a.png", "sub/c.png"]
    assert manifest.classes == ("x\n2", "y")


# --- columns and rows ---


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no header line"),
        ("\n\n", "no header line"),
        ("path,label\n", "no rows below the header"),
        ("path,label\n\n , \n", "no rows below the header"),
        ("label\nx\n", "1: no column 'path'; there are: label."),
        ("path\na.png\n", "1: no column 'label'; there are: path."),
        ("path,label,label\na.png,x,y\n", "1: column 'label' is there twice. Rename one of them."),
        ('"path,label\na.png,x\n', "1: not valid CSV"),
        ('path,label\na.png,"x\n', "2: not valid CSV"),
        ("path,label\na.png\n", "2: no label"),
        ("path,label\n,x\n", "2: no path"),
    ],
)
def test_files_without_rows_or_columns(data, text, problem):
    assert problem in problem_of(write(data, text))


def test_many_columns_do_not_fill_the_screen(data):
    assert len(problem_of(write(data, ",".join(f"c{i}" for i in range(10_000)) + "\n"))) < 600


def test_reading_stops_after_a_thousand_bad_rows(data):
    rows = "".join(f"{i}.png,\n" for i in range(5000))
    problem = problem_of(write(data, "path,label\n" + rows))
    assert problem.count("no label") == 5
    assert problem.endswith("and at least 995 more")


def test_equal_rows_count_once_and_contradictions_are_named(data):
    path = write(data, "path,label\na.png,x\n./a.png,x\nsub/../b.png,y\n")
    assert list(load_data(path).paths) == ["a.png", "b.png"]
    path = write(data, "path,label\na.png,x\nb.png,y\nsub/../a.png,y\n")
    assert problem_of(path) == (
        "4: 'a.png' has label 'x' on line 2 and 'y' here. Keep one of the two lines."
    )


def test_a_blank_before_a_quote_does_not_make_the_quotes_a_part_of_the_class(data):
    text = 'path, label\na.png, "x"\nb.png, "y"\n'
    assert problem_of(write(data, text)) == "2: a blank before a quote. Remove it."


def test_a_comma_too_many_at_the_end_is_no_cell(data):
    manifest = load_data(write(data, "path,label\na.png,x,\nb.png,y,,\n"))
    assert (list(manifest.paths), manifest.classes) == (["a.png", "b.png"], ("x", "y"))
    assert problem_of(write(data, "path,label\na.png,x,,z\nb.png,y\n")) == (
        "2: 4 cells, but the header has 2"
    )


# --- paths ---


@pytest.mark.parametrize("path", ["../a.png", "sub/../../a.png", "/etc/passwd", "..", "/", "."])
def test_paths_that_leave_the_root_are_refused(data, path):
    text = f"path,label\n{path},x\na.png,y\n"
    assert f"2: '{path}' lies outside {data}. Set --root." in problem_of(write(data, text))


def test_blanks_around_a_path_are_explained(data):
    assert "Remove the blanks around the path." in problem_of(
        write(data, "label, path\nx, a.png\ny, b.png\n").with_suffix(".csv")
    )


def test_a_link_that_leads_nowhere_is_called_so(data):
    (data / "x.png").symlink_to("gone.png")
    problem = problem_of(write(data, "path,label\nx.png,x\na.png,y\n"))
    assert problem.endswith("2: no such file: x.png, but a link that leads nowhere.")


def test_windows_paths_are_explained(data):
    assert "Write paths with forward slashes." in problem_of(
        write(data, "path,label\nsub\\c.png,x\na.png,y\n")
    )


@pytest.mark.parametrize(
    ("name", "other", "hint"),
    [
        ("Größe.PNG", "größe.png", "größe.png. Did you mean 'Größe.PNG'?"),
        ("More/c.png", "more/C.png", "more/C.png. Did you mean 'More/c.png'?"),
        (
            unicodedata.normalize("NFD", "é.png"),
            unicodedata.normalize("NFC", "é.png"),
            "Its name is there in another Unicode form",
        ),
    ],
)
def test_names_that_only_look_alike_get_a_hint(data, name, other, hint):
    (data / name).parent.mkdir(exist_ok=True)
    (data / name).touch()
    if (data / other).exists():
        pytest.skip("this file system takes the two names for one")
    assert hint in problem_of(write(data, f"path,label\n{other},x\na.png,y\n"))


@pytest.mark.parametrize("name", ["", ".", "..", "a//b", "/a", "a/", "a/../b", "./a"])
def test_paths_that_are_not_inside(name):
    assert not is_inside(name)


@pytest.mark.parametrize("name", ["a", "a/b", "...", "a..b", " ", "a\nb", "=1+1"])
def test_paths_that_are_inside(name):
    assert is_inside(name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "data.csv")
    assert "not a regular file" in problem_of(tmp_path / "data.csv")
    assert "not a regular file" in problem_of(Path(os.devnull))


# --- anything ---

cells = st.one_of(
    st.sampled_from(
        ["a.png", "b.png", "sub/c.png", "../x", "x", "y", "train", "val", "", '"', "\0"]
    ),
    st.text(max_size=5),
)
tables = st.lists(st.lists(cells, min_size=1, max_size=4), max_size=5)


@settings(max_examples=150, deadline=None)
@given(
    header=st.sampled_from(
        ["path,label", "path;label;split", "label,path,label", "\ufeffpath,label"]
    ),
    rows=tables,
    text=st.text(max_size=20),
)
def test_any_text_gives_a_manifest_or_a_data_error(tmp_path_factory, header, rows, text):
    folder = tmp_path_factory.getbasetemp() / "any"
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    for name in ("a.png", "b.png", "sub/c.png"):
        (folder / name).touch()
    lines = [header, *(",".join(row) for row in rows), text]
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    assert_manifest_or_error(write(folder, content))


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=60))
def test_any_bytes_give_a_manifest_or_a_data_error(tmp_path_factory, content):
    assert_manifest_or_error(write(tmp_path_factory.getbasetemp(), content))


def assert_manifest_or_error(path: Path) -> None:
    try:
        manifest = load_data(path)
    except DataError as error:
        problem = str(error)
    else:
        assert all(map(is_inside, manifest.paths))
        return
    assert str(path) in problem
    assert problem.encode("utf-8")  # it can be shown
