"""Open a data set's training, validation and test splits by its name, and check that they share no images."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..errors import Argument, DataError
from .fashion_mnist import FashionMNIST
from .label_table import Label, flat_labels, is_label_table
from .sources import ImageList, Images, Source, Stream, is_folder, open_source, part_of

__all__ = ["Splits", "Subset", "open_splits", "share_images"]

_SIZES = 1000  # files whose size is part of a fingerprint


class Subset:
    """The members of `dataset` (map-style, pairs of PIL image and label) at `indices`."""

    def __init__(self, dataset: Any, indices: Sequence[int]) -> None:
        self.dataset = dataset
        self.indices = indices
        self.label_width: int | None = getattr(dataset, "label_width", None)  # as in `Images`

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.dataset[self.indices[index]]

    def filename(self, index: int) -> str:
        """A name of the image for messages, if `dataset` has one."""
        return self.dataset.filename(self.indices[index])


@dataclass(frozen=True)
class Splits:
    """Three data sets of (RGB PIL image, label), map-style or each a `Stream`, and the class names in label order.

    Use `validation` for choices and `test` for the final score. If a data set has only two parts, `test` is None.
    """

    train: Any
    validation: Any
    test: Any | None
    class_names: tuple[str, ...]

    @property
    def is_multilabel(self) -> bool:
        """Whether images have several labels, or none: see `Images`."""
        return getattr(self.validation, "label_width", None) is not None

    def train_labels(self) -> list[Label] | None:
        """The labels of the training images; None if they are unknown without reading the images."""
        labels = getattr(self.train.dataset, "labels", None) if isinstance(self.train, Subset) else None
        return None if labels is None else [labels[index] for index in self.train.indices]

    def count_train(self) -> list[int] | None:
        """The number of training images of each class; None if that is unknown without reading them."""
        labels = self.train_labels()
        if labels is None:
            return None
        counts = Counter(flat_labels(labels))
        return [counts[label] for label in range(len(self.class_names))]

    def fingerprint(self) -> str | None:
        """A hash of what an image folder, a table of images or Fashion-MNIST contains, wherever it is; else None.

        It covers the class names, and for each split, before images are held out, the paths of the images without
        their common start, their labels, and the sizes of a thousand of the files.
        """
        digest = hashlib.sha256("\0".join(self.class_names).encode())
        splits = [split for split in (self.train, self.validation, self.test) if split is not None]
        parts = [part for split in splits for part in getattr(split, "datasets", (split,))]
        whole = [part.dataset if isinstance(part, Subset) else part for part in parts]
        for images in {id(images): images for images in whole}.values():
            if isinstance(images, FashionMNIST):
                digest.update(images.images.tobytes() + images.labels.tobytes())
                continue
            listed = getattr(images, "dataset", None)
            if not isinstance(listed, ImageList) or not len(listed):
                return None
            paths, labels = zip(*listed.samples, strict=True)
            start = len(os.path.commonprefix([min(paths), max(paths)]))  # noqa: RUF071 (any common start will do)
            some = paths[:: len(paths) // _SIZES + 1]
            sizes = [os.path.getsize(path) for path in some if os.path.exists(path)]
            digest.update(os.fsencode("\0".join(path[start:] for path in paths)) + repr((labels, sizes)).encode())
        return digest.hexdigest()


def open_splits(
    dataset: str,
    root: str | os.PathLike[str] | None = None,
    hold_out: int = 0,
    limit: int | None = None,
    seed: int = 0,
    *,
    train_split: str = "train",
    validation_split: str = "validation",
    test_split: str | None = None,
    download: bool = False,
    input_key: str | None = None,
    target_key: str | None = None,
) -> Splits:
    """Open a data set by name; the arguments are the keys of a recipe's `data`.

    Args:
        dataset, root, download, input_key, target_key: see `open_source`.
        hold_out: number of training images, drawn at random by `seed`, for the validation set; from an image folder,
            each class gives its share and at least one. 0 uses `validation_split` instead.
        limit: maximum number of training images; the first ones drawn are kept.
        seed: seed of the draw.
        train_split, validation_split, test_split: names in the data set; an image folder's splits also have their usual
            synonyms. Without `test_split`, the test set is Fashion-MNIST's own, or the validation folder if `hold_out`
            leaves it unused, or None.

    Raises:
        DataError: if a split is missing, damaged or too small, has other classes than the training split, or shares
            images with another; names it.
    """
    open_one = partial(open_source, dataset, root, download=download, input_key=input_key, target_key=target_key)
    if test_split is None:
        test_split = _usual_test_split(dataset, root, hold_out, validation_split)
    names = {"train": train_split, "validation": None if hold_out else validation_split, "test": test_split}
    _refuse_shared_images(dataset, root, names)
    if dataset == "fashion-mnist" and not hold_out:
        raise DataError("fashion-mnist has no validation split of its own; set ", Argument("hold_out"))
    train = open_one(train_split, training=True)
    if isinstance(train, Stream) and (hold_out or limit):
        key = "hold_out" if hold_out else "limit"
        raise DataError(Argument(key), f" cannot be set for {dataset}, which is read as a stream without an index")
    held_out, kept = _draw(train, dataset, hold_out, seed)
    if hold_out:
        validation: Any = Subset(train, held_out)
    else:
        validation = _open_validation(open_one, dataset, root, validation_split)
    test = open_one(test_split) if test_split is not None else None
    for split, source in ((validation_split, None if hold_out else validation), (test_split, test)):
        if source is not None:
            _refuse_other_classes(dataset, train, source, str(split))
    members = train if isinstance(train, Stream) else Subset(train, sorted(kept[: limit or None]))
    return Splits(members, validation, test, train.classes)


def _usual_test_split(
    dataset: str, root: str | os.PathLike[str] | None, hold_out: int, validation_split: str
) -> str | None:
    if dataset == "fashion-mnist":
        return "test"
    return validation_split if hold_out and part_of(dataset, root, validation_split) else None


def _open_validation(open_one: Any, dataset: str, root: Any, split: str) -> Source:
    try:
        return open_one(split)
    except DataError as error:
        if is_folder(dataset) or is_label_table(dataset):
            raise DataError(
                *error.message.parts, "; set ", Argument("hold_out"), " to validate on some of the training images"
            ) from None
        raise


# ---- held-out images ----


def _draw(train: Source, name: str, hold_out: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the held-out images, sorted, and of the others, in the order in which they were drawn."""
    if isinstance(train, Stream):
        return [], []
    if len(train) <= hold_out:
        raise DataError(f"{name} has {len(train)} training images, too few to hold out {hold_out}")
    order = np.random.default_rng(seed).permutation(len(train))
    chosen = order[:hold_out]
    if hold_out and isinstance(train, Images) and train.labels is not None and train.label_width is not None:
        kept = _one_of_each(train.labels, order.tolist())
        chosen = np.array([index for index in order.tolist() if index not in kept][:hold_out], np.int64)
        if len(chosen) < hold_out:
            raise DataError(
                Argument("hold_out"),
                f" must be at most {len(chosen)}, so that every class has an image to train on, got {hold_out}",
            )
    elif hold_out and isinstance(train, Images) and train.labels is not None:
        drawn = np.array(train.labels)[order]
        shares = _shares(np.bincount(drawn, minlength=len(train.classes)), hold_out)
        chosen = np.concatenate([order[drawn == label][:share] for label, share in enumerate(shares)])
    held_out = set(chosen.tolist())
    return sorted(held_out), [index for index in order.tolist() if index not in held_out]


