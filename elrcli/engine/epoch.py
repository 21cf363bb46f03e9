"""How far the epoch in progress has come, and what of it a checkpoint keeps."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from elrcli.data.rows import SPLITS
from elrcli.engine.distributed import Group
from elrcli.engine.metrics import EpochTotals
from elrcli.engine.samples import OwnSamples


@dataclass
class PartOfEpoch:
    """How far the epoch in progress has come."""

    before: Tensor  # [n] predicted classes an epoch ago, -1 unknown
    totals: EpochTotals
    started: float = field(default_factory=time.monotonic)  # as if nothing had come between
    batches: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))  # done
    unreadable: int = 0  # images of this process
    is_between_steps: bool = False  # all that is saved belongs to these batches

    @property
    def seconds(self) -> float:
        """How long the epoch has taken so far, without the time between two visits."""
        return time.monotonic() - self.started

    def has_done(self, split: str, batches: int) -> None:
        """Note that so many batches of a split are through, in everything that is saved."""
        self.batches[split] = batches
        self.is_between_steps = True

    def state(
        self, samples: OwnSamples, group: Group, statistics: Sequence[Tensor]
    ) -> dict[str, Any]:
        """Return where the epoch stands; what differs between processes by rank.

        `statistics` of BatchNorm are averaged at the end of an epoch: until then each of several
        processes has its own.
        """
        own = {
            "totals": self.totals.state_dict(),
            "unreadable": self.unreadable,
            "statistics": [tensor.cpu() for tensor in statistics if group.processes > 1],
        }
        return {
            "before": group.whole(self.before, samples.owner),
            "batches": self.batches,
            "seconds": self.seconds,
            "own": group.gather(own),
        }

    @classmethod
    def from_state(
        cls,
        state: Mapping[str, Any],
        samples: OwnSamples,
        group: Group,
        statistics: Sequence[Tensor],
        device: torch.device,
    ) -> PartOfEpoch:
        """Return what `state` told and restore `statistics`; what does not fit raises something."""
        own, count = state["own"][group.rank], len(samples.owner)
        if state["before"].shape != (count,):
            raise ValueError(f"predictions of {len(state['before'])} samples, not {count}")
        totals = EpochTotals(device)
        totals.load_state_dict(own["totals"])
        if group.processes > 1:
            for tensor, saved in zip(statistics, own["statistics"], strict=True):
                tensor.copy_(saved)
        return cls(
            before=state["before"][samples.share.rows].to(device),
            totals=totals,
            started=time.monotonic() - float(state["seconds"]),
            batches={split: int(state["batches"][split]) for split in SPLITS},
            unreadable=int(own["unreadable"]),
        )
