"""Images that training met and could not read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from elrcli.data.manifest import Manifest
from elrcli.engine.distributed import Group
from elrcli.errors import legible


class UnreadableImages:
    """Why images could not be read, by manifest row, and whether they are too many to go on.

    `most` is the largest share of training images that may be missing.
    """

    def __init__(self, manifest: Manifest, most: float) -> None:
        self._manifest = manifest
        self._most = most
        self._reasons: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._reasons)

    def add(self, found: Iterable[tuple[int, str]]) -> None:
        """Take over rows with the reason of each; a row that is known has the newest."""
        self._reasons.update(found)

    def share(self, group: Group) -> None:
        """Let every process know what all have met."""
        for found in group.gather(self._reasons):
            self.add(found.items())

    def table(self) -> list[Mapping[str, str]]:
        """Return `path` and `reason` of each, by row."""
        paths = self._manifest.paths
        return [{"path": paths[row], "reason": self._reasons[row]} for row in sorted(self._reasons)]

    def state(self) -> list[tuple[int, str]]:
        """Return what `load_state` takes."""
        return list(self._reasons.items())

    def load_state(self, state: Iterable[tuple[int, str]]) -> None:
        """Know what `state` told, and nothing else; an unknown row raises IndexError."""
        rows = range(len(self._manifest))
        self._reasons = {rows[row]: str(reason) for row, reason in state}

    def too_many(self, unreadable: int, images: int, listed_in: Path) -> str | None:
        """Return problem and remedy if so many training `images` of an epoch cannot be read."""
        if not too_many_unreadable(unreadable, images, self._most):
            return None
        return (
            f"{self._manifest.root}: {unreadable:,} or more of {images:,} training images cannot be"
            f" read; --max-unreadable is {self._most:g}. {self._first()}. Mend or remove what"
            f" {listed_in} lists, or allow more."
        )

    def nothing_readable(self) -> str:
        """Return the problem if no training image can be read at all."""
        return f"{self._manifest.root}: no training image can be read. {self._first()}."

    def _first(self) -> str:
        manifest = self._manifest
        row = next(row for row in manifest.rows("train").tolist() if row in self._reasons)
        return f"{legible(manifest.paths[row])}: {self._reasons[row]}"


def too_many_unreadable(unreadable: int, images: int, share: float) -> bool:
    """Tell whether more than a `share` of the images cannot be read; one alone is never too many.

    A share of 0 allows none at all.
    """
    return unreadable > share * images and (unreadable > 1 or share == 0.0)
