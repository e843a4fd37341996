"""Score a classifier on a labelled data set: top-1, top-5, per-class scores, confusion matrix and speed.

Accuracy is computed as in timm's `validate.py`. The command line prints the results.

Axes: B batch, K classes of the model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.labelled import LabelledSplit, match_classes
from ..data.readable import readable_batches, refuse_broken
from ..embed import logits_and_features
from ..errors import Argument, GlitError, WeightsError
from ..predict import Classifier

__all__ = [
    "ClassScore",
    "Evaluation",
    "accuracy_interval",
    "balanced_accuracy",
    "evaluate",
    "evaluate_scores",
    "is_tie",
    "macro_f1",
    "smallest_difference",
]

Observe = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]

_Z = 1.959964  # of 95 % of a normal distribution

_TOP = 5


@dataclass(frozen=True)
class ClassScore:
    """The counts of one class: images of the class, images predicted as the class, and images that are both."""

    name: str
    images: int
    predicted: int
    correct: int

    @property
    def recall(self) -> float | None:
        """Correct predictions in percent of the class's images; None if it has none."""
        return 100 * self.correct / self.images if self.images else None

    @property
    def precision(self) -> float | None:
        """Correct predictions in percent of the predictions of this class; None if there are none."""
        return 100 * self.correct / self.predicted if self.predicted else None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The counts of an evaluation and the scores derived from them. Accuracies are in percent.

    Args:
        class_names: names of the K classes.
        confusion: images [K, K] int64, by true class (row) and by predicted class (column).
        correct_top5: number of images whose class is among the five most probable; None with five classes or fewer.
        matched_by: how the data's classes were matched with the model's: 'name' or 'position'.
        images_per_second: speed of the model alone, without the first batch if there are more; None if unknown.
        images_per_second_with_loading: speed of the whole evaluation.
    """

    class_names: tuple[str, ...]
    confusion: np.ndarray
    correct_top5: int | None
    matched_by: str
    images_per_second: float | None
    images_per_second_with_loading: float

    @property
    def images(self) -> int:
        """Number of scored images."""
        return int(self.confusion.sum())

    @property
    def correct(self) -> int:
        """Number of images whose most probable class is the true one."""
        return int(self.confusion.trace())

    @property
    def top1(self) -> float:
        """`correct` in percent."""
        return 100 * self.correct / self.images

    @property
    def top5(self) -> float | None:
        """`correct_top5` in percent."""
        return None if self.correct_top5 is None else 100 * self.correct_top5 / self.images

    @property
    def balanced_accuracy(self) -> float:
        """See `balanced_accuracy`."""
        return balanced_accuracy(self.confusion)

    @property
    def macro_f1(self) -> float:
        """See `macro_f1`."""
        return macro_f1(self.confusion)

    @property
    def classes(self) -> tuple[ClassScore, ...]:
        """The scores of each class, in the model's order."""
        counts = zip(self.confusion.sum(1), self.confusion.sum(0), self.confusion.diagonal(), strict=True)
        return tuple(
            ClassScore(name, *(int(number) for number in numbers))
            for name, numbers in zip(self.class_names, counts, strict=True)
        )

    def mistaken_for(self, index: int) -> tuple[str, int] | None:
        """The class that images of class `index` are most often mistaken for, and the number of such images."""
        wrong = self.confusion[index].copy()
        wrong[index] = 0
        other = int(wrong.argmax())
        return (self.class_names[other], int(wrong[other])) if wrong[other] else None

    def to_dict(self) -> dict[str, Any]:
        """The results as plain values for JSON, without unknown ones."""
        top5 = {} if self.correct_top5 is None else {"top5": self.top5, "correct_top5": self.correct_top5}
        speed = {} if self.images_per_second is None else {"images_per_second": round(self.images_per_second, 1)}
        return {
            "images": self.images,
            "top1": self.top1,
            "correct": self.correct,
            **top5,
            "balanced_accuracy": self.balanced_accuracy,
            "macro_f1": self.macro_f1,
            **speed,
            "images_per_second_with_loading": round(self.images_per_second_with_loading, 1),
            "classes_matched_by": self.matched_by,
            "classes": [
                {
                    "name": row.name,
                    "images": row.images,
                    "predicted": row.predicted,
                    "correct": row.correct,
                    "recall": row.recall,
                    "precision": row.precision,
                }
                for row in self.classes
            ],
            "confusion": self.confusion.tolist(),
        }


