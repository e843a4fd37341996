"""The settings of fractals: their classes and how instances differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...errors import RecipeError
from .ifs import MAX_MAPS

__all__ = ["FractalConfig"]


@dataclass(frozen=True)
class FractalConfig:
    """Settings of the classes and of their instances.

    Attributes:
        num_classes: number of classes.
        instances: images of a class in one epoch.
        held_out: images of a class in the validation set, and again in the test set.
        max_maps: a class has from 2 to this many maps; 8 in FractalDB, fewer give sparser, more distinct shapes.
        perturbation: an instance's coefficients are its class's times factors from 1 - this to 1 + this. 0 leaves them
            unchanged, as in OFDB; FractalDB uses up to 0.2.
        single: make every class a variation of one fractal (1p-frac) instead of a separate fractal.
        delta: with `single`, maximum difference between a class's coefficients and that fractal's.
        color: 'gray', one level as in FractalDB, or 'color': four parts of the fractal, each in a random colour.
        render: 'point', or 'patch': a 3 x 3 pattern at each point, drawn once per image.
        density: points drawn per pixel.
        zoom_min: minimum size of the fractal, where 1 fills the image.
        zoom_max: maximum size; above 1, parts are outside the image.
        rotation: maximum rotation in degrees, either way, up to 180.
        flip_prob: probability of a horizontal flip.
        filling_rate: minimum fraction of pixels that a class covers in the search, at most 0.35; 0.2 in FractalDB.
        variance: minimum variance of a class's pixels along either axis, the image going from -1 to 1; 0.05 in
            PC-FractalDB.

    Raises:
        RecipeError: on an invalid value; names the key, the value and the bound.
    """

    num_classes: int = 1000
    instances: int = 1
    held_out: int = 1
    max_maps: int = 4
    perturbation: float = 0.0
    single: bool = False
    delta: float = 0.1
    color: Literal["gray", "color"] = "color"
    render: Literal["point", "patch"] = "point"
    density: float = 2.0
    zoom_min: float = 0.8
    zoom_max: float = 1.5
    rotation: float = 180.0
    flip_prob: float = 0.5
    filling_rate: float = 0.2
    variance: float = 0.05

    def __post_init__(self) -> None:
        for key, valid, bound in (
            ("num_classes", 1 <= self.num_classes <= 1_000_000, "from 1 to 1000000"),
            ("instances", self.instances >= 1, "at least 1"),
            ("held_out", self.held_out >= 1, "at least 1"),
            ("max_maps", 2 <= self.max_maps <= MAX_MAPS, f"from 2 to {MAX_MAPS}"),
            ("perturbation", 0 <= self.perturbation <= 0.5, "from 0 to 0.5"),
            ("delta", 0 < self.delta <= 1, "above 0 and at most 1"),
            ("color", self.color in ("gray", "color"), "gray or color"),
            ("render", self.render in ("point", "patch"), "point or patch"),
            ("density", 0.1 <= self.density <= 16, "from 0.1 to 16"),
            ("zoom_min", 0.1 <= self.zoom_min <= 8, "from 0.1 to 8"),
            ("zoom_max", self.zoom_min <= self.zoom_max <= 8, f"from zoom_min={self.zoom_min} to 8"),
            ("rotation", 0 <= self.rotation <= 180, "from 0 to 180"),
            ("flip_prob", 0 <= self.flip_prob <= 1, "from 0 to 1"),
            ("filling_rate", 0 <= self.filling_rate <= 0.35, "from 0 to 0.35"),
            ("variance", 0 <= self.variance < 1, "from 0 to below 1"),
        ):
            if not valid:
                raise RecipeError(f"fractals.{key} must be {bound}, got {getattr(self, key)!r}")
