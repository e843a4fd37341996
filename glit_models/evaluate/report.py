"""Write the report of an evaluation: an HTML page with scores, mistakes, and images and labels to review.

This module lays out the page; `evaluate`, `calibration` and `review` compute its content.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..data.labelled import LabelledSplit, match_classes
from ..data.sources import Stream
from ..embed import embed
from ..errors import DataError, GlitError
from ..page import Page
from ..predict import Classifier
from ..runs.figures import import_matplotlib, new_figure, png_bytes
from .calibration import Calibration, calibrate
from .confusion_figure import confusion_figure
from .review import Pair, doubtful_labels, near_duplicates
from .scores import Evaluation, accuracy_interval

__all__ = ["Observed", "Training", "check_report", "embed_training", "write_report"]

_MOST_CARDS = 24
_MOST_TRAINING = 100_000  # images; more would take longer than the rest of the report
_THUMBNAIL = 160  # pixels of the longer side
_UPSCALED = 64  # smaller images are enlarged to this size, with visible pixels
_WORDS = {
    "top-1, top-5": "images whose class is the most probable one, or among the five most probable",
    "97.0 % (95.1 to 98.2)": "a score and its 95 % interval (Wilson's), as if the images had been drawn at random",
    "balanced accuracy": "the mean of the classes' recalls: each class counts the same",
    "macro-F1": "the mean of the classes' harmonic means of recall and precision",
    "confidence": "the probability that the model gives to a class",
    "calibration error": "the mean difference between confidence and accuracy over images, in 15 bins of confidence "
    "(expected calibration error)",
}


@dataclass
class Observed:
    """Collects the logits, features and true classes of all scored images, in order; filled by `add`. Final."""

    logits: list[Tensor] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    truth: list[Tensor] = field(default_factory=list)

    def add(self, logits: Tensor, features: Tensor, truth: Tensor) -> None:
        """Add a batch [B, K], [B, D] and [B]; the callback for `evaluate`'s argument `observe`."""
        self.logits.append(logits)
        self.features.append(features)
        self.truth.append(truth)


@dataclass(frozen=True, eq=False)
class Training:
    """Training images to compare with: features [M, D], the model's classes [M], and their indices in `data`; or a note
    that explains why there are none."""

    data: LabelledSplit | None = None
    features: Tensor | None = None
    labels: Tensor | None = None
    places: Sequence[int] = ()
    note: str = ""


def check_report(folder: Path, data: LabelledSplit) -> None:
    """Raise GlitError if a report could not be written. For use before the work."""
    import_matplotlib()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise GlitError(f"{folder} exists; remove it or give another name")
    if not folder.absolute().parent.is_dir():
        raise GlitError(f"{folder} cannot be written: its folder is missing")
    if isinstance(data.source, Stream):
        raise DataError(f"{data} is read as a stream without an index; a report takes a folder or a set that has one")


def embed_training(
    classifier: Classifier, train: LabelledSplit, batch_size: int = 250, num_workers: int = 0
) -> Training:
    """Compute the features of a training split, with a progress bar; a split that is too large gives only a note.

    Raises:
        DataError: if its classes do not match the model's.
    """
    count = len(train.source)
    if isinstance(train.source, Stream) or count > _MOST_TRAINING:
        return Training(note=f"{train} has {count:,} images; up to {_MOST_TRAINING:,} with an index are compared")
    names = classifier.class_names if classifier.has_names else None
    matched, _ = match_classes(train.name, train.class_names, names, len(classifier.class_names))
    features, labels, whole = [], [], []
    for batch, batch_labels, reasons in embed(
        classifier, train.source, batch_size, num_workers, "embedding the training images"
    ):
        keep = torch.tensor([not reason for reason in reasons])
        whole.append(keep)
        features.append(batch[keep])
        labels.append(torch.tensor(matched)[batch_labels[keep]])
    places = torch.cat(whole).nonzero().flatten().tolist()
    broken = count - len(places)
    note = f"{broken:,} training images cannot be read and are left out." if broken else ""
    return Training(train, torch.cat(features), torch.cat(labels), places, note)


