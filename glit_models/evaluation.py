"""A classifier's scores on a labelled data set: top-1, top-5, each class, the confusion matrix, and the speed.

It counts as timm's `validate.py` does. Knows classifiers and data sets; printing is the command line's, drawing is
`confusion.py`'s.

Axes: B batch, K classes of the model.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from .data.labelled import LabelledSplit
from .data.loading import eval_loader
from .errors import DataError, GlitError, WeightsError
from .inference import Classifier

__all__ = ["ClassScore", "Evaluation", "evaluate", "match_classes"]

_TOP = 5


@dataclass(frozen=True)
class ClassScore:
    """One class: pictures of it, pictures called by its name, and pictures of which both are true."""

    name: str
    pictures: int
    predicted: int
    correct: int

    @property
    def recall(self) -> float | None:
        """Correct in percent of the class's pictures; None if it has none."""
        return 100 * self.correct / self.pictures if self.pictures else None

    @property
    def precision(self) -> float | None:
        """Correct in percent of the pictures called by the class's name; None if there are none."""
        return 100 * self.correct / self.predicted if self.predicted else None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What was counted, and what follows from it. Accuracies are in percent.

    Args:
        class_names: of the K classes.
        confusion: pictures [K, K] int64, by true class (row) and by predicted class (column).
        correct_top5: pictures whose class is among the five most probable; None with five classes or fewer, of which
            it would say nothing.
        matched_by: how the data's classes were found among the model's, 'name' or 'position'.
        images_per_second: of the model alone, without the first batch if there are more.
        images_per_second_with_loading: of all that the scoring took.
    """

    class_names: tuple[str, ...]
    confusion: np.ndarray
    correct_top5: int | None
    matched_by: str
    images_per_second: float
    images_per_second_with_loading: float

    @property
    def pictures(self) -> int:
        """How many were scored."""
        return int(self.confusion.sum())

    @property
    def correct(self) -> int:
        """Of how many the most probable class was the true one."""
        return int(self.confusion.trace())

    @property
    def top1(self) -> float:
        """`correct` in percent."""
        return 100 * self.correct / self.pictures

    @property
    def top5(self) -> float | None:
        """`correct_top5` in percent."""
        return None if self.correct_top5 is None else 100 * self.correct_top5 / self.pictures

    @property
    def classes(self) -> tuple[ClassScore, ...]:
        """The scores of each class, in the model's order."""
        counts = zip(self.confusion.sum(1), self.confusion.sum(0), self.confusion.diagonal(), strict=True)
        return tuple(
            ClassScore(name, *(int(number) for number in numbers))
            for name, numbers in zip(self.class_names, counts, strict=True)
        )

    def mistaken_for(self, index: int) -> tuple[str, int] | None:
        """The class that pictures of class `index` are most often taken for wrongly, and how many are."""
        wrong = self.confusion[index].copy()
        wrong[index] = 0
        other = int(wrong.argmax())
        return (self.class_names[other], int(wrong[other])) if wrong[other] else None

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON has it, `top5` and `correct_top5` only where there is one."""
        top5 = {} if self.correct_top5 is None else {"top5": self.top5, "correct_top5": self.correct_top5}
        return {
            "pictures": self.pictures,
            "top1": self.top1,
            "correct": self.correct,
            **top5,
            "images_per_second": round(self.images_per_second, 1),
            "images_per_second_with_loading": round(self.images_per_second_with_loading, 1),
            "classes_matched_by": self.matched_by,
            "classes": [
                {
                    "name": row.name,
                    "pictures": row.pictures,
                    "predicted": row.predicted,
                    "correct": row.correct,
                    "recall": row.recall,
                    "precision": row.precision,
                }
                for row in self.classes
            ],
            "confusion": self.confusion.tolist(),
        }


# ---- which of the model's classes each of the data's is ----


def match_classes(
    data: str, data_names: Sequence[str], model_names: Sequence[str] | None, num_classes: int
) -> tuple[tuple[int, ...], str]:
    """The model's class for each label of the data, and whether it was found by 'name' or by 'position'.

    By name where the model has names and all the data's are among them, whatever their order: `T-shirt_top`, which can
    be a folder, is `T-shirt/top`. By position where no name says otherwise.

    Raises:
        DataError: if the classes are not as many as the model's, or some names are in both but at other places, so
            that to go by position would count wrongly and say nothing.
    """
    keys, theirs = _comparable(model_names or (), data_names)
    own = {key: index for index, key in enumerate(keys)}
    if own and set(theirs) <= set(own):
        return tuple(own[key] for key in theirs), "name"
    unknown = [name for name, key in zip(data_names, theirs, strict=True) if key not in own]
    shared = len(data_names) - len(unknown)
    complaint = f"; not among the model's: {', '.join(map(repr, unknown[:3]))}" if shared else ""
    if len(data_names) != num_classes:
        raise DataError(f"{data} has {len(data_names)} classes, the model {num_classes}{complaint}")
    if any(own.get(key, index) != index for index, key in enumerate(theirs)):
        raise DataError(f"{data} has {shared} of the model's class names, but in another order{complaint}")
    return tuple(range(num_classes)), "position"


def _comparable(*lists: Sequence[str]) -> tuple[list[str], ...]:
    """The names by letters and digits alone if that keeps them apart, else as they are, else none of the first."""
    folded = tuple([re.sub(r"[\W_]+", " ", name).strip().casefold() for name in names] for names in lists)
    plain = tuple(list(names) for names in lists)
    for form in (folded, plain):
        if all(len(set(names)) == len(names) for names in form):
            return form
    return ([], *plain[1:])


# ---- counting ----


def evaluate(classifier: Classifier, data: LabelledSplit, batch_size: int = 250, num_workers: int = 0) -> Evaluation:
    """Score a classifier on all pictures, with a progress bar on a terminal.

    Args:
        data: its classes are found among the model's by `match_classes`.
        batch_size: pictures at a time; it changes the speed, not the scores.
        num_workers: processes that load pictures; 0 loads them in this one.

    Raises:
        DataError: if the classes do not fit, or a picture cannot be read; names it.
        WeightsError: if the model gives NaN.
        GlitError: if there is not enough memory on the device.
    """
    num_classes = len(classifier.class_names)
    model_names = classifier.class_names if classifier.has_names else None
    labels, matched_by = match_classes(data.name, data.class_names, model_names, num_classes)
    batches = track(
        eval_loader(data.source, classifier.transform, batch_size, num_workers),
        description="scoring",
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    tally = _Tally(classifier, data, np.array(labels))
    started = time.perf_counter()
    try:
        tally.count(batches)
    except torch.OutOfMemoryError:
        raise GlitError(
            f"{batch_size} pictures at a time do not fit on {classifier.device}; a smaller batch size may"
        ) from None
    seconds = time.perf_counter() - started
    return Evaluation(
        class_names=model_names or data.class_names,
        confusion=tally.confusion,
        correct_top5=tally.correct_top if tally.top == _TOP else None,
        matched_by=matched_by,
        images_per_second=tally.images_per_second(),
        images_per_second_with_loading=len(data.source) / seconds,
    )


class _Tally:
    """Counts of what the model says of each batch. Final; filled by `count`."""

    def __init__(self, classifier: Classifier, data: LabelledSplit, classes: np.ndarray) -> None:
        self.classifier = classifier
        self.data = data
        self.classes = classes  # the model's, by the data's label
        num_classes = len(classifier.class_names)
        self.top = _TOP if num_classes > _TOP else 1
        self.confusion = np.zeros((num_classes, num_classes), np.int64)
        self.correct_top = 0
        self.times: list[tuple[int, float]] = []  # pictures, and seconds of the model alone, of each batch

    @torch.inference_mode()
    def count(self, batches: Iterable[Any]) -> None:
        """Add images [B, C, H, W] and their labels [B]."""
        for images, labels in batches:
            images = images.to(self.classifier.device)
            started = time.perf_counter()
            logits = self.classifier.model(images)  # [B, K]
            # Equal logits fall as torch.topk has them, and so they do in timm's count.
            guesses = logits.topk(self.top).indices.cpu().numpy()  # [B, top]; waits for the device
            self.times.append((len(labels), time.perf_counter() - started))
            self._refuse_nan(logits)
            truth = self.classes[labels.numpy()]  # [B]
            np.add.at(self.confusion, (truth, guesses[:, 0]), 1)
            self.correct_top += int((guesses == truth[:, None]).any(1).sum())

    def images_per_second(self) -> float:
        """Of the model alone; the first batch, in which the device warms up, counts only if it is all there is."""
        counts, seconds = zip(*(self.times[1:] or self.times), strict=True)
        return sum(counts) / sum(seconds)

    def _refuse_nan(self, logits: torch.Tensor) -> None:
        bad = logits.isnan().any(1)
        if bool(bad.any()):
            before = sum(count for count, _ in self.times[:-1])
            name = self.data.picture_name(before + int(bad.nonzero()[0]))
            raise WeightsError(f"the model gives NaN on {name}: its weights are damaged, or its numbers overflow")
