"""Open data sets and batch them, on top of `timm.data`. Independent of models and training."""

from .datasets import Splits, Subset, open_splits
from .fractals import FractalConfig, Fractals, HeldOutFractals

__all__ = ["FractalConfig", "Fractals", "HeldOutFractals", "Splits", "Subset", "open_splits"]