# ---- counts ----


def evaluate(
    classifier: Classifier, data: LabelledSplit, batch_size: int = 250, num_workers: int = 0,
    listing: Path = Path("broken-images.txt"), observe: Observe | None = None,
) -> Evaluation:  # fmt: skip
    """Score a classifier on all images, with a progress bar on a terminal.

    Args:
        data: its classes are matched with the model's by `match_classes`.
        batch_size: batch size; it affects the speed, not the scores.
        num_workers: number of processes that load images; 0 loads them in this process.
        listing: file for the names of broken images, if they are too many for a message.
        observe: called with the logits [B, K], the features [B, D] and the true classes [B] of each batch, in order.

    Raises:
        DataError: if the classes do not match, or images cannot be read; names them all.
        WeightsError: if the model returns NaN.
        GlitError: if the device runs out of memory.
    """
    num_classes = len(classifier.class_names)
    model_names = classifier.class_names if classifier.has_names else None
    labels, matched_by = match_classes(data.name, data.class_names, model_names, num_classes)
    classifier.check_memory(min(batch_size, len(data.source)), "take a smaller ", Argument("batch_size"))
    batches = readable_batches(data.source, classifier.transform, batch_size, num_workers, "scoring")
    tally = _Tally(classifier, data, np.array(labels), observe)
    started = time.perf_counter()
    try:
        tally.count(batches)
    except torch.OutOfMemoryError:
        raise GlitError(
            f"{batch_size} images at a time do not fit on {classifier.device}; a smaller batch size may"
        ) from None
    seconds = time.perf_counter() - started
    refuse_broken(tally.broken, len(data.source), listing)
    return Evaluation(
        class_names=model_names or data.class_names,
        confusion=tally.confusion,
        correct_top5=tally.correct_top if tally.top == _TOP else None,
        matched_by=matched_by,
        images_per_second=tally.images_per_second(),
        images_per_second_with_loading=len(data.source) / seconds,
    )


def evaluate_scores(
    scores: torch.Tensor, truth: np.ndarray, class_names: tuple[str, ...], images_per_second: float
) -> Evaluation:
    """Evaluate given scores [N, K] of images and their true classes [N]; the speed is that of the whole computation."""
    top = _TOP if len(class_names) > _TOP else 1
    confusion = np.zeros((len(class_names), len(class_names)), np.int64)
    correct = _count(scores.topk(top).indices.numpy(), truth, confusion)
    return Evaluation(class_names, confusion, correct if top == _TOP else None, "name", None, images_per_second)


def _count(guesses: np.ndarray, truth: np.ndarray, confusion: np.ndarray) -> int:
    """Add predictions [B, top], best first, to the confusion matrix; returns how many contain the true class [B]."""
    np.add.at(confusion, (truth, guesses[:, 0]), 1)
    return int((guesses == truth[:, None]).any(1).sum())


