"""Verify that an exported file computes the same as PyTorch: run both on the same images and apply limits.

Axes: B images, C channels, H/W height and width, K classes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from glit_models.data.labelled import match_classes
from glit_models.errors import DataError

from .images import ImageSource, generated_images, make_transform
from .metadata import INPUT, ExportInfo
from .preprocessing import PIXEL_QUANTILE, PIXEL_TOLERANCE, preprocessing_model
from .runtime import as_array
from .sessions import open_session
from .source import ModelSource

__all__ = [
    "LIMITS",
    "Agreement",
    "Limit",
    "Runner",
    "compare",
    "torch_logits",
]

_BATCH = 32


@dataclass(frozen=True)
class Limit:
    """The limits of a precision: maximum absolute difference of a logit, and minimum top-1 agreement in %."""

    max_abs: float | None
    top1_agreement: float


LIMITS = {
    "fp32": Limit(1e-4, 99.0),
    "fp16": Limit(None, 99.0),
    "bf16": Limit(None, 98.0),  # eight bits of mantissa, like int8
    "int8": Limit(None, 98.0),
}


# ---- results ----


@dataclass(frozen=True)
class Agreement:
    """The result of a comparison.

    Attributes:
        num_images: number of images. origin: 'generated', or their folder or data set.
        provider: provider of ONNX Runtime that ran the file.
        sizes: heights and widths that were tried.
        max_abs: largest absolute difference of a logit.
        max_rel: largest difference relative to the largest logit of the image.
        top1_agreement: in % of images.
        levels: for a file with preprocessing, the difference to timm's transform that 19 of 20 preprocessed pixels stay
            within, in levels of 255; maximum over images.
        accuracy, torch_accuracy: top-1 accuracy in % of the file and of PyTorch, on labelled images.
        problems: descriptions of the exceeded limits.
    """

    num_images: int
    origin: str
    provider: str
    sizes: tuple[tuple[int, int], ...]
    max_abs: float
    max_rel: float
    top1_agreement: float
    levels: float | None = None
    accuracy: float | None = None
    torch_accuracy: float | None = None
    problems: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether the result is within all limits."""
        return not self.problems


class Runner(Protocol):
    """An exported file that can be run: `OnnxClassifier`, or `program.Program`."""

    info: ExportInfo
    provider: str
    input_dtype: np.dtype

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits [B, K] in float32 of preprocessed images [B, C, H, W] of `input_dtype`, or of raw images."""
        ...


def compare(runner: Runner, source: ModelSource, count: int, images: ImageSource | None) -> Agreement:
    """Run an exported file and its model on the same images.

    Args:
        runner: the file. source: the exported model. count: number of images.
        images: real ones; None generates some.

    Raises:
        ExportError: if the file cannot be run. DataError: if an image cannot be read, or its class is not one of the
            model's.
    """
    info = runner.info
    shown = _shown(info, count, images)
    sizes = _sizes(info)
    pairs, counts = iter(shown.pairs), _divide(shown.count, len(sizes))
    batches = [
        batch
        for size, share in zip(sizes, counts, strict=True)
        for batch in _compare_at(runner, source, size, itertools.islice(pairs, share))
    ]
    found, expected = (np.concatenate([getattr(batch, name) for batch in batches]) for name in ("found", "expected"))
    labels = None if shown.classes is None else shown.classes[[label for batch in batches for label in batch.labels]]
    differences = np.abs(found - expected)
    agreement = Agreement(
        num_images=len(found),
        origin=shown.origin,
        provider=runner.provider,
        sizes=tuple(sizes),
        max_abs=float(differences.max()),
        max_rel=float((differences.max(1) / np.abs(expected).max(1).clip(1e-12)).max()),
        top1_agreement=_percent(found.argmax(1) == expected.argmax(1)),
        levels=max(batch.levels for batch in batches) if info.preprocess else None,
        accuracy=None if labels is None else _percent(found.argmax(1) == labels),
        torch_accuracy=None if labels is None else _percent(expected.argmax(1) == labels),
    )
    return dataclasses.replace(agreement, problems=tuple(_problems(agreement, info)))


@dataclass(frozen=True, eq=False)
class _Shown:
    """`count` (image, label) pairs, the model's class for each label if known, and their origin."""

    pairs: Iterable[tuple[Image.Image, Any]]
    count: int
    classes: np.ndarray | None
    origin: str


def _shown(info: ExportInfo, count: int, images: ImageSource | None) -> _Shown:
    if images is None:
        pairs = ((image, None) for image in generated_images(count, info.input_size[1:]))
        return _Shown(pairs, count, None, "generated")
    picked = images.pick(count)
    split = picked.split
    if split is None or split.is_multilabel:
        return _Shown(picked, len(picked), None, str(images))
    try:
        classes, _ = match_classes(split.name, split.class_names, info.class_names, info.num_classes)
    except DataError:
        if images.fifth is None:
            raise
        return _Shown(picked, len(picked), None, str(images))  # these need no labels of the model's classes
    return _Shown(picked, len(picked), np.array(classes), str(split) if images.fifth is None else str(images))


