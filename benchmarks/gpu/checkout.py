"""Lets a checkout that is not installed be imported as a whole."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

__all__ = ["ROOT", "make_importable"]

ROOT = Path(__file__).resolve().parents[2]


def make_importable() -> None:
    """Let `glit_models.search` and `glit_models.export` be found at the top of the checkout, if nothing is installed.

    An installation maps these folders into the package; on a machine without a network there is only the checkout.
    """
    import glit_models

    if find_spec("glit_models.search") is None:
        glit_models.__path__.append(str(ROOT))