def _one_of_each(labels: Sequence[Any], order: Sequence[int]) -> set[int]:
    """Choose the first images, in this order, so that every class of several labels has one for training."""
    kept, seen = set(), set[int]()
    for index in order:
        if not seen.issuperset(labels[index]):
            kept.add(index)
            seen.update(labels[index])
    return kept


def _shares(counts: np.ndarray, hold_out: int) -> list[int]:
    """The number of images of each class to hold out: in proportion, but at least one of each and not all of them.

    A class with a single image keeps it for training.
    """
    least, most = np.minimum(1, counts - 1).clip(0), (counts - 1).clip(0)
    if not least.sum() <= hold_out <= most.sum():
        raise DataError(
            Argument("hold_out"),
            f" must be from {least.sum()} to {most.sum()}, so that every class with two images or more "
            f"has one to train and one to validate on, got {hold_out}",
        )
    quota = counts * (hold_out / counts.sum())
    shares = np.floor(quota).astype(int).clip(least, most)
    while shares.sum() != hold_out:  # at most one step per class and per image that a bound moved
        step = 1 if shares.sum() < hold_out else -1
        gain = np.where((shares + step >= least) & (shares + step <= most), step * (quota - shares), -np.inf)
        shares[int(gain.argmax())] += step
    return shares.tolist()


