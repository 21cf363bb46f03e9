"""Which samples look alike to the network: cosine neighbours of features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

PAIRS = 5_000_000_000  # comparisons that take some ten seconds: all pairs of 70,000 samples
MOST = 10  # neighbours; a few more or less change nothing
PER_CLASS = 4  # a class must have so many candidates per neighbour, or others would outvote it
CHUNK = 20_000_000  # similarities held at once


@dataclass(frozen=True, eq=False)
class FeatureSpace:
    """Unit vectors of M samples around their common centre, [M, D] float32."""

    vectors: Tensor

    @classmethod
    def of(cls, vectors: np.ndarray) -> FeatureSpace:
        """Centre and scale raw features [M, D]; samples without any, all zeros, are like no other.

        Features after a rectifier all point the same way; without their mean they tell
        samples apart.
        """
        raw = vectors.astype(np.float32)
        missing = ~vectors.any(axis=1)
        raw -= raw.mean(axis=0)
        raw[missing] = 0.0
        return cls.of_directions(raw)

    @classmethod
    def of_directions(cls, vectors: np.ndarray) -> FeatureSpace:
        """Scale vectors [M, D] float32, in place, to length 1: cosines rank the neighbours."""
        directions = torch.from_numpy(vectors)
        return cls(functional.normalize(directions, out=directions))

    def nearest(
        self, queries: np.ndarray, candidates: np.ndarray, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the nearest candidates of every query, best first, never the query itself.

        queries [Q] and candidates [C] (ascending) are positions -> positions [Q, k] int64 and
        cosine similarities [Q, k] float32, k = min(count, C), or C - 1 if that is
        less and a query is a candidate.
        """
        is_candidate = bool(np.isin(queries, candidates).any())
        k = max(0, min(count, len(candidates) - is_candidate))
        found = np.empty((len(queries), k), dtype=np.int64)
        similarity = np.empty((len(queries), k), dtype=np.float32)
        among = torch.from_numpy(candidates)
        pool = self.vectors[among].T
        step = max(1, CHUNK // max(len(candidates), 1))
        for start in range(0, len(queries) if k else 0, step):
            rows = torch.from_numpy(queries[start : start + step])
            cosines = self.vectors[rows] @ pool
            place = torch.searchsorted(among, rows).clamp(max=len(among) - 1)
            itself = (among[place] == rows).nonzero()[:, 0]
            cosines[itself, place[itself]] = -2.0
            best = cosines.topk(k, dim=1)
            found[start : start + step] = among[best.indices].numpy()
            similarity[start : start + step] = best.values.numpy()
        return found, similarity


def neighbourhoods(space: FeatureSpace, classes: int, seed: int = 0) -> np.ndarray:
    """Return up to 10 neighbours of every sample, fewer where classes are small: [M, k].

    A sample without features has itself in their place. Many samples look for them among a random
    part of all only.
    """
    samples = np.arange(len(space.vectors))
    candidates = samples
    limit = max(2, PAIRS // max(len(samples), 1))
    if len(samples) > limit:
        rng = np.random.default_rng(seed)
        candidates = np.sort(rng.choice(samples, limit, replace=False))
    count = min(MOST, max(1, len(candidates) // (PER_CLASS * classes)))
    found = space.nearest(samples, candidates, count)[0]
    alone = ~space.vectors.any(dim=1).numpy()
    found[alone] = samples[alone, None]
    return found