def write_report(
    folder: Path, title: str, result: Evaluation, observed: Observed, data: LabelledSplit, training: Training
) -> Path:  # fmt: skip
    """Write `folder/index.html` and its figures.

    Args:
        folder: folder to write; has passed `check_report`.

    Raises:
        WriteError: if it cannot be written; nothing is then left in its place.
    """
    page = Page(folder)
    scored = _Scored(observed, result.class_names, data)
    _write_summary(page, result)
    _write_confusion(page, result, title)
    _write_mistakes(page, scored)
    _write_classes(page, result)
    _write_calibration(page, scored)
    _write_duplicates(page, scored, training)
    _write_doubts(page, scored, training)
    return page.save(title)


class _Scored:
    """The scored images with the model's predictions. Final."""

    def __init__(self, observed: Observed, class_names: Sequence[str], data: LabelledSplit) -> None:
        self.logits, self.features = torch.cat(observed.logits), torch.cat(observed.features)
        self.truth = torch.cat(observed.truth)
        self.confidence, self.predicted = self.logits.softmax(1).max(1)
        self.class_names, self.data = class_names, data

    def image(self, index: int) -> Image.Image:
        return _open(self.data, index)

    def card(self, index: int, *more: str) -> tuple[list[bytes], list[str]]:
        """The image's thumbnail, name, classes, and more lines."""
        said = f"predicted: {self.class_names[int(self.predicted[index])]}, {100 * float(self.confidence[index]):.1f} %"
        own = float(self.logits[index].softmax(0)[self.truth[index]])
        label = f"label: {self.class_names[int(self.truth[index])]}, {100 * own:.1f} %"
        return [_thumbnail(self.image(index))], [said, label, *more, self.data.image_name(index)]


def _open(data: LabelledSplit, index: int) -> Image.Image:
    image: Image.Image = data.source[index][0]  # type: ignore[index]  # `check_report` has refused streams
    return image


def _thumbnail(image: Image.Image) -> bytes:
    """Encode the image as a small JPEG file."""
    scale = _UPSCALED // max(image.size)
    if scale > 1:
        image = image.resize((scale * image.width, scale * image.height), Image.Resampling.NEAREST)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=82)
    return file.getvalue()


# ---- sections ----


def _write_summary(page: Page, result: Evaluation) -> None:
    def show(score: float, bounds: bool) -> str:
        low, high = accuracy_interval(score, result.images)
        return f"{score:.2f} % ({low:.2f} to {high:.2f})" if bounds else f"{score:.2f} %"

    scores = [("images", f"{result.images:,}"), ("top-1", show(result.top1, True))]
    if result.top5 is not None:
        scores.append(("top-5", show(result.top5, True)))
    scores += [
        ("balanced accuracy", show(result.balanced_accuracy, False)), ("macro-F1", show(result.macro_f1, False))
    ]  # fmt: skip
    page.heading("Scores")
    page.table([{"": name, "value": value} for name, value in scores])
    if result.matched_by == "position":
        page.text("The data's classes were matched with the model's by their order, as their names differ.", "missing")
    page.words(_WORDS)


def _write_confusion(page: Page, result: Evaluation, title: str) -> None:
    page.heading("Confusion matrix")
    figure = png_bytes(lambda: confusion_figure(result, title), {})
    page.figure("confusion", figure, "What part of each class's images (a row) was taken for which class (a column).")


def _write_mistakes(page: Page, scored: _Scored) -> None:
    wrong = (scored.predicted != scored.truth).nonzero().flatten()
    page.heading("Worst mistakes")
    if not len(wrong):
        page.text("There are none.")
        return
    order = wrong[scored.confidence[wrong].argsort(descending=True, stable=True)].tolist()
    page.text(
        f"{len(wrong):,} images are taken for another class{_shown(order)}. The most confident mistakes come first."
    )
    page.gallery([scored.card(index) for index in order[:_MOST_CARDS]])


def _write_classes(page: Page, result: Evaluation) -> None:
    page.heading("Classes")
    page.table(
        [
            {
                "class": row.name,
                "images": f"{row.images:,}",
                "correct": f"{row.correct:,}",
                "recall": _percent(row.recall),
                "precision": _percent(row.precision),
                "most often taken for": "{} ({})".format(*other) if (other := result.mistaken_for(index)) else "",
            }
            for index, row in enumerate(result.classes)
            if row.images or row.predicted
        ]
    )


