"""Draw the confusion matrix of an evaluation. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..runs.figures import new_figure, save_png
from .scores import Evaluation

__all__ = ["confusion_figure", "draw_confusion"]

_MOST_NAMED = 40  # classes; with more, the names are too small to read
_MOST_NUMBERED = 20  # classes; with more, the numbers in the cells are
_LONGEST_NAME = 24


def draw_confusion(evaluation: Evaluation, path: Path, title: str) -> None:
    """Draw the confusion matrix as a PNG file, in percent of each class's images.

    Classes are labelled by name up to 40, else by number; cells show percentages up to 20 classes.

    Raises:
        GlitError: if matplotlib is missing or fails.
        WriteError: if `path` cannot be written; an existing file is unchanged.
    """
    save_png(path, lambda: confusion_figure(evaluation, title))


def confusion_figure(evaluation: Evaluation, title: str) -> Any:
    """The figure that `draw_confusion` writes."""
    percent = _percent(evaluation.confusion)
    num_classes = len(percent)
    side = min(max(4.0, 0.42 * num_classes), 12.0)  # inches of the matrix itself
    figure = new_figure(figsize=(side + 3.0, side + 2.2))
    axes = figure.add_subplot()
    # The square root makes a few mistakes visible next to many correct predictions.
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
    """Convert counts [K, K] to percent of each row; a class without images gets zeros."""
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