class _Tally:
    """Accumulates counts of a model's predictions over batches. Final; filled by `count`."""

    def __init__(self, classifier: Classifier, data: LabelledSplit, classes: np.ndarray, observe: Any = None) -> None:
        self.classifier = classifier
        self.data = data
        self.classes = classes  # the model's class for each label of the data
        self.observe = observe
        num_classes = len(classifier.class_names)
        self.top = _TOP if num_classes > _TOP else 1
        self.confusion = np.zeros((num_classes, num_classes), np.int64)
        self.correct_top = 0
        self.times: list[tuple[int, float]] = []  # images, and seconds of the model alone, of each batch
        self.broken: list[str] = []  # the fault of each image that cannot be read

    @torch.inference_mode()
    def count(self, batches: Iterable[Any]) -> None:
        """Add images [B, C, H, W], labels [B] and errors; after the first broken image, only record further ones."""
        for images, labels, reasons in batches:
            self.broken += filter(None, reasons)
            if self.broken:
                continue
            images = images.to(self.classifier.device)
            started = time.perf_counter()
            if self.observe is None:
                logits = self.classifier.model(images)  # [B, K]
            else:
                logits, features = logits_and_features(self.classifier.model, images)
            # Ties are ordered as by torch.topk, as in timm's count.
            guesses = logits.topk(self.top).indices.cpu().numpy()  # [B, top]; waits for the device
            self.times.append((len(labels), time.perf_counter() - started))
            self._refuse_nan(logits)
            truth = self.classes[labels.numpy()]  # [B]
            self.correct_top += _count(guesses, truth, self.confusion)
            if self.observe is not None:
                self.observe(logits.float().cpu(), features.cpu(), torch.from_numpy(truth))

    def images_per_second(self) -> float:
        """Speed of the model alone, without the first batch (in which the device warms up) if there are more."""
        counts, seconds = zip(*(self.times[1:] or self.times), strict=True)
        return sum(counts) / sum(seconds)

    def _refuse_nan(self, logits: torch.Tensor) -> None:
        bad = logits.isnan().any(1)
        if bool(bad.any()):
            before = sum(count for count, _ in self.times[:-1])
            name = self.data.image_name(before + int(bad.nonzero()[0]))
            raise WeightsError(f"the model gives NaN on {name}: its weights are damaged, or its numbers overflow")


# ---- scores of a confusion matrix, and their confidence ----


def balanced_accuracy(confusion: np.ndarray) -> float:
    """The mean recall in percent over the classes that have images.

    Args:
        confusion: images [K, K], by true class (row) and by predicted class (column).
    """
    images = confusion.sum(1)
    return 100 * float((confusion.diagonal()[images > 0] / images[images > 0]).mean())


def macro_f1(confusion: np.ndarray) -> float:
    """The mean F1 score in percent over the classes that have images or predictions.

    F1 is the harmonic mean of precision and recall. `confusion` as for `balanced_accuracy`.
    """
    counts = confusion.sum(0) + confusion.sum(1)
    return 100 * float((2 * confusion.diagonal()[counts > 0] / counts[counts > 0]).mean())


def accuracy_interval(accuracy: float, num_images: int) -> tuple[float, float]:
    """The 95 % confidence interval of an accuracy, in percent, for images drawn at random (Wilson score interval).

    It does not include the variation between trainings of the same model.

    Args:
        accuracy: in percent.
        num_images: number of images on which it was measured.

    Source: E. B. Wilson, Journal of the American Statistical Association 22 (1927).
    """
    p, n = accuracy / 100, num_images
    centre, scale = p + _Z**2 / (2 * n), 1 + _Z**2 / n
    half = _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    return 100 * (centre - half) / scale, 100 * (centre + half) / scale


def smallest_difference(accuracy: float, num_images: int) -> float:
    """The smallest difference, in points, that is not a tie between two networks near this accuracy in percent."""
    share = accuracy / 100
    return 100 * _Z * math.sqrt(2 * share * (1 - share) / num_images)


def is_tie(a: float, b: float, num_images: int) -> bool:
    """Whether the difference of two accuracies in percent, each on `num_images` images, is not significant.

    The difference is then within its 95 % interval around 0. This is conservative for two networks that are scored on
    the same images, because their difference varies less.
    """
    variance = sum(value / 100 * (1 - value / 100) for value in (a, b)) / num_images
    return abs(a - b) / 100 <= _Z * math.sqrt(variance)
