"""Open the split that a model is scored on, by a folder's path or a data set's name.

`sources.py` opens it. `match_classes` matches its classes with a model's, by name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import Argument, DataError
from .datasets import share_images
from .label_table import is_label_table, read_label_table
from .sources import KINDS, Source, is_folder, open_source, part_of

__all__ = ["LabelledSplit", "match_classes", "open_labelled", "open_training"]


@dataclass(frozen=True)
class LabelledSplit:
    """A source of (RGB PIL image, label) pairs, the data set's name or folder, and its split.

    `split` is None if the folder contains the class folders directly.
    """

    name: str
    split: str | None
    source: Source

    def __str__(self) -> str:
        return self.name if self.split is None else f"{self.name} {self.split}"

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class names, in label order."""
        return self.source.classes

    @property
    def is_multilabel(self) -> bool:
        """Whether images have several labels, or none: see `Images`."""
        return getattr(self.source, "label_width", None) is not None

    def image_name(self, index: int) -> str:
        """The name of an image in messages: its file if it has one."""
        filename = getattr(self.source, "filename", None)
        return filename(index) if filename is not None else f"image {index} of {self}"


def open_labelled(
    name: str, root: str | os.PathLike[str] | None = None, split: str | None = None, **options: Any
) -> LabelledSplit:
    """Open one split to score on.

    Args:
        name: 'fashion-mnist', what `timm.data.create_dataset` takes ('torch/...', 'hfds/...'), a table of labels, or a
            folder: of class folders, or of `test`, `val` or `train` folders that contain class folders. 'folder' is the
            folder `root`.
        root: the folder of the named data set, or of a table's images.
        split: name in the data set. None uses the test split, or a folder's validation split if it has no test split.
        options: `download`, `input_key` and `target_key` of `open_source`.

    Raises:
        DataError: if there is no such data set or split.
    """
    if is_folder(name):
        if root is None:
            raise DataError(f"{name}: give the folder's path in place of the word, or as ", Argument("root"))
        return _open_folder(Path(root), split)
    if is_label_table(name):
        return _open_parts(name, name, root, split)
    if name != "fashion-mnist" and Path(name).exists():
        if root is not None:
            raise DataError(f"{name} is a folder, which is all that is needed; leave out ", Argument("root"))
        return _open_folder(Path(name), split)
    if name != "fashion-mnist" and name.partition("/")[0].lower() not in KINDS:
        kinds = ", ".join(f"{kind}/NAME" for kind in KINDS)
        raise DataError(f"{name}: no such folder, and no data set (fashion-mnist, {kinds})")
    split = split or "test"
    return LabelledSplit(name, split, open_source(name, root, split, **options))


def open_training(data: LabelledSplit, root: str | os.PathLike[str] | None = None, **options: Any) -> LabelledSplit:
    """Open the training split that belongs to a scored one; `root` and `options` are those that opened it.

    Raises:
        DataError: if there is none, or if it is the split that is scored.
    """
    if data.split is None:
        way_out = "in its column split" if is_label_table(data.name) else "in train/CLASS/*"
        raise DataError(f"{data} has no train split; it takes one {way_out}, in addition to the images that are scored")
    is_path = data.name != "fashion-mnist" and not is_label_table(data.name) and Path(data.name).exists()
    dataset, place = ("folder", data.name) if is_path else (data.name, root)
    if share_images(dataset, place, data.split, "train"):
        raise DataError(f"{data} is what is trained on; score another split")
    return open_labelled(data.name, None if is_path else root, "train", **options)


def _open_folder(folder: Path, split: str | None) -> LabelledSplit:
    if not folder.exists():
        raise DataError(f"{folder}: no such folder")
    return _open_parts(str(folder), "folder", folder, split)


def _open_parts(name: str, dataset: str, root: str | os.PathLike[str] | None, split: str | None) -> LabelledSplit:
    """Open a split of a folder or a table; without splits, all of it is the training split."""
    if split is None:
        split = next((kind for kind in ("test", "validation") if part_of(dataset, root, kind)), None)
    has_splits = read_label_table(name, root).has_splits if dataset != "folder" else part_of(dataset, root, "train")
    if split is None and has_splits:
        raise DataError(f"{name} has only a train split; to score on that, name it")
    return LabelledSplit(name, split, open_source(dataset, root, split or "train"))


# ---- matching the classes of the data with the model's ----


def match_classes(
    data: str, data_names: Sequence[str], model_names: Sequence[str] | None, num_classes: int
) -> tuple[tuple[int, ...], str]:
    """The model's class for each label of the data, and whether classes were matched by 'name' or by 'position'.

    By name if the model has names and all of the data's are among them, in any order: `T-shirt_top`, which is a valid
    folder name, matches `T-shirt/top`. By position if no name contradicts it.

    Raises:
        DataError: if the numbers of classes differ, or if some names are in both lists at different positions, so that
            matching by position would silently give a wrong score.
    """
    keys, theirs = _comparable(model_names or (), data_names)
    own = {key: index for index, key in enumerate(keys)}
    if own and set(theirs) <= set(own):
        return tuple(own[key] for key in theirs), "name"
    unknown = [name for name, key in zip(data_names, theirs, strict=True) if key not in own]
    shared = len(data_names) - len(unknown)
    complaint = f"; not among the model's: {', '.join(map(repr, unknown[:3]))}" if shared else ""
    if len(data_names) != num_classes:
        count = "one class" if len(data_names) == 1 else f"{len(data_names)} classes"
        raise DataError(f"{data} has {count}, the model {num_classes}{complaint}")
    if any(own.get(key, index) != index for index, key in enumerate(theirs)):
        raise DataError(f"{data} has {shared} of the model's class names, but in another order{complaint}")
    return tuple(range(num_classes)), "position"


def _comparable(*lists: Sequence[str]) -> tuple[list[str], ...]:
    """The names reduced to letters and digits if they stay distinct, else unchanged, else none of the first."""
    folded = tuple([re.sub(r"[\W_]+", " ", name).strip().casefold() for name in names] for names in lists)
    plain = tuple(list(names) for names in lists)
    for form in (folded, plain):
        if all(len(set(names)) == len(names) for names in form):
            return form
    return ([], *plain[1:])
