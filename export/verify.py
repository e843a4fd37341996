"""Verify that an exported file computes the same as PyTorch: run both on the same images and apply limits.

Axes: B images, C channels, H/W height and width, K classes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from glit_models.data.labelled import match_classes
from glit_models.errors import DataError

from .images import ImageSource, generated_images, prepare
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
    shown, labels, origin = _shown(info, count, images)
    sizes = _sizes(info)
    parts = [_compare_at(runner, source, size, part) for size, part in zip(sizes, _parts(shown, sizes), strict=True)]
    found, expected = (np.concatenate([getattr(part, name) for part in parts]) for name in ("found", "expected"))
    differences = np.abs(found - expected)
    agreement = Agreement(
        num_images=len(shown),
        origin=origin,
        provider=runner.provider,
        sizes=tuple(sizes),
        max_abs=float(differences.max()),
        max_rel=float((differences.max(1) / np.abs(expected).max(1).clip(1e-12)).max()),
        top1_agreement=_percent(found.argmax(1) == expected.argmax(1)),
        levels=max(part.levels for part in parts) if info.preprocess else None,
        accuracy=None if labels is None else _percent(found.argmax(1) == labels),
        torch_accuracy=None if labels is None else _percent(expected.argmax(1) == labels),
    )
    return dataclasses.replace(agreement, problems=tuple(_problems(agreement, info)))


def _shown(
    info: ExportInfo, count: int, images: ImageSource | None
) -> tuple[list[Image.Image], np.ndarray | None, str]:
    """The images, the model's class [B] of each if known, and their origin."""
    if images is None:
        return generated_images(count, info.input_size[1:]), None, "generated"
    shown, labels, split = images.pick(count)
    if split is None or labels is None or labels.ndim > 1:  # or several labels for each image
        return shown, None, str(images)
    try:
        classes, _ = match_classes(split.name, split.class_names, info.class_names, info.num_classes)
    except DataError:
        if images.fifth is None:
            raise
        return shown, None, str(images)  # calibration images need no labels of the model's classes
    return shown, np.array(classes)[labels], str(split) if images.fifth is None else str(images)


def _sizes(info: ExportInfo) -> list[tuple[int, int]]:
    """The image sizes to try: for a dynamic size, the model's, a smaller and a larger one, two of them not square."""
    _, height, width = info.input_size
    if not info.dynamic_size:
        return [(height, width)]
    patch = info.patch_size
    return [(height, width), (height, max(width - patch, patch)), (height + 2 * patch, width + patch)]


def _parts(images: list[Image.Image], sizes: Sequence[Any]) -> list[list[Image.Image]]:
    """Split the images, in order, into as many parts as there are sizes."""
    bounds = [index * len(images) // len(sizes) for index in range(len(sizes) + 1)]
    return [images[start:end] for start, end in itertools.pairwise(bounds)]


@dataclass(frozen=True, eq=False)
class _Part:
    """Logits [B, K] of the file and of PyTorch, and the difference of preprocessed pixels from timm's."""

    found: np.ndarray
    expected: np.ndarray
    levels: float


def _compare_at(runner: Runner, source: ModelSource, size: tuple[int, int], shown: list[Image.Image]) -> _Part:
    info = dataclasses.replace(runner.info, input_size=(runner.info.input_size[0], *size))
    images = prepare(info, shown)
    levels = 0.0
    if info.preprocess:
        # Compare the network on the graph's preprocessed images, and the preprocessing separately.
        in_graph = _prepared_in_graph(info, shown, runner.provider)
        scale = 255 * np.array(info.std, np.float32).reshape(-1, 1, 1)
        differences = (np.abs(in_graph - images) * scale).reshape(len(images), -1)
        levels = float(np.quantile(differences, PIXEL_QUANTILE, axis=1).max(initial=0.0))
        images = in_graph
        raw = [as_array(image, info.input_size[0])[None] for image in shown]
        found = np.concatenate([runner.logits(image) for image in raw])
    else:
        images_as_taken = images.astype(runner.input_dtype)
        # Also a batch of one, which can fail separately.
        found = np.concatenate([runner.logits(part) for part in (images_as_taken[:1], images_as_taken[1:])])
    return _Part(found, torch_logits(source.at_size(size), images), levels)


def _prepared_in_graph(info: ExportInfo, shown: list[Image.Image], provider: str) -> np.ndarray:
    """Like `prepare`, but with the preprocessing graph of the exported file."""
    session = open_session(preprocessing_model(info), [provider]).session
    images = [session.run(None, {INPUT: as_array(image, info.input_size[0])[None]})[0] for image in shown]
    return np.concatenate(images) if images else np.zeros((0, *info.input_size), np.float32)


@torch.inference_mode()
def torch_logits(model: Any, images: np.ndarray) -> np.ndarray:
    """Logits [B, K] of preprocessed images by PyTorch in float32, eagerly."""
    batches = torch.from_numpy(images).split(32) if len(images) else ()
    return np.concatenate([model(batch).numpy() for batch in batches] or [np.zeros((0, model.num_classes), np.float32)])


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
