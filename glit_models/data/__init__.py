"""Data sets and how they become batches, over `timm.data`. Knows nothing of models or training."""

from .datasets import Splits, open_splits

__all__ = ["Splits", "open_splits"]
