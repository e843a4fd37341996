"""Predictions for many images in a file: CSV, JSON lines or Parquet, a row for each image, also for those that failed.

Rows are kept in `FILE.part` as they are made, so that the same command goes on after a stop; the file itself is written
whole at the end.
"""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import GlitError, WriteError, first_line
from .predict import Prediction
from .runs.console import track
from .runs.files import whole_file

__all__ = ["check_table", "prediction_dict", "write_table"]

Predict = Callable[[Sequence[Path]], Iterable[Prediction]]


def prediction_dict(prediction: Prediction) -> dict[str, Any]:
    """A prediction as JSON has it: `image`, and `classes` or `error`."""
    if prediction.error is not None:
        return {"image": str(prediction.path), "error": prediction.error}
    classes = [{"class": name, "probability": round(value, 6)} for name, value in prediction.classes]
    return {"image": str(prediction.path), "classes": classes}


def check_table(out: Path) -> None:
    """Raises GlitError if `out` could not be written: before the work, not after it."""
    if out.suffix not in _WRITERS:
        raise GlitError(f"{out}: a table of predictions ends in one of {', '.join(_WRITERS)}")
    if out.exists() or not out.parent.is_dir():
        way_out = "it exists; remove it or give another name" if out.exists() else "its folder is missing"
        raise GlitError(f"{out} cannot be written: {way_out}")
    if out.suffix == ".parquet":
        _pyarrow()


def write_table(out: Path, paths: Sequence[Path], predict: Predict, about: Mapping[str, Any]) -> tuple[int, int]:
    """Predict on images and write a table, or go on with one that was begun.

    Args:
        out: the table; has passed `check_table`.
        paths: of the images.
        predict: paths -> predictions, in order.
        about: what makes the rows what they are, such as the model: a begun table of another one is refused.

    Returns:
        How many images the table has, and how many of them failed.

    Raises:
        GlitError: if the rows that are there are of other settings.
        WriteError: if the table cannot be written; the rows made so far stay.
    """
    part = out.with_name(f"{out.name}.part")
    done = {row["image"] for row in _begin(part, dict(about))}
    left = [path for path in paths if str(path) not in done]
    try:
        with part.open("a", encoding="utf-8") as file:
            for prediction in track(predict(left), "predicting", len(left)):
                file.write(json.dumps(prediction_dict(prediction), ensure_ascii=False) + "\n")
                file.flush()
    except OSError as error:
        raise WriteError(f"{part} cannot be written: {error.strerror or first_line(error)}") from None
    wanted = {str(path) for path in paths}
    with whole_file(out) as temporary:
        _WRITERS[out.suffix](temporary, (row for row in _rows(part) if row["image"] in wanted))
    failed = sum("error" in row for row in _rows(part) if row["image"] in wanted)
    part.unlink()
    return len(wanted), failed


def _begin(part: Path, about: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Start the file of rows, or check that it is of the same settings and cut off what a kill left of a row."""
    try:
        content = part.read_bytes() if part.is_file() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if not whole:
            part.write_text(json.dumps(about) + "\n", encoding="utf-8")
        elif json.loads(whole.partition(b"\n")[0]) != about:
            raise GlitError(f"{part} was begun with another model or other options; remove it or give another name")
        elif whole != content:
            part.write_bytes(whole)
    except OSError as error:
        raise WriteError(f"{part} cannot be written: {error.strerror}") from None
    except ValueError:
        raise GlitError(f"{part} is damaged; remove it") from None
    return _rows(part)


def _rows(part: Path) -> Iterator[dict[str, Any]]:
    with part.open(encoding="utf-8") as file:
        next(file)  # the settings
        yield from map(json.loads, file)


# ---- the formats ----


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row of plain values: `image`, `class_1`, `probability_1`, ... and `error`."""
    flat = {"image": row["image"]}
    for rank, pair in enumerate(row.get("classes", ()), 1):
        flat |= {f"class_{rank}": pair["class"], f"probability_{rank}": pair["probability"]}
    return flat | {"error": row.get("error")}


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    return list(max(rows, key=len, default={"image": None, "error": None}))


def _write_csv(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    flat = [_flat(row) for row in rows]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _columns(flat))
        writer.writeheader()
        writer.writerows(flat)


def _write_jsonl(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write_parquet(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    pyarrow, parquet = _pyarrow()
    flat = [_flat(row) for row in rows]
    types = {name: pyarrow.float64() if name.startswith("probability") else pyarrow.string() for name in _columns(flat)}
    table = pyarrow.table({name: pyarrow.array([row.get(name) for row in flat], kind) for name, kind in types.items()})
    parquet.write_table(table, path)


def _pyarrow() -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise GlitError("Parquet files are written by pyarrow: pip install pyarrow, or take .csv or .jsonl") from None


_WRITERS: dict[str, Callable[[Path, Iterator[dict[str, Any]]], None]] = {
    ".csv": _write_csv, ".jsonl": _write_jsonl, ".parquet": _write_parquet,
}  # fmt: skip
