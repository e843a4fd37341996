"""Compute feature vectors of images, the input of a model's head, in memory or into a file.

Axes: B batch, D features.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .data import Subset
from .data.image_files import find_images, open_image
from .data.label_table import BETWEEN, LABEL_TABLES, flat_labels, is_label_table
from .data.labelled import LabelledSplit, open_labelled
from .data.readable import readable_batches
from .data.sources import Stream, find_part, open_listed
from .errors import Argument, DataError, GlitError, WeightsError
from .predict import Classifier
from .runs import row_table
from .runs.files import whole_file
from .runs.row_table import Row, Rows, import_pyarrow, part_of, write_csv, write_parquet

__all__ = [
    "ImageSet",
    "check_embedding",
    "check_features",
    "embed",
    "logits_and_features",
    "open_images",
    "pooled_features",
    "write_embedding",
]

_SPLITS = ("train", "validation", "test")
_NOT_IMAGES = (".tar", *LABEL_TABLES)  # files that contain a data set


# ---- images ----


@dataclass(frozen=True)
class ImageSet:
    """Images with names, and labels if they have any.

    Args:
        images: map-style pairs of (RGB PIL image, anything); raises DataError if an image cannot be read.
    """

    names: Sequence[str]
    labels: Sequence[str | None]
    images: Any


class _Files:
    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return open_image(self.paths[index]), 0


def open_images(
    data: str, root: str | os.PathLike[str] | None = None, split: str | None = None, **options: Any
) -> ImageSet:
    """Open all images of a folder, with or without classes, or a data set by name.

    Args:
        data: an image, a folder of images in any layout, or what `open_labelled` takes. The label of an image is its
            first folder below `data`, or below a split's folder in `data`; None if there is none.
        root, split, options: see `open_labelled`. Without `split`, all images of a folder are used.

    Raises:
        DataError: if there is no such data set or split, or no image.
    """
    path = Path(data)
    if split is not None and root is None and path.is_dir():
        part = find_part(path, split)
        if part is None:
            raise DataError(f"{data} has no {split} folder")
        path = part
    if root is not None or not path.exists() or path.suffix.lower() in _NOT_IMAGES:
        return _open_named(data, root, split, options)
    paths = find_images([str(path)])
    splits = [part for part in (find_part(path, name) for name in _SPLITS) if part is not None]
    return ImageSet([str(file) for file in paths], [_label(file, path, splits) for file in paths], _Files(paths))


def _open_named(data: str, root: str | os.PathLike[str] | None, split: str | None, options: Any) -> ImageSet:
    if is_label_table(data):
        opened = LabelledSplit(data, split, open_listed(data, root, split))
    else:
        opened = open_labelled(data, root, split, **options)
    if isinstance(opened.source, Stream):
        raise DataError(f"{data} is read as a stream without an index; embed a folder or a data set that has one")
    names = [opened.image_name(index) for index in range(len(opened.source))]
    known = getattr(opened.source, "labels", None)
    labels: list[str | None] = [None] * len(names)
    if known is not None:  # several labels, from a table
        labels = [
            BETWEEN.join(opened.class_names[place] for place in flat_labels([label])) or BETWEEN for label in known
        ]
    return ImageSet(names, labels, opened.source)


def _label(file: Path, folder: Path, splits: Sequence[Path]) -> str | None:
    for place in (*splits, folder):
        if file.is_relative_to(place):
            return next(iter(file.relative_to(place).parts[:-1]), None)
    return None


# ---- features ----


def pooled_features(model: Any, images: Tensor) -> Tensor:
    """Features [B, D] float32 of preprocessed images [B, C, height, width]: the input of the head's last layer."""
    return logits_and_features(model, images)[1]


def check_features(model: Any) -> None:
    """Raise GlitError if a model has no features."""
    if not hasattr(model, "forward_head"):
        raise GlitError("this model has no features before its head; take another one")


