from __future__ import annotations

import errno
import os
import unicodedata

import pytest

from elrcli.errors import MOST_PROBLEMS, cannot_be_written, listed, unknown_name


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


def test_a_name_in_another_unicode_form_is_said_to_be():
    composed, apart = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    assert unknown_name("class", apart, [composed, "tea"]) == (
        f"unknown class '{apart}'. It is there in another Unicode form. Rename one of them."
    )


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, "run: cannot be written (No space left on device). Make room there."),
        (errno.EACCES, "run: cannot be written (Permission denied). Check who may write there."),
        (errno.EROFS, "run: cannot be written (Read-only file system). Check who may write there."),
    ],
)
def test_what_cannot_be_written_has_a_remedy(number, expected):
    assert cannot_be_written("run", OSError(number, os.strerror(number))) == expected
