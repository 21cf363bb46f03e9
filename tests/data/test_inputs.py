from __future__ import annotations

from pathlib import Path

import pytest

from elrcli.data.inputs import ImageInput, expand_inputs
from elrcli.errors import DataError


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def touch(*names):
    from pathlib import Path

    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


def paths(*names, **options):
    return [image.path for image in expand_inputs(names, **options)]


def test_files_stay_in_the_order_given():
    touch("b.png", "a.png")
    assert paths("b.png", "a.png", "b.png") == ["b.png", "a.png", "b.png"]


def test_a_folder_is_searched_and_sorted():
    touch("pics/b.JPG", "pics/sub/c.png", "pics/a.png", "pics/notes.txt", "pics/.hidden.png")
    assert paths("pics") == ["pics/a.png", "pics/b.JPG", "pics/sub/c.png"]
    assert paths("pics/") == paths("pics")


def test_a_pattern():
    touch("x/1.png", "x/y/2.png", "x/y/notes.txt")
    assert paths("x/*.png") == ["x/1.png"]
    assert paths("x/**/*") == ["x/1.png", "x/y/2.png"]


def test_a_file_that_looks_like_a_pattern_is_a_file():
    touch("a[1].png")
    assert paths("a[1].png") == ["a[1].png"]


def test_a_file_named_outright_needs_no_suffix(tmp_path):
    touch("picture")
    assert expand_inputs(["picture"]) == [ImageInput("picture", tmp_path.__class__("picture"))]


def test_a_csv_lists_paths_from_its_folder(tmp_path):
    touch("d/list.csv")
    (tmp_path / "d/list.csv").write_text("label,path\ncat,x/1.png\n\ndog,missing.png\n")
    found = expand_inputs(["d/list.csv"])
    assert [image.path for image in found] == ["x/1.png", "missing.png"]  # as in the CSV
    assert [image.file.as_posix() for image in found] == ["d/x/1.png", "d/missing.png"]


def test_a_csv_with_root_and_another_column(tmp_path):
    (tmp_path / "list.csv").write_text("file\n1.png\n")
    (image,) = expand_inputs(["list.csv"], root=tmp_path / "pics", path_column="file")
    assert image == ("1.png", tmp_path / "pics" / "1.png")


@pytest.mark.parametrize("name", ["pics", "-", "pics/*.png", "pics.csv"])
@pytest.mark.parametrize("options", [{"root": Path("x")}, {"path_column": "file"}])
def test_options_that_only_a_csv_uses(name, options):
    touch("pics/1.png", "pics.csv/1.png")  # the second is a folder, too
    option = "--root" if "root" in options else "--path-column"
    with pytest.raises(DataError, match=f"no CSV file, which {option} needs. Leave it out."):
        expand_inputs([name], stdin=["1.png"], **options)
    Path("list.csv").write_text("file,path\n1.png,1.png\n")
    assert len(expand_inputs([name, "list.csv"], stdin=["1.png"], **options)) == 2


def test_paths_on_stdin():
    lines = ["a.png\n", "\n", "with space.png\r\n", "last.png"]
    assert paths("-", stdin=lines) == ["a.png", "with space.png", "last.png"]


def test_an_image_that_has_gone_does_not_stop_the_others():
    touch("photos/a.jpg")
    names = ["photos/a.jpg", "photos/gone.jpg"]
    assert [image.path for image in expand_inputs(names)] == names
    with pytest.raises(DataError, match=r"photos/gone\.jpg: no such file, folder or pattern"):
        expand_inputs(["photos/gone.jpg"])
    with pytest.raises(DataError, match=r"photos/gone\.jpg: no such file[^*]*\*\.gif: no such"):
        expand_inputs([*names, "*.gif"])


def test_all_that_matches_nothing_is_named_at_once(tmp_path):
    touch("empty/notes.txt")
    (tmp_path / "empty.csv").write_text("path\n")
    with pytest.raises(DataError) as caught:
        expand_inputs(["no.png", "*.gif", "empty", "-", "empty.csv"])
    assert str(caught.value).splitlines() == [
        "no.png: no such file, folder or pattern. Check the path.",
        "*.gif: no such file, folder or pattern. Check the path.",
        "empty: no images in this folder. Check the path.",
        "-: no paths on standard input. Write one path per line.",
        "empty.csv: no rows below the header. Add one row per image.",
    ]


def test_a_csv_without_the_column(tmp_path):
    (tmp_path / "list.csv").write_text("file,label\n1.png,cat\n")
    with pytest.raises(DataError, match=r"list\.csv:1: no column 'path'.*--path-column"):
        expand_inputs(["list.csv"])
