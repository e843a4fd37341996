"""Write predictions for many images to a file (CSV, JSON lines or Parquet), one row per image, even if broken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .prediction import Prediction
from .runs import row_table
from .runs.row_table import Rows, import_pyarrow, write_csv, write_jsonl, write_parquet

__all__ = ["check_table", "prediction_dict", "write_table"]

Predict = Callable[[Sequence[Path]], Iterable[Prediction]]


def prediction_dict(prediction: Prediction) -> dict[str, Any]:
    """A prediction as plain values for JSON: `image`, and `classes` or `error`."""
    if prediction.error is not None:
        return {"image": str(prediction.path), "error": prediction.error}
    classes = [{"class": name, "probability": round(value, 6)} for name, value in prediction.classes]
    return {"image": str(prediction.path), "classes": classes}


def check_table(out: Path) -> None:
    """Raise GlitError if `out` could not be written. For use before the work."""
    row_table.check_table(out, _WRITERS, "a table of predictions")


def write_table(out: Path, paths: Sequence[Path], predict: Predict, about: Mapping[str, Any]) -> tuple[int, int]:
    """Predict on images and write a table, or resume an unfinished one: see `row_table.write_table`.

    `predict` maps paths to predictions, in order. Returns the number of images and how many of them failed.
    """

    def make(left: Sequence[int]) -> Iterable[dict[str, Any]]:
        return map(prediction_dict, predict([paths[index] for index in left]))

    return row_table.write_table(out, map(str, paths), make, about, _WRITERS[out.suffix], "predicting")


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row of plain values: `image`, `class_1`, `probability_1`, ... and `error`."""
    flat = {"image": row["image"]}
    for rank, pair in enumerate(row.get("classes", ()), 1):
        flat |= {f"class_{rank}": pair["class"], f"probability_{rank}": pair["probability"]}
    return flat | {"error": row.get("error")}


def _columns(rows: Rows) -> list[str]:
    return list(max(map(_flat, rows()), key=len, default={"image": None, "error": None}))


def _write_csv(path: Path, rows: Rows) -> None:
    write_csv(path, _columns(rows), map(_flat, rows()))


def _write_parquet(path: Path, rows: Rows) -> None:
    pyarrow, _ = import_pyarrow()
    kinds = {True: pyarrow.float64(), False: pyarrow.string()}
    write_parquet(path, {name: kinds[name.startswith("probability")] for name in _columns(rows)}, map(_flat, rows()))


_WRITERS: dict[str, Callable[[Path, Rows], None]] = {
    ".csv": _write_csv, ".jsonl": lambda path, rows: write_jsonl(path, rows()), ".parquet": _write_parquet,
}  # fmt: skip
