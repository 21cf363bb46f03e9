"""Files from a stranger: refused or used, but nothing is run, hung, blown up or led astray."""

from __future__ import annotations

import csv
import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elrcli import files
from elrcli.api import apply_decisions, make_noise
from elrcli.audit.apply import is_folder_name, plan_corrections, write_csv, write_folder
from elrcli.audit.decisions import DECISIONS, read_decisions, read_suggestions
from elrcli.audit.run import audit_run
from elrcli.config import Reading, TrainConfig, read_toml
from elrcli.data.manifest import Manifest, StringTable, load_data, manifest_text
from elrcli.engine.checkpoints import load_checkpoint, save_checkpoint, take_snapshot
from elrcli.engine.fit import fit, resume
from elrcli.engine.predict import Predictor
from elrcli.errors import ConfigError, DataError, ElrError, ModelError, RunError
from elrcli.files import json_text, write_text
from elrcli.run import RunFolder
from elrcli.tables import write_table
from elrcli.weights import read_state_dict
from tests.engine.conftest import TINY
from tests.shapes import write_shapes

FORMULA = '=HYPERLINK("http://example.com","x")'


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> RunFolder:
    """A finished run. Shared: leave as it is."""
    folder = tmp_path_factory.mktemp("stranger")
    write_shapes(folder / "data", per_class=4)
    return fit(TrainConfig(data=folder / "data", **TINY | {"epochs": 1}), folder / "run")


@pytest.fixture
def run(finished, tmp_path) -> RunFolder:
    """A copy of the run to tamper with."""
    copy = RunFolder(tmp_path / "run")
    for file in finished.path.rglob("*"):
        if file.is_file():
            place = copy.path / file.relative_to(finished.path)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(file.read_bytes())
    return copy


def change_config(run: RunFolder, **settings: object) -> None:
    content = run.config()
    content["settings"] |= settings
    write_text(run.config_file, json_text(content))


def every_use(run: RunFolder) -> list[Callable[[], object]]:
    """Return what a person may do with a run."""
    return [
        lambda: Predictor.load(run.path),
        lambda: resume(run.path),
        lambda: audit_run(run.path, report=False),
        lambda: apply_decisions(run.path, accept_above=0.9, dry_run=True),
    ]


# --- run folders ---


@pytest.mark.parametrize("name", ["config.json", "classes.json"])
def test_huge_settings_are_refused_before_they_are_read(run, name, monkeypatch):
    monkeypatch.setattr(files, "LARGEST_FILE", 10_000)
    (run.path / name).write_text('{"classes": [' + "0," * 10_000 + "0]}")
    for use in every_use(run):
        with pytest.raises(RunError, match=f"{name}: 20,0.. bytes, too large"):
            use()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
@pytest.mark.parametrize(
    "name", ["config.json", "classes.json", "manifest.csv", "features.safetensors"]
)
def test_pipes_are_not_waited_for(run, name):
    (run.path / name).unlink()
    os.mkfifo(run.path / name)
    for use in every_use(run):
        try:
            use()
        except ElrError as error:
            assert name in str(error)  # noqa: PT017


def test_a_pipe_of_settings_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "settings.toml")
    with pytest.raises(ConfigError, match="not a regular file"):
        read_toml(tmp_path / "settings.toml")


@pytest.mark.parametrize("name", ["audit", "checkpoint", "cache", "export", "tensorboard"])
def test_nothing_is_written_through_links_in_a_run(run, tmp_path, name):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "000000.safetensors").write_text("mine")
    if (run.path / name).exists():
        (run.path / name).rename(tmp_path / "moved")
    (run.path / name).symlink_to(elsewhere)
    for use in every_use(run):
        with pytest.raises(RunError, match=f"{name}: a link. Put the folder itself"):
            use()
    assert os.listdir(elsewhere) == ["000000.safetensors"]


@pytest.mark.parametrize(
    "classes", [["cat", "cat", "dog"], ["cat", "\ud800", "dog"], ["a", "b\0", "c"]]
)
def test_classes_must_be_distinct_text(run, classes):
    run.classes_file.write_text(json.dumps({"classes": classes}))
    with pytest.raises(RunError, match=r"classes\.json: class '.*' is there twice or no text"):
        run.classes()


def test_more_classes_than_the_model_has_take_no_memory(run):
    names = [f"class {i}" for i in range(200_000)]  # a head of 400 MB in this network
    run.classes_file.write_text(json.dumps({"classes": names}))
    with pytest.raises(ModelError, match="weights do not fit 200,000 classes"):
        Predictor.load(run.path)