def _sizes(info: ExportInfo) -> list[tuple[int, int]]:
    """The image sizes to try: for a dynamic size, the model's, a smaller and a larger one, two of them not square."""
    _, height, width = info.input_size
    if not info.dynamic_size:
        return [(height, width)]
    patch = info.patch_size
    return [(height, width), (height, max(width - patch, patch)), (height + 2 * patch, width + patch)]


def _divide(count: int, num_sizes: int) -> list[int]:
    """Divide the images among the sizes: the number of images for each."""
    bounds = [index * count // num_sizes for index in range(num_sizes + 1)]
    return [end - start for start, end in itertools.pairwise(bounds)]


@dataclass(frozen=True, eq=False)
class _Batch:
    """Logits [B, K] of the file and of PyTorch, B labels, and the difference of preprocessed pixels from timm's."""

    found: np.ndarray
    expected: np.ndarray
    labels: list[Any]
    levels: float


def _compare_at(
    runner: Runner, source: ModelSource, size: tuple[int, int], pairs: Iterable[tuple[Image.Image, Any]]
) -> Iterator[_Batch]:
    """Compare at one image size, batch by batch, so that any number of images fits into memory."""
    info = dataclasses.replace(runner.info, input_size=(runner.info.input_size[0], *size))
    model, prepared = source.at_size(size), _prepare_each(runner, info, pairs)
    whole = (info.batch or 1) * max(_BATCH // (info.batch or 1), 1)
    # Also a batch of one, which can fail separately.
    for most in itertools.chain([1], itertools.repeat(whole)):
        batch = list(itertools.islice(prepared, most))
        if not batch:
            return
        images = np.stack([item.image for item in batch])
        if info.preprocess:
            found = np.concatenate([item.logits for item in batch])
        else:
            found = runner.logits(images.astype(runner.input_dtype))
        labels, levels = [item.label for item in batch], max(item.levels for item in batch)
        yield _Batch(found, torch_logits(model, images), labels, levels)


@dataclass(frozen=True, eq=False)
class _Prepared:
    """A preprocessed image [C, H, W] with its label; for a file with preprocessing, also what the file computes.

    That is the logits [1, K], and the difference of the preprocessed pixels from timm's.
    """

    image: np.ndarray
    label: Any
    logits: Any = None
    levels: float = 0.0


def _prepare_each(runner: Runner, info: ExportInfo, pairs: Iterable[tuple[Image.Image, Any]]) -> Iterator[_Prepared]:
    """Preprocess images one at a time, because photographs are much larger than what is kept of them."""
    transform = make_transform(info)
    if not info.preprocess:
        for image, label in pairs:
            yield _Prepared(transform(image), label)
        return
    # Compare the network on the graph's preprocessed images, and the preprocessing separately.
    session = open_session(preprocessing_model(info), [runner.provider]).session
    scale = 255 * np.array(info.std, np.float32).reshape(-1, 1, 1)
    for image, label in pairs:
        raw = as_array(image, info.input_size[0])[None]
        in_graph = session.run(None, {INPUT: raw})[0][0]
        differences = np.abs(in_graph - transform(image)) * scale
        yield _Prepared(in_graph, label, runner.logits(raw), float(np.quantile(differences, PIXEL_QUANTILE)))


@torch.inference_mode()
def torch_logits(model: Any, images: np.ndarray) -> np.ndarray:
    """Logits [B, K] of preprocessed images by PyTorch in float32, eagerly."""
    return np.concatenate([model(batch).numpy() for batch in torch.from_numpy(images).split(_BATCH)])


def _percent(hits: np.ndarray) -> float:
    return 100 * float(hits.mean())


def _problems(agreement: Agreement, info: ExportInfo) -> Iterator[str]:
    limit = LIMITS[info.precision]
    if not math.isfinite(agreement.max_abs):
        yield "the file gives logits that are not finite"
    elif limit.max_abs is not None and agreement.max_abs > limit.max_abs:
        yield f"a logit differs by {agreement.max_abs:.1e}, more than {limit.max_abs:g}"
    if agreement.top1_agreement < limit.top1_agreement:
        yield f"top-1 agreement is {agreement.top1_agreement:.2f} %, under {limit.top1_agreement:g} %"
    if agreement.levels is not None and agreement.levels > PIXEL_TOLERANCE + 0.01:
        yield f"prepared pixels are {agreement.levels:.1f} levels of 255 off timm's, more than {PIXEL_TOLERANCE:g}"
