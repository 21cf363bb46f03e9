"""Which manifest rows each of several processes works on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Share:
    """The rows of one of `processes`; whatever is kept per sample is kept for these alone."""

    rows: np.ndarray  # [n] int64 manifest rows, ascending
    processes: int = 1

    def places(self, index: Tensor) -> Tensor:
        """Return where manifest rows [B] of this share stand in it, int64 [B], on the CPU."""
        return torch.from_numpy(np.searchsorted(self.rows, index.numpy()))


def deal_rows(labels: np.ndarray, splits: np.ndarray, processes: int, seed: int) -> np.ndarray:
    """Return the process [N] int64 that works on each row, a function of the arguments alone.

    labels and splits [N]. Every class of every split is dealt out evenly, up to one image, and
    so is every split.
    """
    # Three words: another stream than that of any epoch's order or of the two halves.
    shuffled = np.random.default_rng([seed, processes, 1]).permutation(len(labels))
    order = shuffled[np.lexsort((labels[shuffled], splits[shuffled]))]
    owner = np.empty(len(labels), dtype=np.int64)
    place_in_split = np.arange(len(labels)) - np.searchsorted(splits[order], splits[order])
    owner[order] = place_in_split % processes
    return owner
