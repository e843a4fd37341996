"""Read images and labels from a table: CSV or Parquet with the columns `image`, `label` and optionally `split`.

A label may name several classes, such as `heron|stork`; then the labels of all images are sets of classes.
"""

from __future__ import annotations

import csv
import functools
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import UNPRINTABLE, DataError, first_line, printable
from ..runs.row_table import import_pyarrow
from .image_files import natural_key

__all__ = ["BETWEEN", "LABEL_TABLES", "Label", "LabelTable", "flat_labels", "is_label_table", "read_label_table"]

LABEL_TABLES = (".csv", ".tsv", ".parquet")
_SPLITS = {
    "train": "train", "training": "train", "validation": "validation", "val": "validation", "valid": "validation",
    "eval": "validation", "evaluation": "validation", "test": "test",
}  # fmt: skip
BETWEEN = "|"  # separates the classes of one image
_MOST_NAMED = 5  # rows or files in a message
_MOST_BYTES = 1 << 30  # of a table
_MOST_HEADER = 1 << 16  # characters of its first line
_PARQUET_TEXT = ("string", "large_string", "dictionary<values=string", "dictionary<values=large_string")


Label = int | tuple[int, ...]


def flat_labels(labels: Iterable[Label]) -> Iterator[int]:
    """Yield the class indices of all labels."""
    for label in labels:
        if isinstance(label, tuple):
            yield from label
        else:
            yield label


def is_label_table(name: str) -> bool:
    """Whether a data set's name is the path of a table."""
    return Path(name).suffix.lower() in LABEL_TABLES and not os.path.isdir(name)


@dataclass(frozen=True)
class LabelTable:
    """Paths of images and their labels among `classes`, by split; without splits in the table, all are of 'train'.

    A label is a class index, or a tuple of any number of class indices if `is_multilabel`.
    """

    path: str
    classes: tuple[str, ...]
    parts: Mapping[str, list[tuple[str, Label]]]
    has_splits: bool
    is_multilabel: bool

    def part(self, split: str) -> str | None:
        """The table's name of a split, given by any of its usual names; None if the split has no images."""
        name = _SPLITS.get(split, split)
        return name if name in self.parts else None

    def samples(self, split: str | None) -> list[tuple[str, Label]]:
        """Pairs of path and label; None takes all splits. Raises DataError if there is no such split."""
        if split is None:
            return [pair for part in self.parts.values() for pair in part]
        name = self.part(split)
        if name is None:
            inside = f"only {', '.join(self.parts)}" if self.has_splits else "no column split"
            raise DataError(f"{self.path} has no {split} images, {inside}")
        pairs = self.parts[name]
        if name == "train" and self.has_splits:
            lacking = sorted(set(range(len(self.classes))) - set(flat_labels(label for _, label in pairs)))
            if lacking:
                raise DataError(f"{self.path} has no training image of the class {self.classes[lacking[0]]}")
        return pairs


