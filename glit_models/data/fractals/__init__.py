"""Formula-driven images for pretraining: every class is a random fractal, and every image is drawn when it is needed.

`dataset` says what is drawn, `classes` finds the classes, `ifs` draws, and `sheet` shows them.
"""

from .dataset import FractalConfig, Fractals, HeldOutFractals

__all__ = ["FractalConfig", "Fractals", "HeldOutFractals"]
