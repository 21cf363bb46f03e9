from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from elrcli.config import Reading, TrainConfig
from elrcli.data.manifest import Manifest, draw_validation, load_data, manifest_text
from elrcli.data.samples import load_samples
from elrcli.errors import ConfigError
from elrcli.run import RunFolder
from tests.shapes import write_shapes

AUDIT_HEADER = "rank,path,split,label,suggested,score,error_probability,flagged\n"


def make_run(data: Path) -> Path:
    """Write what `elr train data` and `elr audit` leave of a run, without training."""
    manifest = draw_validation(load_data(data), 0.3, seed=0)
    return write_run(Path("run"), manifest, TrainConfig(data=data.absolute()))


def write_run(run: Path, manifest: Manifest, config: TrainConfig) -> Path:
    """Write the files of a run that `elr apply` reads."""
    (run / "audit").mkdir(parents=True)
    settings = config.to_dict()
    content = {"elr": "0.1.0", "settings": settings, "data_root": str(manifest.root)}
    (run / "config.json").write_text(json.dumps(content))
    (run / "classes.json").write_text(json.dumps({"classes": manifest.classes}))
    (run / "manifest.csv").write_text(manifest_text(manifest))
    return run


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run on 4 cats (0, 2, 4, 6) and 4 dogs (1, 3, 5, 7) with a drawn validation split."""
    monkeypatch.chdir(tmp_path)
    write_shapes(Path("data"), per_class=4, classes=("cat", "dog"), size=8)
    run = make_run(Path("data"))
    (run / "audit/audit.csv").write_text(
        AUDIT_HEADER + "1,cat/0004.png,train,cat,dog,0.99,0.97,1\n"
        "2,cat/0000.png,train,cat,dog,0.9,0.96,1\n3,dog/0007.png,val,dog,cat,0.5,0.4,0\n"
    )
    Path("decisions.csv").write_text(
        "path,label,decision,new_label\ncat/0000.png,cat,keep,\ncat/0002.png,cat,relabel,dog\n"
        "dog/0001.png,dog,remove,\n"
    )
    return run


def labels(path: str) -> dict[str, str]:
    return dict(line.split(",") for line in Path(path).read_text().splitlines()[1:])


def test_a_corrected_csv(elr, run):
    outcome = elr("apply", run, "decisions.csv", "--out", "fixed.csv")
    assert outcome.code == 0, outcome.err
    assert outcome.out == "fixed.csv\n"
    assert outcome.err.splitlines() == [
        "decided: 1 keep, 1 relabel, 1 remove",
        "1 labels changed, 1 of 8 samples removed",
        f"  next      elr train fixed.csv --root {Path('data').absolute()}",
    ]
    assert Path("fixed.csv").read_text().startswith("path,label\n")  # a drawn split is not kept
    fixed = labels("fixed.csv")
    assert len(fixed) == 7
    assert (fixed["cat/0000.png"], fixed["cat/0002.png"]) == ("cat", "dog")
    assert "dog/0001.png" not in fixed
    load_data(Path("fixed.csv"), Reading(root=Path("data")))


def test_sure_suggestions_without_a_review(elr, run):
    outcome = elr("apply", run, "-o", "fixed.csv", "--accept-above", 0.95, "-q")
    assert outcome == (0, "fixed.csv\n", "")
    changed = {path for path, label in labels("fixed.csv").items() if not path.startswith(label)}
    assert changed == {"cat/0000.png", "cat/0004.png"}


def test_the_output_of_an_audit_of_images_is_as_good_as_its_run(elr, run):
    Path("checked").mkdir()
    run.rename("checked/run")
    Path("checked/run/audit/audit.csv").rename("checked/audit.csv")
    outcome = elr("apply", "checked", "-o", "fixed.csv", "--accept-above", 0.95, "-q")
    assert outcome == (0, "fixed.csv\n", "")
    assert labels("fixed.csv")["cat/0004.png"] == "dog"


def test_a_decision_wins_over_a_suggestion(elr, run):
    typed = ["--accept-above", 0.95, "--quiet"]
    assert elr("apply", run, "decisions.csv", "-o", "fixed.csv", *typed).code == 0
    assert labels("fixed.csv")["cat/0000.png"] == "cat"  # kept by the review
    assert labels("fixed.csv")["cat/0004.png"] == "dog"


def test_suggestions_for_other_data_are_refused(elr, run):
    Path("run/audit/summary.json").write_text('{"applies_to_run": false}')
    outcome = elr("apply", run, "-o", "fixed.csv", "--accept-above", 0.95)
    assert outcome.code == 1
    assert outcome.err == (
        "error: run/audit: ranks other data than that of the run. Do it again with:"
        " elr audit run --out run/audit\n"
    )
    assert elr("apply", run, "decisions.csv", "-o", "fixed.csv").code == 0
    Path("run/audit/summary.json").write_text(
        json.dumps({"applies_to_run": True, "training": RunFolder(run).training_digest()})
    )
    assert elr("apply", run, "-o", "new.csv", "--accept-above", 0.95).code == 0
    Path("run/metrics.csv").write_text("epoch,loss,seconds\n1,0.7,2.5\n")  # another training
    outcome = elr("apply", run, "-o", "newer.csv", "--accept-above", 0.95)
    assert outcome.code == 1
    assert "run/audit: is of another training, or of an earlier epoch. Do it again" in outcome.err


def test_data_that_has_moved_is_named(elr, run):
    Path("data").rename("moved")
    outcome = elr("apply", run, "decisions.csv", "-o", "fixed.csv")
    assert outcome.code == 1
    assert "data: is gone, the data of the run. Say where it is: --data PATH" in outcome.err
    outcome = elr("apply", run, "decisions.csv", "-o", "fixed.csv", "--data", "moved")
    assert outcome.code == 0, outcome.err
    again = f"elr train fixed.csv --root {Path('moved').absolute()}"
    assert outcome.err.endswith(f"next      {again}\n")
    Path("all.csv").write_text(Path("run/manifest.csv").read_text())
    typed = ["--data", "all.csv", "--root", "moved"]
    assert elr("apply", run, "decisions.csv", "-o", "again.csv", *typed).code == 0
    assert elr("apply", run, "decisions.csv", "-o", "folder", *typed).code == 0
    assert len(list(Path("folder").rglob("*.png"))) == 7


@pytest.mark.parametrize("foreign", [False, True])
def test_true_labels_stay_with_the_corrected_ones(elr, tmp_path, monkeypatch, foreign):
    monkeypatch.chdir(tmp_path)
    write_shapes(Path("data"), per_class=4, classes=("cat", "dog"), size=8)
    names = [f"{'cat' if i % 2 == 0 else 'dog'}/{i:04d}.png" for i in range(8)]
    gold = ["zebra" if foreign else "dog", *(name[:3] for name in names[1:])]
    lines = [f"{name},{name[:3]},{true}" for name, true in zip(names, gold, strict=True)]
    Path("all.csv").write_text("\n".join(["path,label,gold", *lines]))
    reading = Reading(root=Path("data"))
    manifest = load_data(Path("all.csv"), reading, truth_column="gold")
    settings = TrainConfig(data=Path("all.csv").absolute(), root=Path("data"), truth_column="gold")
    write_run(Path("run"), manifest, settings)
    Path("decisions.csv").write_text(
        f"path,label,decision,new_label\n{names[0]},cat,relabel,dog\n{names[2]},cat,remove,\n"
    )
    outcome = elr("apply", "run", "decisions.csv", "-o", "fixed.csv")
    assert outcome.code == 0, outcome.err
    header, first, *rest = Path("fixed.csv").read_text().splitlines()
    assert (header, first) == (
        ("path,label", f"{names[0]},dog") if foreign else ("path,label,gold", f"{names[0]},dog,dog")
    )
    assert len(rest) == 6
    assert outcome.err.rstrip().endswith("--truth-column gold") is not foreign


def test_decisions_on_other_images_are_left_out_when_asked(elr, run):
    with Path("decisions.csv").open("a") as file:
        file.write("cat/gone.png,cat,remove,\n")
    outcome = elr("apply", run, "decisions.csv", "-o", "fixed.csv")
    assert outcome.code == 1
    assert outcome.err.endswith("To leave out what is not of this run: --skip-foreign\n")
    outcome = elr("apply", run, "decisions.csv", "-o", "fixed.csv", "--skip-foreign")
    assert outcome.code == 0
    assert "1 decisions left out: not of this run" in outcome.err
    outcome = elr("apply", run, "-o", "more.csv", "--accept-above", 0.9, "--skip-foreign")
    assert outcome.code == 2
    assert "--skip-foreign: needs a decisions.csv" in outcome.err


def test_removing_everything_is_an_error(elr, run):
    with Path("run/manifest.csv").open() as file:
        rows = [line.split(",")[:2] for line in file.read().splitlines()[1:]]
    Path("decisions.csv").write_text(
        "path,label,decision,new_label\n" + "".join(f"{p},{c},remove,\n" for p, c in rows)
    )
    outcome = elr("apply", run, "decisions.csv", "-o", "fixed.csv")
    assert outcome.code == 1
    assert "decisions.csv: removes every sample" in outcome.err
    assert not Path("fixed.csv").exists()


def test_a_dry_run_prints_the_changes(elr, run):
    before = sorted(Path().rglob("*"))
    outcome = elr("apply", run, "decisions.csv", "--dry-run")
    assert outcome.code == 0
    assert outcome.out.splitlines() == [
        "path,from,to,reason",
        "cat/0002.png,cat,dog,reviewed: relabel",
        "dog/0001.png,dog,,reviewed: remove",
    ]
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("mode", ["copy", "hardlink", "symlink"])
def test_a_corrected_folder(elr, run, mode):
    outcome = elr("apply", run, "decisions.csv", "-o", "fixed", "--mode", mode)
    follow = " --follow-links" if mode == "symlink" else ""
    assert outcome.err.splitlines()[-1] == f"  next      elr train fixed{follow}"
    found = sorted(path.relative_to("fixed").as_posix() for path in Path("fixed").glob("*/*"))
    assert found == [
        "cat/0000.png",
        "cat/0004.png",
        "cat/0006.png",
        "dog/0002.png",
        "dog/0003.png",
        "dog/0005.png",
        "dog/0007.png",
    ]
    assert Path("fixed/dog/0002.png").is_symlink() == (mode == "symlink")
    assert Path("data/cat/0002.png").is_file()  # the user's folder is as it was


def test_images_that_no_folder_shows_are_counted(elr, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = ("cat", ".dog.png", "cat.png", "dog.PNG")
    for path in paths:
        Path(path).touch()
    rows = "".join(f"{path},{path.strip('.')[:3]}\n" for path in paths)
    Path("data.csv").write_text(f"path,label\n{rows}")
    run = make_run(Path("data.csv"))
    Path("decisions.csv").write_text("path,label,decision,new_label\n")
    outcome = elr("apply", run, "decisions.csv", "--out", "fixed")
    assert "2 images will not be found in a folder" in outcome.err
    assert len(load_data(Path("fixed"))) == len(paths) - 2
    outcome = elr("apply", run, "decisions.csv", "--out", "all.csv")
    assert "not be found" not in outcome.err
    assert len(load_data(Path("all.csv"))) == len(paths)


def test_given_splits_are_kept(elr, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_shapes(Path("data/train"), per_class=4, classes=("cat", "dog"), size=8)
    write_shapes(Path("data/test"), per_class=1, classes=("cat", "dog"), size=8, seed=1)
    run = make_run(Path("data"))
    Path("d.csv").write_text("path,label,decision,new_label\ntrain/cat/0002.png,cat,relabel,dog\n")
    assert elr("apply", run, "d.csv", "-o", "fixed.csv").code == 0
    lines = Path("fixed.csv").read_text().splitlines()
    assert lines[0] == "path,label,split"
    assert "train/cat/0002.png,dog,train" in lines
    assert {line.split(",")[2] for line in lines[1:]} == {"train", "test"}  # val was drawn


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ([], "nothing to apply. Name a decisions.csv, or give --accept-above."),
        (["decisions.csv"], "no place to write to. Give --out, or --dry-run to look first."),
        (["decisions.csv", "-o", "a.csv", "--mode", "copy"], "--mode: only an --out that is a"),
        (["decisions.csv", "--dry-run", "--mode", "copy"], "--mode: only an --out that is a"),
    ],
)
def test_what_is_missing_or_would_be_ignored_is_named(elr, run, typed, message):
    outcome = elr("apply", run, *typed)
    assert outcome.code == 2
    assert message in outcome.err


def from_table(run: Path, **settings: object) -> None:
    """Let the run be one on `labels.csv`, which lists its images."""
    file = run / "config.json"
    content = json.loads(file.read_text())
    content["settings"] |= {"data": str(Path("labels.csv").absolute()), "root": "data", **settings}
    file.write_text(json.dumps(content))
    rows = (f"{p.parent.name}/{p.name},{p.parent.name}\n" for p in sorted(Path("data").glob("*/*")))
    columns = [settings.get("path_column", "path"), settings.get("label_column", "label")]
    Path("labels.csv").write_text(f"{','.join(columns)}\n" + "".join(rows))


@pytest.mark.parametrize("is_table", [False, True])
def test_samples_that_are_gone_are_named_unless_they_are_removed(elr, run, is_table):
    if is_table:
        from_table(run)
    Path("data/dog/0001.png").unlink()  # decided: remove
    outcome = elr("apply", run, "decisions.csv", "-o", "fixed.csv", "-q")
    assert outcome == (0, "fixed.csv\n", "")
    assert "dog/0001.png" not in labels("fixed.csv")
    assert elr("apply", run, "decisions.csv", "-o", "folder", "-q").code == 0
    Path("data/dog/0003.png").unlink()
    outcome = elr("apply", run, "decisions.csv", "-o", "new.csv")
    assert outcome.code == 1
    message = "1 samples of the run are gone. Bring them back, or decide 'remove' for them:\n"
    assert outcome.err.endswith(message + "'dog/0003.png'\n")


def test_an_image_that_became_a_broken_link_counts_as_gone(elr, run):
    Path("data/dog/0003.png").unlink()
    Path("data/dog/0003.png").symlink_to("nowhere.png")
    outcome = elr("apply", run, "decisions.csv", "-o", "new.csv")
    assert outcome.code == 1
    assert outcome.err.endswith("'dog/0003.png'\n")
    assert not Path("new.csv").exists()


def test_labels_that_changed_since_the_training_are_named(elr, run):
    from_table(run)
    table = Path("labels.csv")
    table.write_text(table.read_text().replace("cat/0006.png,cat", "cat/0006.png,cow"))
    outcome = elr("apply", run, "decisions.csv", "-o", "fixed.csv")
    assert outcome.code == 1
    assert "labels.csv: 1 labels are others than in the run. Put these back" in outcome.err
    assert outcome.err.endswith("'cat/0006.png': 'cat', now 'cow'\n")
    assert not Path("fixed.csv").exists()


def test_images_that_were_added_are_counted(elr, run):
    write_shapes(Path("data"), per_class=1, classes=("horse",), size=8)
    outcome = elr("apply", run, "decisions.csv", "-o", "fixed.csv")
    assert "1 images came to the data after the training: not in the output\n" in outcome.err
    assert len(labels("fixed.csv")) == 7


def read_back(elr, monkeypatch, command: str) -> Manifest:
    """Run the command that `elr apply` prints, up to the data that it reads."""
    configs = []

    def fit(config, *_, **__):
        configs.append(config)
        raise ConfigError("read")

    monkeypatch.setattr("elrcli.engine.fit.fit", fit)
    words = shlex.split(command.removeprefix("  next "))
    assert words.pop(0) == "elr"
    assert elr(*words).err == "error: read\n"
    return load_samples(configs[0])


@pytest.mark.parametrize(
    "typed", [["fixed.csv"], ["my fixed"], ["fixed", "--mode", "symlink"]], ids=" ".join
)
@pytest.mark.parametrize(
    "settings", [None, {}, {"path_column": "file", "label_column": "the kind"}], ids=str
)
def test_the_command_that_comes_next_reads_the_output(elr, run, monkeypatch, typed, settings):
    if settings is not None:
        from_table(run, **settings)
    outcome = elr("apply", run, "decisions.csv", "-o", *typed)
    assert outcome.code == 0, outcome.err
    manifest = read_back(elr, monkeypatch, outcome.err.splitlines()[-1])
    assert len(manifest) == 7
    assert np.bincount(manifest.labels).tolist() == [3, 4]


def test_the_command_that_comes_next_follows_links_where_the_run_did(elr, run, monkeypatch):
    Path("data/cat/0004.png").rename("elsewhere.png")
    Path("data/cat/0004.png").symlink_to(Path("elsewhere.png").absolute())
    from_table(run, follow_links=True)
    outcome = elr("apply", run, "decisions.csv", "-o", "fixed.csv")
    command = outcome.err.splitlines()[-1]
    assert command.endswith(" --follow-links")
    assert len(read_back(elr, monkeypatch, command)) == 7


@pytest.mark.parametrize("suffix", ["tsv", "json", "jsonl", "parquet"])
def test_other_tables_are_no_folders(elr, run, suffix):
    outcome = elr("apply", run, "decisions.csv", "-o", f"fixed.{suffix}", "--dry-run")
    assert outcome.code == 1
    assert outcome.err.endswith(
        f"fixed.{suffix}: a table is written as CSV only. End its name in .csv.\n"
    )


@pytest.mark.parametrize("name", ["fixed.csv", "fixed"])
def test_a_dry_run_looks_whether_the_place_is_free(elr, run, name):
    assert elr("apply", run, "decisions.csv", "-o", name, "--dry-run", "-q").code == 0
    assert elr("apply", run, "decisions.csv", "-o", name, "-q").code == 0
    outcome = elr("apply", run, "decisions.csv", "-o", name, "--dry-run", "-q")
    assert outcome.code == 1
    assert f"{name}: exists" in outcome.err


def test_a_class_that_loses_all_its_samples_is_named(elr, run):
    rows = "".join(f"cat/000{n}.png,cat,remove,\n" for n in (0, 2, 4, 6))
    Path("d.csv").write_text("path,label,decision,new_label\n" + rows)
    assert "no samples are left in: cat" in elr("apply", run, "d.csv", "--dry-run").err
