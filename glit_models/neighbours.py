"""Find nearest neighbours among feature vectors by cosine similarity, in bounded memory.

Axes: N vectors, M queries, D features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["nearest"]

_MOST_PAIRS = 1 << 25  # similarities in memory at a time


def nearest(queries: Tensor, vectors: Tensor, k: int, itself: bool = True) -> tuple[Tensor, Tensor]:
    """The k nearest of `vectors` [N, D] for each of `queries` [M, D]: similarities [M, k], largest first, and indices.

    Args:
        k: at most N, or N - 1.
        itself: False excludes vector i from the neighbours of query i, if both are the same images.
    """
    queries, vectors = F.normalize(queries), F.normalize(vectors)
    similarities, indices = torch.empty(len(queries), k), torch.empty(len(queries), k, dtype=torch.int64)
    rows = max(_MOST_PAIRS // len(vectors), 1)
    for start in range(0, len(queries), rows):
        part = slice(start, start + rows)
        similarity = queries[part] @ vectors.T  # [rows, N]
        if not itself:
            similarity.diagonal(start).fill_(-torch.inf)
        similarities[part], indices[part] = similarity.topk(k)
    return similarities, indices
