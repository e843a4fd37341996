"""Open one split of a data set by its name: as map-style `Images` if possible, else as a `Stream`.

`timm.data.create_dataset` opens most of them. This module rejects mistakes that timm would not report: a missing split,
an image that cannot be read, classes without names. Independent of training and batches.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import UNPRINTABLE, Argument, DataError, first_line, printable
from .fashion_mnist import FashionMNIST
from .image_files import list_images, natural_key, open_image, to_rgb
from .label_table import Label, is_label_table, read_label_table

__all__ = ["KINDS", "Images", "Source", "Stream", "find_part", "is_folder", "is_streamed", "open_listed", "open_source",
           "part_of"]  # fmt: skip

_PACKAGES = {"hfds": "datasets", "hfids": "datasets", "wds": "webdataset", "tfds": "tensorflow_datasets"}
_STREAMED = ("hfids", "wds", "tfds")
KINDS = ("torch", *_PACKAGES)
_NUMBERS = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})")  # in file names: train-{0000..0009}.tar
_MOST_SHARDS = 100_000
_SYNONYMS = (("train", "training"), ("validation", "val", "valid", "eval", "evaluation"))


class Images:
    """A map-style data set of timm or torchvision as pairs of (RGB PIL image, label).

    A label is the index of a class. With several labels per image it is [K] float32, 1 for each class of the image.

    Args:
        dataset: returned by `timm.data.create_dataset`, or an `ImageList`.
        classes: class names, in label order.
        labels: of all images, if they are known without reading the images; else None.
        is_multilabel: whether `dataset` has the indices of several classes for each image.

    Attributes:
        label_width: K with several labels per image, else None.
    """

    def __init__(
        self, dataset: Any, classes: tuple[str, ...], labels: Sequence[Label] | None, is_multilabel: bool = False
    ) -> None:
        self.label_width = len(classes) if is_multilabel else None
        self.dataset = dataset
        self.classes = classes
        self.labels = labels
        self._process = os.getpid()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        """Raises DataError if the image is damaged or its label is not one of the data set's; names its file."""
        try:
            image, label = self._read(index)
        except DataError:
            raise
        except Exception as error:  # decoders can raise anything on damaged files
            raise DataError(f"{self.filename(index)}: cannot be read ({first_line(error)})") from None
        if self.label_width is not None:
            several = np.zeros(self.label_width, np.float32)
            several[list(label)] = 1
            return image, several
        if label is None or not 0 <= int(label) < len(self.classes):
            raise DataError(
                f"{self.filename(index)}: its label must be one of the {len(self.classes)} classes, got {label}"
            )
        return image, int(label)

    def filename(self, index: int) -> str:
        """The name of the image in messages: its file if the data set knows one."""
        if isinstance(self.dataset, ImageList):
            return str(self.dataset.samples[index][0])
        name = self.dataset.filename(index, absolute=True) if hasattr(self.dataset, "filename") else None
        return str(name or f"image {index} of the data set")

    def _read(self, index: int) -> tuple[Image.Image, Any]:
        if isinstance(self.dataset, ImageList):
            path, label = self.dataset.samples[index]
            return open_image(path), label
        if not hasattr(self.dataset, "reader"):
            image, label = self.dataset[index]
            return to_rgb(image), label
        # Not through timm's indexing, which skips an image that cannot be read and returns the next one.
        reader = self.dataset.reader
        if hasattr(reader, "tar_state") and self._process != os.getpid():
            self._process = os.getpid()
            _forget_open_files(reader)
        file, label = reader[index]
        with file:
            return open_image(file, self.filename(index)), label


def _forget_open_files(reader: Any) -> None:
    """Let this process open its own tar file: one opened before a fork shares its position with the parent."""
    reader.tar_state.tf = None
    for child in reader.tar_state.children.values():
        child.tf = None