# ---- checks of the splits ----


def _refuse_shared_images(dataset: str, root: Any, names: dict[str, str | None]) -> None:
    """Reject splits that overlap: the score would include images that were used for training or selection."""
    given = [(f"{key}_split", split) for key, split in names.items() if split is not None]
    for index, (key, split) in enumerate(given):
        for other_key, other in given[:index]:
            if share_images(dataset, root, split, other):
                raise DataError(
                    Argument(other_key, other), " and ", Argument(key, split), f" share images of {dataset}; "
                    "name another split, or set ", Argument("hold_out"),
                )  # fmt: skip


def share_images(dataset: str, root: Any, first: str, second: str) -> bool:
    """Whether two splits of a data set have images in common, judging by their names."""
    if (part := part_of(dataset, root, first)) is not None and part == part_of(dataset, root, second):
        return True
    if dataset.startswith("torch/"):
        both = [split in ("train", "training") for split in (first, second)]
        if dataset.rpartition("/")[2] in ("cifar10", "cifar100", "mnist", "kmnist", "qmnist", "fashion_mnist"):
            return both[0] == both[1]  # these have two parts, and timm takes every name but 'train' for the test part
    return any(_slices_overlap(a, b) for a in first.split("+") for b in second.split("+"))


_SLICE = re.compile(r"(?P<name>[^\[\]]+)(\[(?P<start>\d*%?):(?P<end>\d*%?)\])?")


def _slices_overlap(first: str, second: str) -> bool:
    """Whether slices such as 'train[:90%]' and 'train[90%:]' overlap, judging by their text."""
    a, b = _SLICE.fullmatch(first.strip()), _SLICE.fullmatch(second.strip())
    if a is None or b is None:
        return first == second
    if a["name"] != b["name"]:
        return False
    bounds = [bound for match in (a, b) for bound in (match["start"], match["end"]) if bound]
    if len({bound.endswith("%") for bound in bounds}) > 1:
        return False  # a percentage and a count: depends on the size of the data set
    spans = [(_number(match["start"], 0), _number(match["end"], float("inf"))) for match in (a, b)]
    return max(start for start, _ in spans) < min(end for _, end in spans)


def _number(bound: str | None, default: float) -> float:
    return float(bound.rstrip("%")) if bound else default


def _refuse_other_classes(dataset: str, train: Source, other: Source, split: str) -> None:
    """Reject splits with other classes: labels are indices into the list of classes, so they would change meaning."""
    unknown = [name for name in other.classes if name not in train.classes]
    missing = [name for name in train.classes if name not in other.classes]
    if unknown or (missing and is_folder(dataset)):
        which = f"has {', '.join(unknown[:3])}" if unknown else f"lacks {', '.join(missing[:3])}"
        raise DataError(
            f"{dataset}: the {split} split {which}, unlike the training split; they must have the same classes"
        )
