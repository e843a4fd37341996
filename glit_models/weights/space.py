"""Write a model as a Space of the Hugging Face Hub: a folder with the page of `demo.py`, the weights and this package.

The Space contains the package, so that it runs the same code whether or not the package is on PyPI.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from importlib.metadata import requires
from pathlib import Path
from typing import Any

from ..runs.files import whole_folder
from .registry import WeightEntry

__all__ = ["write_space"]

_PACKAGE = Path(__file__).parents[1]
_LEFT_OUT = (
    "__pycache__",
    "search",
    "export",
    "images",
    "glit_tiny.*",
)  # what the page does not need
_GRADIO = "6.31.0"  # the version that the page was tried with
_APP = '''"""The page of the model in the folder `model`: see glit_models/demo.py."""

from glit_models.demo import LIMITS, make_demo

demo = make_demo("model")

if __name__ == "__main__":
    demo.launch(**LIMITS)
'''


def write_space(model: Path, entry: WeightEntry, folder: Path) -> None:
    """Write a Space.

    Args:
        model: folder of a model, as published.
        entry: registry entry of its weights.
        folder: folder to write. Raises WriteError if it cannot be written.
    """
    with whole_folder(folder) as space:
        shutil.copytree(model, space / "model")
        shutil.copytree(_PACKAGE, space / "glit_models", ignore=shutil.ignore_patterns(*_LEFT_OUT))
        (space / "app.py").write_text(_APP, encoding="utf-8")
        (space / "requirements.txt").write_text("\n".join(_requirements()) + "\n", encoding="utf-8")
        (space / "README.md").write_text(_readme(entry), encoding="utf-8")


def _requirements() -> list[str]:
    """Requirements of the package and its figures; the Space itself provides gradio."""
    return [*(text for text in requires("glit-models") or () if ";" not in text), "matplotlib>=3.11"]


def _readme(entry: WeightEntry) -> str:
    """Front matter for the Hub, in JSON (a subset of YAML), and a link to the card."""
    front: Mapping[str, Any] = {
        "title": entry.name, "sdk": "gradio", "sdk_version": _GRADIO, "python_version": "3.11", "app_file": "app.py",
        "license": "other" if " " in entry.license else entry.license.lower(), "tags": ["image-classification", "glit"],
    }  # fmt: skip
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]
    return "\n".join([*lines, f"# {entry.name}", "", "The model is described in [its card](model/README.md).", ""])