def read_label_table(path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> LabelTable:
    """Read a table, and check that its images exist.

    Args:
        path: CSV with commas, semicolons or tabs in UTF-8, or Parquet. It has the columns `image`, `label` and
            optionally `split` (train, val or test), in any order, and may have others. If any label contains `|`, each
            label is a list of class names separated by `|`, and a single `|` is an empty list.
        root: the folder that image paths are relative to; default: the table's folder.

    Raises:
        DataError: in one line, if the table cannot be read, is larger than 1 GiB or has no rows, if a cell is empty or
            a split has another name, or if an image is missing, has two labels or is in two splits.
    """
    try:
        state = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if state.st_size > _MOST_BYTES:
        raise DataError(f"{path} has {state.st_size:,} bytes; a table may have {_MOST_BYTES:,}")
    folder = os.path.dirname(os.path.abspath(path)) if root is None else str(root)
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: no such folder")
    return _read(str(path), folder, root is not None, (state.st_mtime_ns, state.st_size))


@functools.lru_cache(maxsize=4)  # a run calls this several times, and each call checks every image
def _read(path: str, folder: str, is_given: bool, _state: tuple[int, int]) -> LabelTable:
    rows = _read_parquet(path) if path.lower().endswith(".parquet") else _read_csv(path)
    place = folder if is_given else os.path.dirname(path)
    found: dict[str, tuple[str, str, str]] = {}  # label, split and row, by the image's path
    has_splits = False
    for where, cells in rows:
        image, label = cells.get("image", ""), cells.get("label", "")
        has_splits = "split" in cells
        split = _split(path, where, cells["split"]) if has_splits else "train"
        for name, value in (("image", image), ("label", label)):
            if not value:
                raise DataError(f"{path}: {where} has no {name}")
            if UNPRINTABLE.search(value):
                raise DataError(f"{path}: {where} has control characters in its {name}, {printable(value)}")
        file = os.path.normpath(os.path.join(place, image))
        before = found.setdefault(file, (label, split, where))
        for what, one, other in (("labels", before[0], label), ("splits", before[1], split)):
            if one != other:
                raise DataError(f"{path}: {image} has two {what}, {one} ({before[2]}) and {other} ({where})")
    if not found:
        raise DataError(f"{path} has no rows below its header")
    _refuse_missing(path, found, is_given)
    is_multilabel = any(BETWEEN in label for label, _, _ in found.values())
    names = {label: _names_in(label) if is_multilabel else [label] for label, _, _ in found.values()}
    classes = tuple(sorted({name for several in names.values() for name in several}, key=natural_key))
    index = {label: number for number, label in enumerate(classes)}
    parts: dict[str, list[tuple[str, Label]]] = {}
    for file, (label, split, _) in found.items():
        places = tuple(index[name] for name in names[label])
        parts.setdefault(split, []).append((file, places if is_multilabel else places[0]))
    return LabelTable(path, classes, parts, has_splits, is_multilabel)


def _names_in(label: str) -> list[str]:
    """The classes of a label such as 'heron|stork'."""
    return sorted({name.strip() for name in label.split(BETWEEN)} - {""})


def _split(path: str, where: str, text: str) -> str:
    if text.lower() not in _SPLITS:
        raise DataError(f"{path}: {where} has the split {printable(text)!r}; it must be train, val or test")
    return _SPLITS[text.lower()]


def _refuse_missing(path: str, files: Iterable[str], is_given: bool) -> None:
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        named = "; ".join(missing[:_MOST_NAMED]) + ("; ..." if len(missing) > _MOST_NAMED else "")
        hint = "" if is_given else "; relative paths start at the table, unless another root is given"
        raise DataError(f"{path}: {len(missing):,} of its images are missing: {named}{hint}")


Rows = Iterator[tuple[str, dict[str, str]]]  # the row's name in messages, and its cells by column


def _read_csv(path: str) -> Rows:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header = file.readline(_MOST_HEADER)
            delimiter = next((mark for mark in ",;\t" if {"image", "label"} <= set(_names(header.split(mark)))), None)
            if delimiter is None:
                raise DataError(f"{path}: its first line must name the columns image and label, got {header[:80]!r}")
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            names = _names(header.split(delimiter))
            for cells in reader:
                where = f"line {reader.line_num + 1}"
                if len(cells) > len(names):
                    raise DataError(f"{path}: {where} has {len(cells)} cells, the header {len(names)}")
                if any(cell.strip() for cell in cells):
                    cells += [""] * (len(names) - len(cells))
                    yield where, dict(zip(names, (cell.strip() for cell in cells), strict=True))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not text in UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{path}: no CSV ({first_line(error)})") from None


def _names(cells: list[str]) -> list[str]:
    return [cell.strip().strip('"').lower() for cell in cells]


def _read_parquet(path: str) -> Rows:
    _, parquet = import_pyarrow()
    try:
        schema = parquet.read_schema(path)
        wanted = [name for name in ("image", "label", "split") if name in schema.names]
        if not {"image", "label"} <= set(wanted):
            raise DataError(f"{path}: it must have the columns image and label, got {', '.join(schema.names)}")
        if not str(kind := schema.field("image").type).startswith(_PARQUET_TEXT):
            raise DataError(f"{path}: its column image must hold the paths of image files, got the type {kind}")
        table = parquet.read_table(path, columns=wanted)
        columns = {name: table.column(name).to_pylist() for name in wanted}
    except DataError:
        raise
    except Exception as error:  # raised by pyarrow: damaged, or not Parquet
        raise DataError(f"{path}: cannot be read ({first_line(error)})") from None
    for number, cells in enumerate(zip(*columns.values(), strict=True), 1):
        # A list of labels ends in a `|`, which marks it as a list even if it has one label or none.
        texts = (BETWEEN.join([*map(str, cell), ""]) or BETWEEN if isinstance(cell, list) else cell for cell in cells)
        values = ("" if cell is None else str(cell).strip() for cell in texts)
        yield f"row {number}", dict(zip(columns, values, strict=True))
