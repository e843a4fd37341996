"""The confusion matrix of an evaluation as a figure. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .evaluate import Evaluation
from .runs.figures import new_figure, save_png

__all__ = ["confusion_figure", "draw_confusion"]

_MOST_NAMED = 40  # classes; with more, their names would be too small to read
_MOST_NUMBERED = 20  # classes; with more, the numbers in the cells would be
_LONGEST_NAME = 24


def draw_confusion(evaluation: Evaluation, path: Path, title: str) -> None:
    """Draw what part of each class's images was taken for which class into a PNG file.

    Classes have their names up to 40, and their numbers beyond; cells have their percentages up to 20 classes.

    Raises:
        GlitError: if matplotlib is missing or fails.
        WriteError: if `path` cannot be written; what stood there is untouched.
    """
    save_png(path, lambda: confusion_figure(evaluation, title))


def confusion_figure(evaluation: Evaluation, title: str) -> Any:
    """The figure that `draw_confusion` writes."""
    percent = _percent(evaluation.confusion)
    num_classes = len(percent)
    side = min(max(4.0, 0.42 * num_classes), 12.0)  # inches of the matrix itself
    figure = new_figure(figsize=(side + 3.0, side + 2.2))
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
    """Counts [K, K] -> percent of the row's images [K, K]; a class without images has zeros."""
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
