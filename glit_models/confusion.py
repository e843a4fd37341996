"""A confusion matrix as a picture. The only module of the zoo that needs matplotlib, and that only when it draws.

Axes: K classes.
"""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from .errors import GlitError
from .evaluation import Evaluation
from .store import write_bytes

__all__ = ["check_can_draw", "draw_confusion"]

_MOST_NAMED = 40  # classes; with more, their names would be too small to read
_MOST_NUMBERED = 20  # classes; with more, the numbers in the cells would be
_LONGEST_NAME = 24


def check_can_draw(path: Path) -> None:
    """Raise GlitError if the picture could not be drawn or written: before an hour of scoring, not after it."""
    _figure_class()
    if path.suffix.lower() != ".png":
        raise GlitError(f"{path}: the confusion matrix is a PNG; give a name that ends in .png")
    if path.is_dir() or not path.parent.is_dir():
        raise GlitError(f"{path} cannot be written: {'it is a folder' if path.is_dir() else 'its folder is missing'}")
    if not os.access(path.parent, os.W_OK):
        raise GlitError(f"{path} cannot be written: its folder is read-only")


def draw_confusion(evaluation: Evaluation, path: Path, title: str) -> None:
    """Draw what part of each class's pictures was taken for which class into a PNG file.

    Classes have their names up to 40, and their numbers beyond; cells have their percentages up to 20 classes.

    Raises:
        GlitError: if matplotlib is missing or `path` cannot be written; what stood there is untouched.
    """
    figure = _figure(evaluation, title)
    drawn = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in a script that the font lacks
        figure.savefig(drawn, format="png", dpi=150, bbox_inches="tight", pad_inches=0.15)
    try:
        write_bytes(path, drawn.getvalue())
    except OSError as error:
        raise GlitError(f"{path} cannot be written: {error.strerror}") from None


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure  # without pyplot, which would choose a window system
    except ImportError:
        raise GlitError('the confusion matrix is drawn with matplotlib: pip install "glit-models[train]"') from None
    return Figure


def _figure(evaluation: Evaluation, title: str) -> Any:
    percent = _percent(evaluation.confusion)
    num_classes = len(percent)
    side = min(max(4.0, 0.42 * num_classes), 12.0)  # inches of the matrix itself
    figure = _figure_class()(figsize=(side + 3.0, side + 2.2), layout="constrained")
    axes = figure.add_subplot()
    # The square root lets a few mistakes be seen beside many right answers.
    image = axes.imshow(np.sqrt(percent), cmap="Blues", vmin=0, vmax=10, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=[part**0.5 for part in (0, 1, 5, 20, 50, 100)])
    bar.ax.set_yticklabels(["0 %", "1 %", "5 %", "20 %", "50 %", "100 %"])
    axes.set_title(title, parse_math=False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    _label_classes(axes, evaluation.class_names)
    if num_classes <= _MOST_NUMBERED:
        _number_cells(axes, percent)
    return figure


def _percent(confusion: np.ndarray) -> np.ndarray:
    """Counts [K, K] -> percent of the row's pictures [K, K]; a class without pictures has zeros."""
    return 100 * confusion / np.maximum(confusion.sum(1, keepdims=True), 1)


def _label_classes(axes: Any, names: tuple[str, ...]) -> None:
    if len(names) <= _MOST_NAMED:
        short = [name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…" for name in names]
        axes.set_xticks(range(len(names)), short, rotation=90, parse_math=False)
        axes.set_yticks(range(len(names)), short, parse_math=False)
        return
    step = next(step for step in (10, 20, 50, 100, 200, 500, 1000, len(names)) if len(names) / step <= 20)
    axes.set_xticks(range(0, len(names), step))
    axes.set_yticks(range(0, len(names), step))
    axes.set_xlabel("predicted class, by number")
    axes.set_ylabel("true class, by number")


def _number_cells(axes: Any, percent: np.ndarray) -> None:
    for row, column in np.argwhere(percent >= 0.5):
        value = percent[row, column]
        colour = "white" if value > 40 else "black"
        axes.text(column, row, f"{int(value + 0.5)}", ha="center", va="center", color=colour, fontsize=8)
