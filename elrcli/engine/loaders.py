"""The loaders of one training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from elrcli.config import TrainConfig
from elrcli.data.cache import RESERVE, ImageCache
from elrcli.data.loader import RowLoader
from elrcli.data.manifest import Manifest
from elrcli.data.shares import Share
from elrcli.data.transforms import Transform, eval_transform, train_transform
from elrcli.engine.memory import free_memory


class Loaders:
    """Makes loaders that have batch size, workers and caches in common. `config` is resolved."""

    def __init__(
        self,
        config: TrainConfig,
        manifest: Manifest,
        share: Share,
        image_size: int,
        cache_folder: Path,
        *,
        pin_memory: bool,
    ) -> None:
        self._config = config
        self._manifest = manifest
        self._share = share
        self._cache_folder = cache_folder
        self._pin_memory = pin_memory
        self._augmented = train_transform(config.augment, image_size, config.flip)
        self._plain = eval_transform(image_size)
        self._caches: dict[int, ImageCache] = {}  # by load size

    def train(self) -> RowLoader:
        """Return the loader of augmented training images in random order."""
        return self._make(self._manifest.rows("train"), self._augmented, shuffle=True)

    def held_out(self, split: str) -> RowLoader:
        """Return the loader of a split that is not trained on."""
        return self._make(self._manifest.rows(split), self._plain)

    def every_image(self) -> RowLoader:
        """Return the loader of all images, which looks at each once.

        It fills no cache that training has not filled anyway.
        """
        cached = self._plain.load_size == self._augmented.load_size
        return self._make(np.arange(len(self._manifest)), self._plain, cached=cached)

    def _make(
        self, rows: np.ndarray, transform: Transform, *, shuffle: bool = False, cached: bool = True
    ) -> RowLoader:
        config = self._config
        assert isinstance(config.batch_size, int), "resolve() fills the automatic settings"
        assert config.workers is not None
        return RowLoader(
            self._manifest,
            rows,
            transform,
            batch_size=config.batch_size,
            workers=config.workers,
            seed=config.seed,
            shuffle=shuffle,
            balanced=shuffle and config.balanced,
            share=self._share,
            cache=self._cache(transform.load_size) if cached else None,
            pin_memory=self._pin_memory,
        )

    def _cache(self, load_size: int) -> ImageCache | None:
        mode = self._config.cache
        if mode != "none" and load_size not in self._caches:
            most = _most_in_memory() if mode == "ram" else None
            cache = ImageCache(self._manifest, load_size, mode, self._cache_folder, most=most)
            self._caches[load_size] = cache
        return self._caches.get(load_size)


def _most_in_memory() -> int:
    """Return how many bytes a cache may take: /dev/shm may be larger than what is free."""
    free = free_memory(torch.device("cpu"))
    return free - min(RESERVE, free // 4)
