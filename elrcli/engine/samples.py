"""What a process knows of the samples that it works on."""

from __future__ import annotations

import numpy as np
import torch

from elrcli.data.manifest import Manifest
from elrcli.data.rows import SPLITS
from elrcli.data.shares import Share, deal_rows
from elrcli.engine.distributed import Group


class OwnSamples:
    """The n samples of this process, with labels on the device and the place of each in tables.

    Places are not manifest rows: several processes have a share of the N rows each.
    """

    def __init__(
        self, manifest: Manifest, group: Group, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        self.owner = deal_rows(manifest.labels, manifest.splits, group.processes, seed)  # [N]
        self.share = Share(np.flatnonzero(self.owner == group.rank), group.processes)
        rows = self.share.rows

        def on_device(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(values.astype(np.int64)).to(device)

        self.labels = on_device(manifest.labels[rows])  # [n] as given
        self.truth = None if manifest.truth is None else on_device(manifest.truth[rows])  # [n]
        self.places = {
            split: on_device(np.flatnonzero(manifest.splits[rows] == code))
            for code, split in enumerate(SPLITS)
        }
