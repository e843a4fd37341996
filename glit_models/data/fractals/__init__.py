"""Formula-driven images for pretraining: every class is a random fractal, and images are drawn on demand.

`dataset` defines the images, `classes` finds the classes, `ifs` draws, and `sheet` shows samples.
"""

from .dataset import FractalConfig, Fractals, HeldOutFractals

__all__ = ["FractalConfig", "Fractals", "HeldOutFractals"]