def _write_calibration(page: Page, scored: _Scored) -> None:
    page.heading("Calibration")
    found = calibrate(scored.logits, scored.truth)
    page.text(f"Calibration error: {found.error:.2f} %, on all {len(scored.truth):,} images.")
    if found.temperature is None:
        page.text("These images are too few to fit a temperature.")
    else:
        page.text(
            f"Dividing the logits by the temperature {found.temperature:.3f} gives the least negative log-likelihood "
            f"on one half of the images, drawn at random. On the other half the calibration error is "
            f"{found.error_before:.2f} % before it and {found.error_after:.2f} % after it."
        )
    caption = (
        "Of images of which the model is so sure (left to right), how many are right (upwards). On the diagonal it is "
        "as sure as it is right; below it, too sure. The larger a point, the more images."
    )
    page.figure("calibration", png_bytes(lambda: _calibration_figure(found), {}), caption)


def _calibration_figure(found: Calibration) -> Any:
    figure = new_figure(figsize=(4.6, 4.4))
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="#b8bcc2", linewidth=1)
    curves = [("all images", found.bins, "#2f6db5")]
    if found.temperature is not None:
        curves.append((f"half of them, at temperature {found.temperature:.2f}", found.bins_after, "#e8833a"))
    for label, bins, colour in curves:
        most = max(part.images for part in bins)
        sizes = [12 + 90 * part.images / most for part in bins]
        points = [part.confidence for part in bins], [part.accuracy for part in bins]
        axes.plot(*points, color=colour, linewidth=1, alpha=0.6)
        axes.scatter(*points, s=sizes, color=colour, alpha=0.8, label=label)
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def _write_duplicates(page: Page, scored: _Scored, training: Training) -> None:
    page.heading("Near-duplicates")
    page.text(
        "Images that are the same but for size and compression: their features (less the mean) and small copies of "
        "their pixels nearly agree. Crops and mirrored copies are not found."
    )
    _write_pairs(page, f"Within {scored.data}", scored, near_duplicates(scored.features, scored.image), scored.data)
    if training.note:
        page.text(training.note, "missing")
    train = training.data
    if train is not None and training.features is not None and training.labels is not None and len(training.places):
        places, labels = training.places, training.labels
        pairs = near_duplicates(
            scored.features, scored.image, training.features, lambda index: _open(train, places[index])
        )
        text = f"Between {scored.data} and {train}, on which the model may have been trained"
        _write_pairs(page, text, scored, pairs, train, places, labels)


def _write_pairs(
    page: Page, what: str, scored: _Scored, pairs: Sequence[Pair], other: LabelledSplit,
    places: Sequence[int] | None = None, labels: Tensor | None = None,
) -> None:  # fmt: skip
    """`other` contains the second image of each pair, at `places` if these are not its indices."""
    if not pairs:
        page.text(f"{what}: none was found.")
        return
    page.text(f"{what}: {len(pairs):,} {'pair' if len(pairs) == 1 else 'pairs'}{_shown(pairs)}.")
    cards = []
    for pair in pairs[:_MOST_CARDS]:
        place = pair.second if places is None else places[pair.second]
        classes = scored.truth[pair.first], (scored.truth if labels is None else labels)[pair.second]
        one, two = (scored.class_names[int(label)] for label in classes)
        lines = [f"label: {one}" if one == two else f"labels: {one}; {two}"]
        lines += [f"features {pair.similarity:.4f}, pixels {pair.correlation:.4f}"]
        images = [_thumbnail(scored.image(pair.first)), _thumbnail(_open(other, place))]
        cards.append((images, [*lines, scored.data.image_name(pair.first), other.image_name(place)]))
    page.gallery(cards)


def _write_doubts(page: Page, scored: _Scored, training: Training) -> None:
    page.heading("Labels that may be wrong")
    others = () if training.features is None or training.labels is None else (training.features, training.labels)
    doubts = doubtful_labels(scored.features, scored.truth, scored.predicted, scored.confidence, others)
    page.text(
        "Images of which the model is sure that they are of another class than their label's, and whose neighbours by "
        "features mostly bear that class. A model that is often wrong makes this list long and worth little."
    )
    if not doubts:
        page.text("None was found.")
        return
    page.text(f"{len(doubts):,} of {len(scored.truth):,} images{_shown(doubts)}.")
    page.gallery(
        [
            scored.card(doubt.index, f"{doubt.agreeing} of {doubt.neighbours} neighbours bear the predicted class")
            for doubt in doubts[:_MOST_CARDS]
        ]
    )


def _shown(items: Sequence[object]) -> str:
    return "" if len(items) <= _MOST_CARDS else f", of which {_MOST_CARDS} are shown"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} %"
