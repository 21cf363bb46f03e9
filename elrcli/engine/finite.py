"""Steps whose numbers are not finite: left out on the device, told to the host now and then."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

STEPS_BETWEEN_LOOKS = 100  # a look waits for the device
WHAT = ("loss", "gradient", "prediction")
NEVER = torch.iinfo(torch.int64).max


class BadBatch(NamedTuple):
    """The first batch of a process after which not all numbers are finite."""

    what: str  # one of WHAT
    number: int  # of the batch in its epoch
    rows: list[int]  # in the manifest


class FiniteWatch:
    """Notes on the device which loss, gradient and prediction were first not to be finite."""

    def __init__(self, device: torch.device) -> None:
        self._first = torch.full((len(WHAT),), NEVER, device=device)  # batch of each of WHAT
        self._batches: list[tuple[int, Tensor]] = []  # (number, rows) since the last look

    def loss(self, loss: Tensor, number: int, rows: Tensor) -> None:
        """Note a scalar loss of the batch `number`, which holds the manifest `rows` [B]."""
        self._batches.append((number, rows))
        self._note(0, loss.detach(), number)

    def gradient(self, norm: Tensor, number: int) -> Tensor:
        """Note the norm of a gradient that is whole after batch `number`.

        Returns 1.0 on the device if the step must be left out, else 0.0.
        """
        return self._note(1, norm, number)

    def prediction(self, probs: Tensor, number: int, rows: Tensor) -> None:
        """Note predictions [B, K] without training on the batch `number`, as `loss` does."""
        self._batches.append((number, rows))
        self._note(2, probs.sum(), number)

    def look(self) -> BadBatch | None:
        """Return the first bad batch of this process; waits for the device."""
        first = self._first.tolist()
        batches, self._batches = dict(self._batches), []
        number = min(first)
        if number == NEVER:
            return None
        rows = batches[number].tolist() if number in batches else []
        return BadBatch(WHAT[first.index(number)], number, rows)

    def _note(self, place: int, value: Tensor, number: int) -> Tensor:
        is_bad = value.isfinite().logical_not()
        self._first[place].copy_(
            torch.minimum(self._first[place], torch.where(is_bad, number, NEVER))
        )
        return is_bad.float()