def logits_and_features(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, K] and `pooled_features` [B, D] of preprocessed images [B, C, height, width], in one pass."""
    tokens = model.forward_features(images)
    return model.forward_head(tokens), model.forward_head(tokens, pre_logits=True).flatten(1).float()


def embed(
    classifier: Classifier, images: Any, batch_size: int = 32, num_workers: int = 0, doing: str = "embedding"
) -> Iterator[tuple[Tensor, Tensor, Sequence[str]]]:
    """Compute the features of a data set's images in batches, with a progress bar on a terminal.

    Args:
        classifier: a timm model and its preprocessing.
        images: map-style pairs of (RGB PIL image, label), or a `Stream`.

    Yields:
        Features [B, D] float32 on the CPU, labels [B], and for each image why it cannot be read, or ''. The features
        of a broken image are NaN, and its label is -1.

    Raises:
        GlitError: if the model has no features.
        WeightsError: if it returns values that are not finite.
    """
    model = classifier.model
    check_features(model)
    classifier.check_memory(min(batch_size, len(images)), "take a smaller ", Argument("batch_size"))
    for batch, labels, reasons in readable_batches(images, classifier.transform, batch_size, num_workers, doing):
        with torch.inference_mode():
            pooled = pooled_features(model, batch.to(classifier.device))
        features = pooled.cpu().clone()  # outside inference mode, so that it can be used for training
        if not bool(features.isfinite().all()):
            raise WeightsError("the model's features are not finite: its weights are damaged, or its numbers overflow")
        features[torch.tensor([bool(reason) for reason in reasons])] = torch.nan
        yield features, labels, reasons


# ---- files of features ----


def check_embedding(out: Path) -> None:
    """Raise GlitError if `out` could not be written. For use before the work."""
    row_table.check_table(out, _WRITERS, "a file of features")
    beside = out.with_suffix(".csv")
    if out.suffix == ".npy" and beside.exists() and not part_of(out).exists():
        raise GlitError(f"{beside}, which lists the images of {out}, exists; remove it or give another name")


def write_embedding(
    out: Path, classifier: Classifier, data: ImageSet, about: Mapping[str, Any], batch_size: int = 32,
    num_workers: int = 0,
) -> tuple[int, int]:  # fmt: skip
    """Write the features of images to a file, or resume an unfinished one.

    Args:
        out: `.npy`, with a CSV file next to it that lists the images; `.csv`; or `.parquet`. Has passed
            `check_embedding`. Each image has a row; if it cannot be read, its features are NaN or empty.
        about: the settings that determine the features, such as the model; an unfinished file must have the same.

    Returns:
        The number of images, and how many of them could not be read.

    Raises:
        GlitError, WriteError: see `row_table.write_table` and `embed`.
    """

    def make(left: Sequence[int]) -> Iterator[Row]:
        positions = iter(left)
        for features, _, reasons in embed(classifier, Subset(data.images, left), batch_size, num_workers):
            for row, reason in zip(features.numpy(), reasons, strict=True):
                index = next(positions)
                head = {"image": data.names[index], "label": data.labels[index]}
                yield head | ({"error": reason} if reason else {"features": base64.b64encode(row).decode()})

    def write(path: Path, rows: Rows) -> None:
        _WRITERS[out.suffix](path, out, rows)

    return row_table.write_table(out, data.names, make, about, write)


def _features(row: Row) -> np.ndarray | None:
    """Features [D] float32; None for an image that cannot be read."""
    text = row.get("features")
    return None if text is None else np.frombuffer(base64.b64decode(text), np.float32)


def _num_features(rows: Rows) -> int:
    return next((len(features) for features in map(_features, rows()) if features is not None), 0)


def _write_npy(path: Path, out: Path, rows: Rows) -> None:
    columns = ("image", "label", "error")
    with whole_file(out.with_suffix(".csv")) as beside:
        write_csv(beside, columns, ({key: row.get(key) for key in columns} for row in rows()))
    count, width = sum(1 for _ in rows()), _num_features(rows)
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (count, width)}
        np.lib.format.write_array_header_1_0(file, header)
        for features in map(_features, rows()):
            file.write((np.full(width, np.nan, np.float32) if features is None else features).tobytes())


def _write_csv(path: Path, out: Path, rows: Rows) -> None:
    names = [f"feature_{index}" for index in range(_num_features(rows))]

    def flat(row: Row) -> Row:
        features = _features(row)
        values = () if features is None else map(str, features)
        return {key: row.get(key) for key in ("image", "label", "error")} | dict(zip(names, values, strict=False))

    write_csv(path, ("image", "label", *names, "error"), map(flat, rows()))


def _write_parquet(path: Path, out: Path, rows: Rows) -> None:
    pyarrow, _ = import_pyarrow()
    types = dict.fromkeys(("image", "label", "features", "error"), pyarrow.string())
    types["features"] = pyarrow.list_(pyarrow.float32())
    write_parquet(path, types, (row | {"features": _features(row)} for row in rows()))


_WRITERS: dict[str, Callable[[Path, Path, Rows], None]] = {
    ".npy": _write_npy, ".csv": _write_csv, ".parquet": _write_parquet,
}  # fmt: skip
