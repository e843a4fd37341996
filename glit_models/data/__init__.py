"""Data sets and how they become batches, over `timm.data`. Knows nothing of models or training."""

from .datasets import Splits, open_splits
from .fractals import FractalConfig, Fractals

__all__ = ["FractalConfig", "Fractals", "Splits", "open_splits"]
