"""What the trained network and the eye see in each image: features and thumbnails."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional

from elrcli.data.loader import Batch, RowLoader
from elrcli.engine.checkpoints import write_tensors
from elrcli.engine.device import Runtime
from elrcli.errors import RunError
from elrcli.models import Preprocessing, features_kept, members

FEATURES = 256  # a random projection to so many numbers keeps distances within a few percent
THUMBNAIL = 16  # pixels a side


@dataclass(frozen=True, eq=False)
class Features:
    """One line per manifest row; a row that was not read is all zeros."""

    vectors: np.ndarray  # [N, 256] float16
    thumbnails: np.ndarray  # [N, 256] uint8, grey, 16 x 16 pixels

    @classmethod
    def empty(cls, samples: int) -> Features:
        """Return the features of images that nobody has looked at yet."""
        vectors = np.zeros((samples, FEATURES), dtype=np.float16)
        return cls(vectors, np.zeros((samples, THUMBNAIL**2), dtype=np.uint8))

    def keep(self, look: Look, rows: np.ndarray) -> None:
        """Fill in one batch, whose images have these `rows` [B]."""
        self.vectors[rows] = look.vectors
        self.thumbnails[rows] = look.thumbnails

    def save(self, path: Path) -> None:
        """Write the features, whole or not at all."""
        tensors = {"vectors": self.vectors, "thumbnails": self.thumbnails}
        write_tensors(path, {name: torch.from_numpy(array) for name, array in tensors.items()})

    @classmethod
    def load(cls, path: Path, samples: int) -> Features | None:
        """Return what `save` wrote for so many samples, None where there is no such file."""
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="np") as file:
                found = cls(file.get_tensor("vectors"), file.get_tensor("thumbnails"))
        except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
            raise RunError(f"{path}: not readable ({error}). Delete it to do without.") from None
        expected = cls.empty(samples)
        fits = all(
            (stored.shape, stored.dtype) == (empty.shape, empty.dtype)
            for stored, empty in (
                (found.vectors, expected.vectors),
                (found.thumbnails, expected.thumbnails),
            )
        )
        if not (fits and np.isfinite(found.vectors).all()):
            raise RunError(f"{path}: does not fit the manifest. Delete it to do without.")
        return found


class Look(NamedTuple):
    """One batch of B images that could be read, on the CPU."""

    probs: np.ndarray  # [B, K] float32
    vectors: np.ndarray  # [B, 256] float16
    thumbnails: np.ndarray  # [B, 256] uint8
    batch: Batch


@torch.inference_mode()
def look_at_images(
    network: nn.Module, loader: RowLoader, runtime: Runtime, preprocessing: Preprocessing
) -> Iterator[Look]:
    """Yield predictions, features and thumbnails in the loader's order, network in eval mode."""
    projection: Tensor | None = None
    parts = members(network)
    with features_kept(network) as features:
        for batch in loader.epoch(0):
            if len(batch.index) == 0:
                nothing = Features.empty(0)
                yield Look(np.empty((0, 0)), nothing.vectors, nothing.thumbnails, batch)
                continue
            images = runtime.normalise(batch.images, preprocessing)
            with runtime.autocast():
                # Not as compiled networks: they would hide the features.
                logits = torch.stack([part.forward(images) for part in parts]).mean(dim=0)
            vectors = functional.normalize(features().float().nan_to_num(0, 0, 0))
            if projection is None:
                projection = _projection(vectors.shape[1]).to(vectors.device)
            yield Look(
                probs=logits.float().softmax(dim=1).cpu().numpy(),
                vectors=(vectors @ projection).half().cpu().numpy(),
                thumbnails=_thumbnails(batch.images),
                batch=batch,
            )


def _projection(width: int) -> Tensor:
    """Return [D, 256] that keeps the distances of vectors: zeros are added to narrow ones."""
    if width <= FEATURES:
        return torch.eye(width, FEATURES)
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(width, FEATURES, generator=generator)
    return projection.mul_(FEATURES**-0.5)


def _thumbnails(images: Tensor) -> np.ndarray:
    """Return grey pictures [B, 256] of uint8 images [B, 3, S, S]."""
    grey = images.float().mean(dim=1, keepdim=True)
    small = functional.adaptive_avg_pool2d(grey, THUMBNAIL)
    pixels: np.ndarray = small.round().to(torch.uint8).flatten(1).numpy()
    return pixels
