"""What a folder or a CSV file lists, before it is a `Manifest`."""

from __future__ import annotations

import sys
from array import array
from dataclasses import dataclass, field

import numpy as np

from elrcli.errors import legible

SPLITS = ("train", "val", "test")
SPLIT_CODES = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "test": 2}


@dataclass
class Rows:
    """What the data lists, as lists and arrays: ten million rows fit into memory."""

    paths: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)  # one string for each class
    splits: array[int] = field(default_factory=lambda: array("b"))  # codes
    truths: list[str] = field(default_factory=list)  # empty without true labels
    lines: array[int] = field(default_factory=lambda: array("I"))  # of a CSV file

    def add(self, path: str, label: str, split: int, truth: str | None, line: int) -> None:
        """Append a sample that `line` of the file describes."""
        self.paths.append(path)
        self.labels.append(sys.intern(label))
        self.splits.append(split)
        if truth is not None:
            self.truths.append(sys.intern(truth))
        self.lines.append(line)

    def order(self) -> np.ndarray:
        """Return the rows sorted by path, those of one path as they come, int64 [N]."""
        return np.argsort(np.array(self.paths, dtype=object), kind="stable")

    def distinct(self) -> tuple[np.ndarray, dict[int, str]]:
        """Return the rows with a path that no row before has, sorted by path, and conflicts.

        A conflict is what a later row of the same path says otherwise, by line.
        """
        order = self.order()
        conflicts = {}
        is_first = np.ones(len(order), dtype=bool)
        first = 0
        for place, row in enumerate(map(int, order)):
            if place > 0 and self.paths[row] == self.paths[first]:
                is_first[place] = False
                if problem := self._conflict(first, row):
                    conflicts[self.lines[row]] = problem
            else:
                first = row
        return order[is_first], conflicts

    def _conflict(self, first: int, row: int) -> str | None:
        splits = [SPLITS[code] for code in (self.splits[first], self.splits[row])]
        for what, one, other in (
            ("label", self.labels[first], self.labels[row]),
            ("split", *splits),
            ("true label", *((self.truths[first], self.truths[row]) if self.truths else ("", ""))),
        ):
            if one != other:
                return (
                    f"'{legible(self.paths[row])}' has {what} '{legible(one)}' on line"
                    f" {self.lines[first]} and '{legible(other)}' here. Keep one of the two lines."
                )
        return None


def is_inside(path: str) -> bool:
    """Tell whether a path with forward slashes stays below the folder that it starts from."""
    return {"", ".", ".."}.isdisjoint(path.split("/"))
