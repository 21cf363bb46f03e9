"""What a run remembers of each sample while it trains: the evidence of an audit."""

from __future__ import annotations

import torch
from torch import Tensor

from elrcli.methods.table import SampleTables


class SampleRecord(SampleTables):
    """Per-sample sums over the epochs, as buffers: N samples, K classes, E epochs.

    Rows of the training split hold predictions made while training on them; rows of the other
    splits hold held-out predictions. The sums [N, K] are in the form of the targets, `table`.
    """

    per_sample = (
        "prob_sum",
        "prob_sum_classes",
        "visits",
        "prediction",
        "given_prob",
        "held_out_sum",
        "held_out_sum_classes",
    )
    prob_sum: Tensor  # [N, K] sum of predicted probabilities
    visits: Tensor  # [N] int32 predictions seen
    prediction: Tensor  # [N] int64 last predicted class, -1 before the first
    given_prob: Tensor  # [N, E] half: p(given label) in each epoch, NaN where not seen
    held_out_sum: Tensor | None  # [N, K] as prob_sum, by networks that never trained on the sample

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        epochs: int,
        *,
        held_out: bool = False,
        table: str = "fp32",
        on_host: bool = False,
    ) -> None:
        super().__init__(num_classes, table, on_host)
        self.add_table("prob_sum", num_samples)
        self.register_buffer("visits", torch.zeros(num_samples, dtype=torch.int32))
        self.register_buffer("prediction", torch.full((num_samples,), -1))
        history = torch.full((num_samples, epochs), torch.nan, dtype=torch.float16)
        self.register_buffer("given_prob", history)
        if held_out:
            self.add_table("held_out_sum", num_samples)
        else:
            self.register_buffer("held_out_sum", None)

    @torch.no_grad()
    def update(
        self,
        probs: Tensor,
        labels: Tensor,
        index: Tensor,
        epoch: int,
        held_out: Tensor | None = None,
    ) -> None:
        """Add the predictions of one batch: probs and held_out [B, K], labels and index [B]."""
        given = probs.gather(1, labels[:, None])[:, 0]
        self._add("prob_sum", index, probs, labels)
        self.visits[index] += 1
        self.prediction[index] = probs.argmax(dim=1)
        self.given_prob[index, epoch] = given.half()
        if self.held_out_sum is not None and held_out is not None:
            self._add("held_out_sum", index, held_out, labels)

    def _add(self, table: str, index: Tensor, probs: Tensor, labels: Tensor) -> None:
        """Add predictions; an audit ranks by those of the given labels, which are always kept."""
        self.write(table, index, self.read(table, index) + probs, always=labels)
