from __future__ import annotations

from xml.etree import ElementTree

import pytest

from elrcli.plots import curves_svg


def texts(svg: str) -> list[str]:
    """Return the labels of a picture: matplotlib leaves them as comments beside the glyphs."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    root = ElementTree.fromstring(svg, parser)
    return [node.text.strip() for node in root.iter() if node.tag is ElementTree.Comment]


ROW = {"epoch": 1.0, "loss": 0.9, "loss_ce": 1.0, "loss_elr": -0.1, "train_agreement": 0.5}
TRUTH = {"clean_right": 0.9, "clean_other": 0.1, "wrong_right": 0.7, "wrong_memorised": 0.2}


@pytest.mark.parametrize("epochs", [0, 1, 2, 12])
def test_the_picture_is_valid_and_has_three_panels(epochs):
    found = texts(curves_svg([{**ROW, "epoch": n + 1} for n in range(epochs)]))
    changed = "Changed predictions, time waiting"
    for title in ("Loss", "Agreement with the given labels", changed):
        assert title in found
    assert ("given labels" in found) == (epochs > 0)
    assert "memorised" not in found


def test_only_what_was_measured_is_drawn():
    found = texts(curves_svg([{**ROW, "val_loss": None}]))
    assert "ELR term" in found
    assert "validation" not in found


def test_true_labels_add_the_memorisation_panels():
    found = texts(curves_svg([{**ROW, **TRUTH, "val_accuracy_true": 0.8}]))
    for title in ("Correctly labelled images: predictions", "Wrongly labelled images: predictions"):
        assert title in found
    assert [text for text in found if "memorised" in text] == ["memorised 20%"]
    assert "right 90%" in found
    assert "Accuracy against the true labels" in found


def test_a_column_may_start_late():
    assert curves_svg([ROW, {**ROW, "epoch": 2.0, "changed": 0.25}]).startswith("<?xml")


def test_a_loss_without_the_elr_term_is_one_line():
    found = texts(curves_svg([{**ROW, "loss": 1.0, "loss_elr": 0.0}]))
    assert "given labels" in found
    assert not {"ELR term", "sum"} & set(found)


def test_true_labels_without_a_wrong_one_have_their_panels():
    found = texts(curves_svg([{**ROW, "clean_right": 0.9, "val_accuracy_true": 0.8}]))
    assert "right 90%" in found
    assert "Accuracy against the true labels" in found