@pytest.mark.parametrize("what", ["samples", "classes", "epochs"])
def test_tables_larger_than_the_checkpoint_take_no_memory(run, what):
    if what == "samples":
        rows = "".join(f"z/{i:06d}.png,circle,train\n" for i in range(100_000))
        run.manifest_file.write_text(run.manifest_file.read_text() + rows)
    elif what == "classes":
        names = [*run.classes(), *(f"class {i}" for i in range(100_000))]
        run.classes_file.write_text(json.dumps({"classes": names}))
    else:
        change_config(run, epochs=10_000)
    with pytest.raises(RunError, match="checkpoint: does not fit the run"):
        resume(run.path)
    if what != "epochs":
        with pytest.raises(RunError, match="does not fit the manifest"):
            audit_run(run.path)


def test_a_manifest_cannot_lead_out_of_its_root(run):
    text = run.manifest_file.read_text().replace("circle/0000.png", "../../etc/passwd")
    run.manifest_file.write_text(text)
    with pytest.raises(RunError, match=r"manifest\.csv: damaged \(path '../../etc/passwd'\)"):
        run.manifest()


def test_a_picture_of_curves_that_is_no_text_does_no_harm(run):
    run.curves_file.write_bytes(b"\xff\xfe<svg>")
    assert len(audit_run(run.path)) > 0


@pytest.mark.parametrize("made", ["link", "dangling", "pipe"])
def test_a_lock_is_a_file_of_its_own(run, tmp_path, made):
    victim = tmp_path / "victim"
    if made != "dangling":
        victim.write_text("precious")
    run.lock_file.unlink()
    if made == "pipe":
        os.mkfifo(run.lock_file)
    else:
        run.lock_file.symlink_to(victim)
    for use in (
        lambda: resume(run.path),
        lambda: fit(run.train_config(), run.path, overwrite=True),
    ):
        with pytest.raises(RunError, match=r"lock: not a file of its own.*Remove it\."):
            use()
    assert victim.exists() == (made != "dangling")
    assert made == "dangling" or victim.read_text() == "precious"


@pytest.mark.parametrize("made", ["link", "huge"])
def test_only_curves_of_the_run_are_shown(run, tmp_path, made):
    secret = tmp_path / "secret"
    secret.write_text("TOKEN-123")
    run.curves_file.unlink()
    if made == "link":
        run.curves_file.symlink_to(secret)
    else:
        with run.curves_file.open("wb") as file:
            file.truncate(2**33)
    assert run.curves() is None
    audit_run(run.path)
    assert "svg+xml;base64" not in (run.audit_folder / "report.html").read_text()


def test_settings_that_no_terminal_can_show_are_refused(run):
    content = run.config()
    content["settings"]["backbone"] = "\ud800\x1b[2J"
    run.config_file.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="no such backbone"):
        Predictor.load(run.path)


# --- weights ---


@pytest.mark.filterwarnings("ignore:Validating sparse", "ignore:torch.quant", "ignore:TypedStorage")
@pytest.mark.parametrize(
    "make",
    [
        lambda: {1: torch.zeros(2)},
        lambda: {"w": torch.zeros(2, 2).to_sparse()},
        lambda: {"w": torch.zeros(2, device="meta")},
        lambda: {"w": torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8)},
    ],
    ids=["number as name", "sparse", "without content", "quantised"],
)
def test_tensors_that_no_network_takes_are_refused(tmp_path, make):
    torch.save(make(), tmp_path / "w.pth")
    with pytest.raises(
        ModelError, match=r"w\.pth: holds (no state dict|sparse, quantised or empty)"
    ):
        read_state_dict(tmp_path / "w.pth")


def test_a_compressed_archive_of_weights_is_refused(tmp_path):
    """Torch would unpack a thousand times the size of the file."""
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(1_000_000)}, buffer)
    with zipfile.ZipFile(buffer) as plain, zipfile.ZipFile(tmp_path / "w.pth", "w") as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "w.pth").stat().st_size < 10_000
    with pytest.raises(ModelError, match="a compressed archive"):
        read_state_dict(tmp_path / "w.pth")


