"""Tests of `prepare_image`, and of what `glit-runtime` says of itself; test_export_runtime.py runs it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from timm.data import create_transform

import glit_models
from glit_models.preprocessing import prepare_image

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "runtime" / "pyproject.toml").read_text())


def test_the_runtime_has_the_version_and_the_limits_of_the_package() -> None:
    whole = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert PROJECT["project"]["version"] == glit_models.__version__
    assert PROJECT["project"]["requires-python"] == whole["requires-python"]
    assert {"numpy>=1.26", "pillow>=12.3"} <= set(PROJECT["project"]["dependencies"]) & set(whole["dependencies"])


@pytest.mark.parametrize("crop_mode", ["center", "border", "squash"])
@pytest.mark.parametrize(
    ("size", "interpolation", "crop_pct"),
    [((3, 32, 32), "bicubic", 0.9), ((3, 32, 48), "bilinear", 1.0), ((1, 40, 24), "nearest", 0.875)],
)
def test_images_are_prepared_as_by_timm(
    crop_mode: str, size: tuple[int, int, int], interpolation: str, crop_pct: float
) -> None:
    config = {"interpolation": interpolation, "crop_pct": crop_pct, "crop_mode": crop_mode, "input_size": size}
    config |= {"mean": (0.485, 0.456, 0.406)[: size[0]], "std": (0.229, 0.224, 0.225)[: size[0]]}
    rng = np.random.default_rng(0)
    for width, height in ((32, 32), (47, 33), (33, 47), (11, 90), (200, 21), (35, 35)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        expected = create_transform(**config)(image if size[0] == 3 else image.convert("L"))
        found = prepare_image(image, **config)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected.numpy())
