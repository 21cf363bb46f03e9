"""The faults that `bench/mutation.py` plants."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def faulty(monkeypatch):
    """Return every faulty version of a module, by the name of the fault."""
    monkeypatch.syspath_prepend(BENCH)
    from faults import faults

    def versions(source: str) -> dict[str, str]:
        found = {}
        for number, fault in enumerate(faults(ast.parse(source))):
            tree = ast.parse(source)
            faults(tree)[number].plant()
            found[fault.name] = ast.unparse(ast.fix_missing_locations(tree))
        return found

    return versions


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("x = a < b", {"x = a <= b"}),
        ("x = a + 1", {"x = a - 1", "x = a + 2"}),
        ("x = a and (not b)", {"x = a or not b", "x = a and b"}),
        ("x = True", {"x = False"}),
        ("x = 'val'", {"x = 'valx'"}),
        ("x = a.strip()", {"x = a"}),
        ("x = [a for a in b if a]", {"x = [a for a in b if not a]"}),
        ("x = b if a else c", {"x = b if not a else c"}),
        ("x[0] = a", {"x[1] = a", "pass"}),
        ("f(a)", {"pass"}),
    ],
)
def test_faults_of_a_statement(faulty, source, wanted):
    assert set(faulty(source).values()) == wanted


def test_faults_of_a_function(faulty):
    source = "@cached\ndef f(a):\n    if a:\n        raise E\n    return a"
    assert set(faulty(source)) == {
        "1: cached -> nothing",
        "3: a -> not a",
        "4: raise E -> pass",
        "5: a -> None",
    }


@pytest.mark.parametrize(
    "source",
    [
        '"""A docstring."""',
        "x: int",
        "def f(a: 'int') -> 'int': ...",
        "x = 'a text for people'",
        "x = f'{a} of {b}'",
        "@overload\ndef f(a=1): ...",
    ],
)
def test_what_is_for_people_or_for_types_stays(faulty, source):
    assert faulty(source) == {}


def test_a_fault_knows_the_lines_of_its_statement(faulty):
    from faults import faults

    tree = ast.parse("if a:\n    f(\n        1,\n    )")
    assert {fault.name: list(fault.lines) for fault in faults(tree)} == {
        "1: a -> not a": [1],
        "2: f(1) -> pass": [2, 3, 4],
        "3: 1 -> 2": [2, 3, 4],
    }