class Stream:
    """The images of an iterable timm data set (WebDataset, TensorFlow Datasets, streamed Hugging Face data sets).

    It has a length but no index: images come in an order that the library derives from (seed, epoch), the number of
    processes and the number of workers; some may come twice and others not at all. A resumed epoch is read again from
    its start, skipping the images already used. It has the same number of images as an uninterrupted epoch, but if
    the library reads in parallel (TensorFlow Datasets), not exactly the same batches.
    """

    labels = None

    def __init__(self, dataset: Any, classes: tuple[str, ...], name: str) -> None:
        self.dataset = dataset
        self.classes = classes
        self.name = name

    def __len__(self) -> int:
        return int(self.dataset.reader.num_samples)

    def read(self, seed: int, epoch: int, part_size: int = 1, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Yield the (RGB PIL image, label) pairs of process `rank` and of the current worker.

        If the split was opened for training, the order changes each epoch, and images are repeated from the start if
        there are too few for whole parts of `part_size`.
        """
        reader = copy.copy(self.dataset.reader)  # timm's readers keep state from the first pass
        reader.dist_rank, reader.dist_num_replicas = rank, world_size
        reader.batch_size = part_size
        state = np.random.SeedSequence((seed, epoch)).generate_state(2)
        reader.common_seed, reader.worker_seed = int(state[0]) // 2, int(state[1]) // 2
        reader.set_epoch(epoch)
        try:
            for image, label in reader:
                if not 0 <= int(label) < len(self.classes):
                    raise DataError(f"{self.name}: a label must be one of the {len(self.classes)} classes, got {label}")
                yield to_rgb(image), int(label)
        except DataError:
            raise
        except Exception as error:  # all errors of the library concern the data
            raise DataError(f"{self.name} cannot be read: {first_line(error)}") from None


Source = Images | Stream | FashionMNIST


def is_folder(name: str) -> bool:
    """Whether the data set called `name` is a folder (or tar file) of classes, read by timm or by torchvision."""
    return name in ("folder", "torch/folder", "torch/image_folder")


def find_part(root: str | os.PathLike[str], split: str) -> Path | None:
    """The folder or tar file of a split below `root`, such as `root/val` or `root/train.tar`; None if missing."""
    names = next((group for group in _SYNONYMS if split in group), ())
    for name in (split, *names):
        for path in (Path(root) / name, Path(root) / f"{name}.tar"):
            if path.is_dir() or (path.suffix == ".tar" and path.is_file()):
                return path
    return None


def part_of(name: str, root: str | os.PathLike[str] | None, split: str) -> Path | str | None:
    """The location of a split in a folder or a table of labels: the same for two names of one split; None if missing.

    It is also None for data sets that are neither.
    """
    if is_label_table(name):
        return read_label_table(name, root).part(split)
    return find_part(root, split) if is_folder(name) and root is not None else None


def open_source(
    name: str,
    root: str | os.PathLike[str] | None,
    split: str,
    *,
    training: bool = False,
    download: bool = False,
    input_key: str | None = None,
    target_key: str | None = None,
) -> Source:
    """Open one split.

    Args:
        name: 'fashion-mnist', 'folder', the path of a table of labels (see `read_label_table`), or what
            `timm.data.create_dataset` takes: 'torch/...', 'hfds/...', 'hfids/...', 'wds/...', 'tfds/...'.
        root: the data set's folder; for 'folder' also a tar file; for a table, the folder of its images, if different.
        split: name in the data set. A folder without folders of splits is its own training split.
        training: let a stream come in a new order each epoch.
        download: allow the library to download the data set.
        input_key: the column of the images, if it is not the one that timm expects.
        target_key: likewise for the labels.

    Raises:
        DataError: if the data set is missing or damaged; names it.
    """
    if name == "fashion-mnist":
        return FashionMNIST(split, root)
    if is_folder(name):
        return _open_folder(name, root, split)
    if is_label_table(name):
        return open_listed(name, root, split)
    kind = name.partition("/")[0].lower()
    if kind not in KINDS:
        raise DataError(
            f"no data set {name!r}; there are fashion-mnist, folder, {', '.join(f'{kind}/NAME' for kind in KINDS)}"
        )
    if root is None and kind in ("torch", "wds"):
        raise DataError(f"{name} needs ", Argument("root", ...), ", the folder where it is")
    _refuse_commands_and_urls(kind, name, root, split)
    _require_package(kind, name)
    keys: dict[str, Any] = {"input_key": input_key, "target_key": target_key} if kind != "torch" else {}
    if kind in ("hfds", "hfids"):
        keys = _columns_of_table(name, root, keys, download or kind == "hfds")
    options = keys if kind == "hfds" else {**keys, "download": download}
    if is_streamed(name):
        options["is_training"] = training
    if kind in ("hfids", "wds"):
        options["input_img_mode"] = ""  # unconverted, for `to_rgb`
    # webdataset interprets file names as URLs and commands, unless they begin with the path of a folder.
    place = os.path.abspath(root) if root is not None and kind == "wds" else root
    dataset = _create(name, place, split, **options)
    names = _class_names(dataset, name, root)
    return Stream(dataset, names, f"{name} {split}") if is_streamed(name) else Images(dataset, names, None)


def is_streamed(name: str) -> bool:
    """Whether a data set of this name is read as a `Stream`."""
    return name.partition("/")[0].lower() in _STREAMED


def open_listed(name: str, root: str | os.PathLike[str] | None, split: str | None) -> Images:
    """The images of a split that a table lists; None for all splits. Raises as `read_label_table`."""
    table = read_label_table(name, root)
    samples = table.samples(split)
    labels = [label for _, label in samples]
    return Images(ImageList(table.classes, samples), table.classes, labels, table.is_multilabel)


def _open_folder(name: str, root: str | os.PathLike[str] | None, split: str) -> Images:
    if root is None:
        raise DataError(f"{name} needs ", Argument("root", ...), ", the folder where it is")
    if not os.path.exists(root):
        raise DataError(Argument("root"), f" {root}: no such folder")
    path = Path(root)
    if path.is_dir():
        part = find_part(root, split)
        parts = [p for p in (find_part(root, s) for s in ("train", "validation", "test")) if p is not None]
        if part is None and (split not in _SYNONYMS[0] or parts):
            inside = f"only {', '.join(p.name for p in parts)}" if parts else "no folders of splits"
            raise DataError(f"{root} has no {split} folder, {inside}")
        path = part or path
    elif path.suffix != ".tar":
        raise DataError(Argument("root"), f" {root}: neither a folder nor a .tar file")
    if path.is_dir():
        dataset = ClassFolder(path, natural=name == "folder")
        return Images(dataset, dataset.classes, [label for _, label in dataset.samples])
    dataset = _create("", path, split)
    labels = _label_by_first_folder(dataset.reader)
    return Images(dataset, _class_names(dataset, name, path), labels)


class ImageList:
    """Image files with their labels.

    Attributes: `classes`, their names in label order; `samples`, pairs of path and label.
    """

    def __init__(self, classes: tuple[str, ...], samples: Sequence[tuple[str, Label]]) -> None:
        self.classes = classes
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)


class ClassFolder(ImageList):
    """A folder of class folders. Each folder in it is a class, with all images in it and in its subfolders.

    Args:
        natural: sort classes and files as timm does, 'class 2' before 'class 10'; else as torchvision does.

    Raises:
        DataError: if an image is in no class folder, a class folder has none, or there are no images at all.
    """

    def __init__(self, folder: Path, natural: bool = True) -> None:
        found: dict[str, list[str]] = {}
        start = len(os.path.join(folder, ""))
        for path in list_images(folder):
            name, *below = path[start:].split(os.sep, 1)
            if not below:
                raise DataError(f"{path} lies in no class folder; images belong in {folder}/CLASS/")
            found.setdefault(name, []).append(path)
        if not found:
            raise DataError(f"{folder} holds no images; they belong in {folder}/CLASS/")
        if unfit := next(filter(UNPRINTABLE.search, found), None):
            place = printable(f"{folder}/{unfit}")
            raise DataError(f"{place}: a class name must be UTF-8 without control characters; rename the folder")
        for child in sorted(folder.iterdir()):
            if child.is_dir() and child.name not in found and not child.name.startswith((".", "_")):
                raise DataError(f"{child} holds no images; remove it, or put the images of that class there")
        classes = tuple(sorted(found, key=natural_key if natural else None))
        pairs = [(path, label) for label, name in enumerate(classes) for path in found[name]]
        pairs.sort(key=lambda pair: natural_key(pair[0]) if natural else (pair[1], *_split(pair[0])))
        super().__init__(classes, pairs)


def _split(path: str) -> tuple[str, str]:
    return os.path.split(path)


def _label_by_first_folder(reader: Any) -> list[int]:
    """Name the classes of timm's tar reader as `ClassFolder` does: timm uses the innermost folders instead.

    A folder that contains all images (`train/` before `train/CLASS/`) is no class. Hidden files are skipped.
    """
    folders, is_shown = [], []
    for member, _, inner in reader.samples:
        inside = Path(os.path.normpath(member.path))
        is_shown.append(not any(part.startswith(".") for part in inside.parts))
        if is_shown[-1]:
            outside = () if inner is None else Path(inner.path).with_suffix("").parts
            folders.append((*outside, *inside.parent.parts))
    reader.samples = reader.samples[is_shown]
    shared = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, zip(*folders, strict=False)))
    if any(len(folder) == shared for folder in folders) and shared:
        shared -= 1
    names = [folder[shared] if folder else "" for folder in folders]
    classes = sorted(set(names), key=natural_key)
    reader.class_name_to_idx = {name: label for label, name in enumerate(classes)}
    reader.targets = np.array([reader.class_name_to_idx[name] for name in names])
    return [int(label) for label in reader.targets]


def _refuse_commands_and_urls(kind: str, name: str, root: str | os.PathLike[str] | None, split: str) -> None:
    """Reject commands and URLs, as recipes may be untrusted: these libraries run `pipe:` in a shell and fetch URLs."""
    if ":" in name or name.partition("/")[2] == "pandas":  # a URL, a data set with a script, a pickle
        raise DataError(f"{name}: a data set is named by its folder or as NAMESPACE/NAME, never by a URL or a command")
    if root is not None and ("://" in str(root) or (kind == "wds" and not os.path.isdir(root))):
        raise DataError(Argument("root"), f" {root}: no such folder; data are read from folders, never from commands")
    shards = math.prod(abs(int(last) - int(first)) + 1 for first, last in _NUMBERS.findall(split))
    if kind == "wds" and shards > _MOST_SHARDS:
        raise DataError(f"{name}: {split} names {shards:,} files; {_MOST_SHARDS:,} are the most")


def _require_package(kind: str, name: str) -> None:
    package = _PACKAGES.get(kind)
    if package is not None and importlib.util.find_spec(package) is None:
        more = " tensorflow" if kind == "tfds" else ""
        raise DataError(f"{name} needs a package that is not here: pip install {package.replace('_', '-')}{more}")
    if package == "datasets" and int(version(package).partition(".")[0]) < 4:
        raise DataError(f"{name} needs datasets 4 or newer, which runs no code of data sets: pip install -U datasets")


def _create(name: str, root: str | os.PathLike[str] | None, split: str, **options: Any) -> Any:
    from timm.data import create_dataset

    if name.startswith("wds/"):
        logging.getLogger("timm.data.readers.reader_wds").setLevel(logging.ERROR)  # reported below
    try:
        return create_dataset(name, root=None if root is None else str(root), split=split, **options)
    except Exception as error:  # all errors of the library concern the data
        place = f"{name} {split}".strip() + (f" in {root}" if root is not None else "")
        text, advised, _ = first_line(error).partition("You can use download=True to download it")
        if advised:
            raise DataError(f"{place}: {text}Give ", Argument("download", True), " to fetch it") from None
        if text.startswith("Dataset length is unknown"):
            text = "how many images there are is not known before they are fetched; give "
            raise DataError(f"{place}: {text}", Argument("download", True)) from None
        if name.startswith("wds/") and "not found in info (dict_keys([]))" in text:
            text = "no _info.json says its files; without one, give them as splits such as train-{0000..0009}.tar|5000"
        raise DataError(f"{place}: {text}") from None


def _columns_of_table(
    name: str, root: str | os.PathLike[str] | None, keys: dict[str, Any], download: bool
) -> dict[str, Any]:
    """Add missing `keys` by column type: many data sets on the Hub do not use the names 'image' and 'label'."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(name.partition("/")[2], cache_dir=root and str(root))
        if builder.info.features is None and download:
            builder.download_and_prepare()  # the dataset info lacks the columns; the files have them
    except Exception as error:  # no connection, no such data set, no access
        raise DataError(f"{name}: {first_line(error)}") from None
    features = builder.info.features or {}
    found = {}
    for key, usual, kind in (("input_key", "image", datasets.Image), ("target_key", "label", datasets.ClassLabel)):
        columns = [column for column, feature in features.items() if isinstance(feature, kind)]
        if keys[key] is not None or usual in features or not columns:
            found[key] = keys[key]
        elif len(columns) == 1:
            found[key] = columns[0]
        else:
            raise DataError(f"{name} has the columns {' and '.join(columns)}; say which with ", Argument(key))
    return found


def _class_names(dataset: Any, name: str, root: str | os.PathLike[str] | None) -> tuple[str, ...]:
    reader = getattr(dataset, "reader", dataset)
    mapping = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    names = getattr(dataset, "classes", None) or getattr(dataset, "all_categories", None)
    if names:  # from torchvision; ImageNet has several per class
        return tuple(", ".join(name) if isinstance(name, tuple) else str(name) for name in names)
    if mapping:
        return tuple(sorted(mapping, key=mapping.__getitem__))
    if hasattr(reader, "split_info") and hasattr(reader, "info"):
        return _class_names_of_shards(reader.info, name, root)
    if hasattr(reader, "label_key") and reader.label_key in reader.dataset.column_names:
        labels = set(reader.dataset[reader.label_key])
        if all(isinstance(label, int) for label in labels):
            return tuple(map(str, range(max(labels) + 1)))
    raise DataError(f"{name} does not name its classes; its labels must be numbers or of a type that has names")


def _class_names_of_shards(info: dict[str, Any], name: str, root: str | os.PathLike[str] | None) -> tuple[str, ...]:
    listed = Path(root or "") / "classnames.txt"
    if listed.is_file():
        return tuple(listed.read_text(encoding="utf-8").splitlines())
    for key in ("class_names", "classnames", "classes"):
        if isinstance(info.get(key), list):
            return tuple(map(str, info[key]))
    if isinstance(info.get("num_classes"), int):
        return tuple(map(str, range(info["num_classes"])))
    raise DataError(f"{name} in {root} names no classes; put class_names or num_classes into its _info.json")
