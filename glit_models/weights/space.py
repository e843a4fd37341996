"""A model as a Space of the Hugging Face Hub: a folder with the page of `demo.py`, the weights, and this package.

The package goes along, so that the Space runs what the model was tried with, wherever it can be installed from.
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
_LEFT_OUT = ("__pycache__", "search", "export", "images", "glit_tiny.*")  # weights, what no page needs
_GRADIO = "6.31.0"  # with which the page was tried
_APP = '''"""The page of the model in the folder `model`: see glit_models/demo.py."""

from glit_models.demo import LIMITS, make_demo

demo = make_demo("model")

if __name__ == "__main__":
    demo.launch(**LIMITS)
'''


def write_space(model: Path, entry: WeightEntry, folder: Path) -> None:
    """Write a Space.

    Args:
        model: the folder of a model as it is published.
        entry: what is known of its weights.
        folder: to write. Raises WriteError if that fails.
    """
    with whole_folder(folder) as space:
        shutil.copytree(model, space / "model")
        shutil.copytree(_PACKAGE, space / "glit_models", ignore=shutil.ignore_patterns(*_LEFT_OUT))
        (space / "app.py").write_text(_APP, encoding="utf-8")
        (space / "requirements.txt").write_text("\n".join(_requirements()) + "\n", encoding="utf-8")
        (space / "README.md").write_text(_readme(entry), encoding="utf-8")


def _requirements() -> list[str]:
    """What the package and its figures need; gradio comes with the Space."""
    return [*(text for text in requires("glit-models") or () if ";" not in text), "matplotlib>=3.11"]


def _readme(entry: WeightEntry) -> str:
    """Front matter as the Hub reads it, in JSON, which YAML contains; and where the card is."""
    front: Mapping[str, Any] = {
        "title": entry.name, "sdk": "gradio", "sdk_version": _GRADIO, "python_version": "3.11", "app_file": "app.py",
        "license": "other" if " " in entry.license else entry.license.lower(), "tags": ["image-classification", "glit"],
    }  # fmt: skip
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]
    return "\n".join([*lines, f"# {entry.name}", "", "What is known of the model: [its card](model/README.md).", ""])
