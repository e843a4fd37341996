"""Formula-driven images for pretraining: every class is a random fractal, and images are drawn on demand.

`config` has the settings, `dataset` defines the images, `classes` finds the classes, `ifs` draws, and `sheet` shows
samples.
"""

from .config import FractalConfig
from .dataset import Fractals, HeldOutFractals

__all__ = ["FractalConfig", "Fractals", "HeldOutFractals"]