def test_old_weight_files_that_claim_too_much_are_refused(tmp_path):
    torch.save({"w": torch.zeros(77_777)}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "w.pth").read_bytes()
    count = (77_777).to_bytes(4, "little")
    assert content.count(b"J" + count) >= 1  # BININT
    claim = content.replace(b"J" + count, b"\x8a\x06" + (10**13).to_bytes(6, "little"))
    (tmp_path / "w.pth").write_bytes(claim)
    with pytest.raises(ModelError, match=r"not a readable state dict|refused"):
        read_state_dict(tmp_path / "w.pth")


def test_a_tensor_of_one_number_and_a_huge_shape_takes_no_memory(tmp_path, run):
    torch.save({"conv1.0.weight": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "w.pth")
    assert read_state_dict(tmp_path / "w.pth")["conv1.0.weight"].stride() == (0, 0)


def test_a_checkpoint_holds_no_pickle(run):
    """Whatever is in its header is JSON; a class name there stays text."""
    state = load_checkpoint(run.checkpoint_folder)
    state["method"]["loss.targets"] = "cos\nsystem\n(S'touch proof'\ntR."
    save_checkpoint(run.checkpoint_folder, 1, take_snapshot(state))
    change_config(run, epochs=1)
    with pytest.raises(RunError, match="does not fit the run"):
        resume(run.path)


def test_a_model_file_with_other_tensors_is_refused(run):
    tensors = safetensors.torch.load_file(run.model_file)
    tensors["fc.weight"] = torch.zeros(3, 7)
    safetensors.torch.save_file(tensors, run.model_file)
    with pytest.raises(ModelError, match="weights do not fit the backbone"):
        Predictor.load(run.path)


# --- decisions and suggestions ---


def small_manifest(root: Path, names: list[str], classes: tuple[str, ...]) -> Manifest:
    return Manifest(
        root=root,
        paths=StringTable(sorted(names)),
        labels=np.array([i % len(classes) for i in range(len(names))], dtype=np.int32),
        splits=np.zeros(len(names), dtype=np.int8),
        classes=classes,
    )


MANIFEST = small_manifest(Path("/data"), ["a.png", "b.png", 'c "1",\n.png'], ("cat", "dog"))
CELLS = st.sampled_from([*MANIFEST.paths, *MANIFEST.classes, *DECISIONS, "", "\0", '"', "../a"])


@settings(max_examples=150, deadline=None)
@given(
    header=st.sampled_from(
        ["path,label,decision,new_label", "path;label;decision;new_label", "path,label", ""]
    ),
    rows=st.lists(st.lists(st.one_of(CELLS, st.text(max_size=4)), max_size=5), max_size=5),
)
def test_any_decisions_are_read_or_refused(tmp_path_factory, header, rows):
    path = tmp_path_factory.getbasetemp() / "decisions.csv"
    lines = [header, *(",".join(row) for row in rows)]
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    try:
        decided, _ = read_decisions(path, MANIFEST)
    except DataError as error:
        problem = str(error)
    else:
        assert all(decision.decision in DECISIONS for decision in decided.values())
        return
    assert str(path) in problem


@settings(max_examples=50, deadline=None)
@given(
    choices=st.lists(
        st.sampled_from([*DECISIONS, None]), min_size=len(MANIFEST), max_size=len(MANIFEST)
    )
)
def test_written_decisions_read_back(tmp_path_factory, choices):
    path = tmp_path_factory.getbasetemp() / "written.csv"
    rows = [
        {
            "path": MANIFEST.paths[row],
            "label": MANIFEST.classes[MANIFEST.labels[row]],
            "decision": choice,
            "new_label": MANIFEST.classes[MANIFEST.labels[row] - 1] if choice == "relabel" else "",
        }
        for row, choice in enumerate(choices)
        if choice is not None
    ]
    write_table(path, ("path", "label", "decision", "new_label"), rows)
    decided, _ = read_decisions(path, MANIFEST)
    found = {row: decision.decision for row, decision in decided.items()}
    assert found == {row: choice for row, choice in enumerate(choices) if choice is not None}


@pytest.mark.parametrize("value", ["1.5", "-1", "inf", "nan", "1e999", "0x1", "half"])
def test_probabilities_beyond_one_are_not_believed(tmp_path, value):
    path = tmp_path / "audit.csv"
    path.write_text(f"path,label,suggested,error_probability\na.png,cat,dog,{value}\n")
    with pytest.raises(DataError, match=r"audit\.csv:2: not of this run"):
        read_suggestions(path, MANIFEST)
    path.write_text("path,label,suggested,error_probability\na.png,cat,dog,\n")
    assert np.isnan(read_suggestions(path, MANIFEST)[0].error_probability)


@pytest.mark.parametrize(
    "path", ["../a.png", "/d/a.png", "b/../../a.png", "C:\\a.png", "..\\a.png", "A.png"]
)
def test_decisions_reach_only_paths_of_the_run(tmp_path, path):
    file = tmp_path / "decisions.csv"
    file.write_text(f"path,label,decision,new_label\n{path},cat,remove,\n")
    with pytest.raises(DataError, match=r"decisions\.csv:2: .* is not a path of this run"):
        read_decisions(file, MANIFEST)


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    file = tmp_path / "decisions.csv"
    file.write_text("path,label,decision,new_label,label\na.png,cat,keep,,dog\n")
    with pytest.raises(DataError, match="column 'label' is there twice"):
        read_decisions(file, MANIFEST)


# --- where files go ---


@pytest.mark.parametrize("name", ["cat", "a b", "naïve", "=1", "C:", "a<b", "end."])
def test_other_names_are_folders(name):
    assert is_folder_name(name)


@pytest.mark.parametrize("name", ["..", "a/b", "..\\x", "\\\\server\\x", "", ".ssh"])
def test_names_that_lead_elsewhere_are_no_folders_anywhere(name):
    assert not is_folder_name(name)


@pytest.mark.parametrize("pair", [("Cat", "cat"), ("é", "e\u0301")])
def test_classes_that_may_be_one_folder_are_refused(tmp_path, pair):
    manifest = small_manifest(tmp_path, ["a.png", "b.png"], pair)
    for name in manifest.paths:
        (tmp_path / name).touch()
    with pytest.raises(DataError, match="may be one folder"):
        write_folder(
            plan_corrections(manifest, None), tmp_path / "out", mode="copy", with_split=False
        )
    assert not (tmp_path / "out").exists()


def test_formulas_are_written_as_they_are_and_read_back(tmp_path):
    """A cell that a spreadsheet would calculate is the name of a class here, and stays it."""
    names = ["=1+1.png", "+a.png", "-b.png", "@c.png", "\td.png"]
    manifest = small_manifest(tmp_path / "data", names, (FORMULA, "@SUM(A1)"))
    (tmp_path / "data").mkdir()
    for name in names:
        (tmp_path / "data" / name).touch()
    write_csv(
        plan_corrections(manifest, None), tmp_path / "corrected.csv", Reading(split_column=None)
    )
    again = load_data(
        tmp_path / "corrected.csv", Reading(root=tmp_path / "data"), classes=manifest.classes
    )
    assert manifest_text(again) == manifest_text(manifest)
    with (tmp_path / "corrected.csv").open(newline="") as file:
        assert sorted({row[1] for row in list(csv.reader(file))[1:]}) == [FORMULA, "@SUM(A1)"]


def test_links_are_followed_only_when_asked_for_and_copied_as_what_they_lead_to(tmp_path):
    """A link in the data was put there by whoever made the data: see docs/threats.md."""
    (tmp_path / "private.png").write_bytes(b"secret")
    for name in ("cat/a.png", "dog/b.png"):
        (tmp_path / "data" / name).parent.mkdir(parents=True)
        (tmp_path / "data" / name).touch()
    (tmp_path / "data/dog/link.png").symlink_to(tmp_path / "private.png")
    with pytest.raises(DataError, match=r"link\.png: a link to"):
        load_data(tmp_path / "data")
    manifest = load_data(tmp_path / "data", Reading(follow_links=True))
    assert list(manifest.paths) == ["cat/a.png", "dog/b.png", "dog/link.png"]
    write_folder(plan_corrections(manifest, None), tmp_path / "out", mode="copy", with_split=False)
    assert (tmp_path / "out/dog/link.png").read_bytes() == b"secret"
    assert not (tmp_path / "out/dog/link.png").is_symlink()


# --- the matrix of `elr noise` ---


@pytest.mark.parametrize("line", ["nan,1,0", "inf,0,0", "1,0," + "0" * 200_000])
def test_a_matrix_must_hold_probabilities(tmp_path, line):
    write_shapes(tmp_path / "data", per_class=1)
    (tmp_path / "m.csv").write_text(f"{line}\n1,0,0\n1,0,0\n")
    with pytest.raises(DataError, match=r"m\.csv:(1| cannot be read)"):
        make_noise(tmp_path / "data", tmp_path / "n.csv", kind="matrix", matrix=tmp_path / "m.csv")
