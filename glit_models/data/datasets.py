"""From a data set's name to its three splits: training, validation held out of it, and test."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DataError, first_line
from .fashion_mnist import FashionMNIST

__all__ = ["Splits", "Subset", "open_split", "open_splits"]


class Subset:
    """The members of `dataset` (map-style, pairs of PIL picture and label) at `indices`."""

    def __init__(self, dataset: Any, indices: Sequence[int]) -> None:
        self.dataset = dataset
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.dataset[self.indices[index]]


@dataclass(frozen=True)
class Splits:
    """Three map-style data sets of (PIL picture, label) and the class names in label order.

    Choices are made on `validation`; `test` is for the end. Where a data set has only two parts, `test` is None.
    """

    train: Any
    validation: Any
    test: Any | None
    class_names: tuple[str, ...]


def open_splits(
    name: str, root: str | os.PathLike[str] | None = None, hold_out: int = 0, limit: int | None = None, seed: int = 0
) -> Splits:
    """Open a data set by name.

    Args:
        name: 'fashion-mnist', 'folder' (`root/train/CLASS/*`, `root/val/CLASS/*`), or any name that
            `timm.data.create_dataset` takes, such as 'hfds/...' or 'torch/...'.
        root: the data set's folder; Fashion-MNIST is found or downloaded without.
        hold_out: how many training pictures, drawn by `seed`, become the validation set. 0 takes the data set's own
            validation split instead.
        limit: keep only the first `limit` of the training pictures so drawn.
        seed: of the draw.

    Raises:
        DataError: if it is missing, damaged or too small; names it.
    """
    test: Any | None = None
    if name == "fashion-mnist":
        train, test = FashionMNIST("train", root), FashionMNIST("test", root)
        names: tuple[str, ...] = FashionMNIST.classes
        if not hold_out:
            raise DataError("fashion-mnist has no validation split of its own; set data.hold_out")
    else:
        train = _open_timm(name, root, "train")
        names = _class_names(train)
        if hold_out:
            test = _open_timm(name, root, "validation")
    order = np.random.default_rng(seed).permutation(len(train))
    if len(train) <= hold_out:
        raise DataError(f"{name} has {len(train)} training pictures, too few to hold out {hold_out}")
    validation = Subset(train, np.sort(order[:hold_out]).tolist()) if hold_out else _open_timm(name, root, "validation")
    kept = order[hold_out:][: limit or None]
    return Splits(Subset(train, np.sort(kept).tolist()), validation, test, names)


def open_split(name: str, root: str | os.PathLike[str] | None, split: str) -> tuple[Any, tuple[str, ...]]:
    """One split of a data set as it is published, and its class names; names as in `open_splits`.

    Raises:
        DataError: if it is missing or damaged; names it.
    """
    if name == "fashion-mnist":
        return FashionMNIST(split, root), FashionMNIST.classes
    dataset = _open_timm(name, root, split)
    return dataset, _class_names(dataset)


def _open_timm(name: str, root: str | os.PathLike[str] | None, split: str) -> Any:
    from timm.data import create_dataset

    if name == "folder" and (root is None or not os.path.isdir(root)):
        raise DataError(f"data.root {root}: no such folder")
    try:
        dataset = create_dataset("" if name == "folder" else name, root=root, split=split)
    except (RuntimeError, ValueError, OSError, ImportError, AssertionError) as error:
        raise DataError(f"{name} {split} split in {root}: {first_line(error)}") from None
    return dataset


def _class_names(dataset: Any) -> tuple[str, ...]:
    mapping = getattr(getattr(dataset, "reader", dataset), "class_to_idx", None)
    if not mapping:
        raise DataError("the data set does not name its classes")
    return tuple(sorted(mapping, key=mapping.__getitem__))
