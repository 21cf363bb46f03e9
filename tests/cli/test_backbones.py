from __future__ import annotations

import json


def test_names_one_per_line(elr):
    outcome = elr("backbones", "resnet1*")
    assert outcome.code == 0
    assert "resnet18" in outcome.out.splitlines()
    assert all(name.startswith("resnet1") for name in outcome.out.splitlines())


def test_a_part_of_a_name_is_enough(elr):
    assert "seresnet50" in elr("backbones", "resnet50").out.splitlines()


def test_pretrained_only_as_json(elr):
    names = json.loads(elr("backbones", "resnet10t", "--pretrained", "--json").out)
    assert names
    assert all(name.startswith("resnet10t") for name in names)


def test_no_match_is_an_error(elr):
    outcome = elr("backbones", "nonsense")
    assert outcome.code == 1
    assert outcome.err.startswith("error: nonsense: no backbone has such a name.")
