from __future__ import annotations

import pytest

from elrcli.errors import MOST_PROBLEMS, listed


@pytest.mark.parametrize(
    ("problems", "count", "expected"),
    [
        (["a", "b"], None, "a\nb"),
        (["a", "b", "c"], None, "a\nb\nand 1 more"),
        (["a", "b"], 5, "a\nb\nand 3 more"),
        (["a"] * MOST_PROBLEMS, None, "a\na\nand at least 998 more"),
        (["a"] * MOST_PROBLEMS, MOST_PROBLEMS, "a\na\nand 998 more"),
    ],
)
def test_a_message_lists_the_first_problems(problems, count, expected):
    assert listed(problems, count, shown=2) == expected
