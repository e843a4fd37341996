"""Score multilabel models, which decide for each class separately whether an image has it.

A class is predicted if its sigmoid probability is at least one half.

Axes: N images, K classes of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.labelled import LabelledSplit, match_classes
from ..data.readable import readable_batches, refuse_broken
from ..errors import DataError, WeightsError
from ..predict import Classifier
from .scores import ClassScore

__all__ = ["MultilabelEvaluation", "average_precision", "evaluate_multilabel", "score_multilabel"]


@dataclass(frozen=True)
class MultilabelEvaluation:
    """Counts of N images, and scores in percent.

    Attributes:
        images: N. exact: number of images with all classes right.
        classes: scores of each class at a probability of one half.
        average_precisions: of each class, see `average_precision`; None for a class without images.
    """

    images: int
    exact: int
    classes: tuple[ClassScore, ...]
    average_precisions: tuple[float | None, ...]

    @property
    def mean_average_precision(self) -> float:
        """The mean over the classes that have images; 0 if there are none."""
        known = [value for value in self.average_precisions if value is not None]
        return sum(known) / max(len(known), 1)

    @property
    def macro_f1(self) -> float:
        """The mean F1 score of the classes that have images or predictions."""
        scored = [_f1([row]) for row in self.classes if row.images or row.predicted]
        return sum(scored) / max(len(scored), 1)

    @property
    def micro_f1(self) -> float:
        """The F1 score over all pairs of image and class."""
        return _f1(self.classes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "images": self.images,
            "map": self.mean_average_precision,
            "macro_f1": self.macro_f1,
            "micro_f1": self.micro_f1,
            "exact": self.exact,
            "classes": [
                {**vars(row), "recall": row.recall, "precision": row.precision, "average_precision": value}
                for row, value in zip(self.classes, self.average_precisions, strict=True)
            ],
        }


def _f1(rows: Any) -> float:
    correct, counts = sum(row.correct for row in rows), sum(row.images + row.predicted for row in rows)
    return 100 * 2 * correct / max(counts, 1)


def average_precision(scores: np.ndarray, truth: np.ndarray) -> float | None:
    """The average precision of a class in percent: the mean precision at each image that has the class.

    Args:
        scores: [N]; images with equal scores are ranked together. truth: [N], whether each image has the class.

    Returns:
        None if no image has the class.
    """
    if not truth.any():
        return None
    order = np.argsort(-scores, kind="stable")
    found = np.cumsum(truth[order])
    last = np.append(np.diff(scores[order]) != 0, True)  # last of equal scores
    hits = np.diff(found[last], prepend=0)
    return 100 * float((hits * found[last] / (np.flatnonzero(last) + 1)).sum() / found[-1])


def score_multilabel(logits: np.ndarray, truth: np.ndarray, class_names: tuple[str, ...]) -> MultilabelEvaluation:
    """Score logits [N, K] against the true classes [N, K]."""
    truth, predicted = truth.astype(bool), logits >= 0
    counts = zip(truth.sum(0), predicted.sum(0), (truth & predicted).sum(0), strict=True)
    return MultilabelEvaluation(
        images=len(truth),
        exact=int((truth == predicted).all(1).sum()),
        classes=tuple(
            ClassScore(name, *(int(number) for number in numbers))
            for name, numbers in zip(class_names, counts, strict=True)
        ),
        average_precisions=tuple(average_precision(*pair) for pair in zip(logits.T, truth.T, strict=True)),
    )


def evaluate_multilabel(
    classifier: Classifier, data: LabelledSplit, batch_size: int = 250, num_workers: int = 0,
    listing: Path = Path("broken-images.txt"),
) -> MultilabelEvaluation:  # fmt: skip
    """Score a classifier on all images; takes the arguments of `evaluate`.

    Raises:
        DataError: if the classes do not match, the model is not multilabel, or images cannot be read.
        WeightsError: if the model's outputs are NaN.
    """
    if not classifier.is_multilabel:
        raise DataError(f"{data} has several labels an image, but the model was trained for one class an image")
    names = classifier.class_names if classifier.has_names else None
    matched, _ = match_classes(data.name, data.class_names, names, len(classifier.class_names))
    logits: list[Tensor] = []
    truth: list[Tensor] = []
    broken: list[str] = []
    for images, labels, reasons in readable_batches(
        data.source, classifier.transform, batch_size, num_workers, "scoring"
    ):
        broken += filter(None, reasons)
        if not broken:
            with torch.inference_mode():
                logits.append(classifier.model(images.to(classifier.device)).float().cpu())
            truth.append(torch.zeros(len(labels), len(classifier.class_names)))
            truth[-1][:, list(matched)] = labels
    refuse_broken(broken, len(data.source), listing)
    scores = torch.cat(logits).numpy()
    if np.isnan(scores).any():
        raise WeightsError("the model gives NaN: its weights are damaged, or its numbers overflow")
    return score_multilabel(scores, torch.cat(truth).numpy(), names or data.class_names)
