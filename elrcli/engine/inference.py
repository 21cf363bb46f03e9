"""Predictions for manifest rows, in eval mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from elrcli.data.loader import Batch, RowLoader
from elrcli.engine.device import Runtime
from elrcli.models import Preprocessing


@torch.inference_mode()
def predict_batches(
    predict: Callable[[Tensor], Tensor],
    loader: RowLoader,
    runtime: Runtime,
    preprocessing: Preprocessing,
    start_batch: int = 0,
) -> Iterator[tuple[Tensor, Batch]]:
    """Yield (probabilities [B, K] fp32 on the device, batch) in the loader's order.

    Begins at `start_batch`. `predict` maps normalised images to logits [B, K]. A batch without
    readable images has probabilities [0, 0].
    """
    for batch in loader.epoch(0, start_batch):
        if len(batch.index) == 0:
            yield torch.empty(0, 0, device=runtime.device), batch
            continue
        with runtime.autocast():
            logits = predict(runtime.normalise(batch.images, preprocessing))
        yield logits.float().softmax(dim=1), batch
