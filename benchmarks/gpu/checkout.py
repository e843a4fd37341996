"""Make a checkout importable without installation."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

__all__ = ["ROOT", "make_importable"]

ROOT = Path(__file__).resolve().parents[2]


def make_importable() -> None:
    """Make `glit_models.search` and `glit_models.export` importable from the checkout, if the package is not installed.

    An installation maps these folders into the package; a machine without a network only has the checkout.
    """
    import glit_models

    if find_spec("glit_models.search") is None:
        glit_models.__path__.append(str(ROOT))
