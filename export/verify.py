"""Whether an exported file computes what PyTorch does: both run on the same images, held to stated limits.

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

from glit_models import SpecTransformer
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
    """What a precision must keep to: the largest absolute difference of a logit, the least top-1 agreement in %."""

    max_abs: float | None
    top1_agreement: float


LIMITS = {
    "fp32": Limit(1e-4, 99.0),
    "fp16": Limit(None, 99.0),
    "bf16": Limit(None, 98.0),  # eight bits of mantissa, as int8 has
    "int8": Limit(None, 98.0),
}


# ---- what was found ----


@dataclass(frozen=True)
class Agreement:
    """What the comparison found.

    Attributes:
        num_images: how many. origin: 'generated', or the folder or data set that they are of.
        provider: of ONNX Runtime, that ran the file.
        sizes: heights and widths that were tried.
        max_abs: largest absolute difference of a logit.
        max_rel: the same over the largest logit of that image.
        top1_agreement: in % of images.
        levels: of a file with preprocessing, how far 19 in 20 of an image's prepared pixels are from timm's transform
            at most, in levels of 255; of the image where they are farthest.
        accuracy, torch_accuracy: top-1 in % of the file and of PyTorch, on labelled images.
        problems: limits that it does not keep to, in words.
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
        """Whether all limits are kept."""
        return not self.problems


class Runner(Protocol):
    """An exported file that can be run: `OnnxClassifier`, or `program.Program`."""

    info: ExportInfo
    provider: str
    input_dtype: np.dtype

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits [B, K] in float32 of prepared images [B, C, H, W] of `input_dtype`, or of raw images."""
        ...


def compare(runner: Runner, source: ModelSource, count: int, images: ImageSource | None) -> Agreement:
    """Run an exported file and its model on the same images.

    Args:
        runner: the file. source: the model that it was made from. count: of images.
        images: real ones; None generates some.

    Raises:
        ExportError: if the file cannot be run. DataError: if an image cannot be read, or its class is none of the
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
    """Images, the model's class [B] of each where it is known, and where they are from."""
    if images is None:
        return generated_images(count, info.input_size[1:]), None, "generated"
    shown, labels, split = images.pick(count)
    if split is None or labels is None:
        return shown, None, str(images)
    try:
        classes, _ = match_classes(split.name, split.class_names, info.class_names, info.num_classes)
    except DataError:
        if images.fifth is None:
            raise
        return shown, None, str(images)  # images to calibrate with need no labels of the model's
    return shown, np.array(classes)[labels], str(split) if images.fifth is None else str(images)


def _sizes(info: ExportInfo) -> list[tuple[int, int]]:
    """The image sizes to try: of a dynamic one its own, a smaller and a larger, of which two are no squares."""
    _, height, width = info.input_size
    if not info.dynamic_size:
        return [(height, width)]
    patch = info.patch_size
    return [(height, width), (height, max(width - patch, patch)), (height + 2 * patch, width + patch)]


def _parts(images: list[Image.Image], sizes: Sequence[Any]) -> list[list[Image.Image]]:
    """The images in order, in as many parts as there are sizes."""
    bounds = [index * len(images) // len(sizes) for index in range(len(sizes) + 1)]
    return [images[start:end] for start, end in itertools.pairwise(bounds)]


@dataclass(frozen=True, eq=False)
class _Part:
    """Logits [B, K] of the file and of PyTorch, and how far prepared pixels are from timm's."""

    found: np.ndarray
    expected: np.ndarray
    levels: float


def _compare_at(runner: Runner, source: ModelSource, size: tuple[int, int], shown: list[Image.Image]) -> _Part:
    info = dataclasses.replace(runner.info, input_size=(runner.info.input_size[0], *size))
    images = prepare(info, shown)
    levels = 0.0
    if info.preprocess:
        # The network is judged on what the graph prepared, and the preparing on its own.
        in_graph = _prepared_in_graph(info, shown, runner.provider)
        scale = 255 * np.array(info.std, np.float32).reshape(-1, 1, 1)
        differences = (np.abs(in_graph - images) * scale).reshape(len(images), -1)
        levels = float(np.quantile(differences, PIXEL_QUANTILE, axis=1).max(initial=0.0))
        images = in_graph
        raw = [as_array(image, info.input_size[0])[None] for image in shown]
        found = np.concatenate([runner.logits(image) for image in raw])
    else:
        images_as_taken = images.astype(runner.input_dtype)
        # One alone too: a batch of one goes wrong in its own ways.
        found = np.concatenate([runner.logits(part) for part in (images_as_taken[:1], images_as_taken[1:])])
    return _Part(found, torch_logits(source.at_size(size), images), levels)


def _prepared_in_graph(info: ExportInfo, shown: list[Image.Image], provider: str) -> np.ndarray:
    """The same as `prepare`, by the graph alone that stands in front of the network."""
    session = open_session(preprocessing_model(info), [provider]).session
    images = [session.run(None, {INPUT: as_array(image, info.input_size[0])[None]})[0] for image in shown]
    return np.concatenate(images) if images else np.zeros((0, *info.input_size), np.float32)


@torch.inference_mode()
def torch_logits(model: SpecTransformer, images: np.ndarray) -> np.ndarray:
    """Logits [B, K] of prepared images by PyTorch in float32, eagerly."""
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
