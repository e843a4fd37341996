"""Classify image files in batches, with any function from images to probabilities; numpy and Pillow alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .data.image_files import open_image
from .errors import DataError

__all__ = ["BATCH", "THRESHOLD", "Prediction", "predict_files"]

BATCH = 32
THRESHOLD = 0.5
"""Minimum probability of a predicted class of a multilabel model."""


@dataclass(frozen=True)
class Prediction:
    """The result of one file: (class name, probability) pairs, most probable first, or the error that occurred."""

    path: Path
    classes: tuple[tuple[str, float], ...] = ()
    error: str | None = None


def predict_files(
    probabilities: Callable[[Iterable[Image.Image]], Any],
    class_names: Sequence[str],
    paths: Iterable[Path],
    top_k: int | None = None,
    is_multilabel: bool = False,
) -> Iterator[Prediction]:
    """Yield one `Prediction` per file, in order; for a file that cannot be read, it holds the error.

    Args:
        probabilities: maps RGB images to [B, K], an array or a tensor on the CPU. class_names: names of its K classes.
        top_k: number of classes per image; None for 5, or for all with a probability of at least one half if
            `is_multilabel`.
    """
    paths, threshold = list(paths), 0.0
    if top_k is None:
        top_k, threshold = (len(class_names), THRESHOLD) if is_multilabel else (5, threshold)
    for start in range(0, len(paths), BATCH):
        yield from _predict_batch(probabilities, class_names, paths[start : start + BATCH], top_k, threshold)


def _predict_batch(
    probabilities: Callable[[Iterable[Image.Image]], Any], class_names: Sequence[str], paths: list[Path], top_k: int,
    threshold: float,
) -> Iterator[Prediction]:  # fmt: skip
    errors: dict[Path, str] = {}

    def opened() -> Iterator[Image.Image]:  # one at a time: 32 photographs take gigabytes
        for path in paths:
            try:
                yield open_image(path)
            except DataError as error:
                errors[path] = str(error)

    images = opened()
    first = next(images, None)
    rows = iter(() if first is None else np.asarray(probabilities(chain([first], images))))
    for path in paths:
        if path in errors:
            yield Prediction(path, error=errors[path])
        else:
            row = next(rows)
            best = [(class_names[index], float(row[index])) for index in np.argsort(-row, kind="stable")[:top_k]]
            yield Prediction(path, tuple((name, value) for name, value in best if value >= threshold))
