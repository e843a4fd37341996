"""Tables with one row per image (CSV, JSON lines or Parquet), written row by row so that they survive a stop.

Finished rows are kept in `FILE.part`, so that the same command resumes after a stop; the table is written atomically
at the end. Rows are read one at a time: memory holds the names of the images, never all rows.
"""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import GlitError, WriteError, first_line, printable
from .console import track
from .files import whole_file
from .lock import lock_file

__all__ = ["Row", "Rows", "check_table", "import_pyarrow", "write_csv", "write_jsonl", "write_parquet", "write_table"]

Row = dict[str, Any]  # 'image': its name; 'error' if it could not be read
Rows = Callable[[], Iterator[Row]]  # each call reads them again

_CHUNK = 1 << 16  # bytes
_GROUP = 1000  # rows of a Parquet file in memory at a time


def part_of(out: Path) -> Path:
    """The path of the file of finished rows."""
    return out.with_name(f"{out.name}.part")


def check_table(out: Path, suffixes: Iterable[str], what: str) -> None:
    """Raise GlitError if a table `out` of `what` could not be written. For use before the work."""
    if out.suffix not in suffixes:
        raise GlitError(f"{out}: {what} ends in one of {', '.join(suffixes)}")
    if out.exists() or not out.parent.is_dir():
        way_out = "it exists; remove it or give another name" if out.exists() else "its folder is missing"
        raise GlitError(f"{out} cannot be written: {way_out}")
    if out.suffix == ".parquet":
        import_pyarrow()


def write_table(
    out: Path, names: Iterable[str], make: Callable[[Sequence[int]], Iterable[Row]], about: Mapping[str, Any],
    write: Callable[[Path, Rows], None], doing: str | None = None,
) -> tuple[int, int]:  # fmt: skip
    """Make a row for each image and write a table of them, or resume an unfinished one.

    Args:
        out: path of the table; has passed `check_table`.
        names: of the images; bytes that are not UTF-8 are escaped in the table.
        make: maps positions among the images to their rows, in order.
        about: the settings that determine the rows, such as the model; an unfinished table must have the same.
        write: writes the rows to a path.
        doing: description of the progress bar; without one, `make` shows its own.

    Returns:
        The number of images in the table, and how many of them failed.

    Raises:
        GlitError: if the unfinished table has other settings or is damaged.
        RunError: if another process writes it.
        WriteError: if the table cannot be written; finished rows are kept.
    """
    part = part_of(out)
    with lock_file(part):
        return _write_table(out, part, names, make, about, write, doing)


def _write_table(
    out: Path, part: Path, names: Iterable[str], make: Callable[[Sequence[int]], Iterable[Row]],
    about: Mapping[str, Any], write: Callable[[Path, Rows], None], doing: str | None,
) -> tuple[int, int]:  # fmt: skip
    wanted = {printable(name): index for index, name in enumerate(names)}
    _begin(part, dict(about))
    done = {row["image"] for row in _rows(part)}
    left = [index for name, index in wanted.items() if name not in done]
    try:
        with part.open("a", encoding="utf-8") as file:
            for row in track(make(left), doing, len(left)) if doing else make(left):
                safe = {key: printable(value) if isinstance(value, str) else value for key, value in row.items()}
                file.write(json.dumps(safe, ensure_ascii=False) + "\n")
                file.flush()
    except OSError as error:
        raise WriteError(f"{part} cannot be written: {error.strerror or first_line(error)}") from None

    def rows() -> Iterator[Row]:
        return (row for row in _rows(part) if row["image"] in wanted)

    with whole_file(out) as temporary:
        write(temporary, rows)
    failed = sum("error" in row for row in rows())
    part.unlink()
    return len(wanted), failed


def _begin(part: Path, about: Row) -> None:
    """Start the file of rows, or check that its settings are the same and remove an incomplete last row."""
    try:
        end = _end_of_lines(part) if part.is_file() else 0
        if not end:
            part.write_text(json.dumps(about) + "\n", encoding="utf-8")
            return
        with part.open("r+b") as file:
            if file.readline() != f"{json.dumps(about)}\n".encode():
                raise GlitError(f"{part} was begun with another model or other options; remove it or give another name")
            file.truncate(end)
    except OSError as error:
        raise WriteError(f"{part} cannot be written: {error.strerror}") from None


def _end_of_lines(path: Path) -> int:
    """The position after the last line break; 0 if there is none."""
    with path.open("rb") as file:
        end = file.seek(0, 2)
        while end:
            start = max(end - _CHUNK, 0)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0


def _rows(part: Path) -> Iterator[Row]:
    with part.open(encoding="utf-8") as file:
        try:
            next(file)  # the settings
            for line in file:
                row = json.loads(line)
                row["image"]  # raises if this is no row
                yield row
        except (ValueError, TypeError, KeyError, RecursionError):
            raise GlitError(f"{part} is damaged; remove it") from None


# ---- the formats ----


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows of plain values as CSV; a missing value leaves an empty cell."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_parquet(path: Path, types: Mapping[str, Any], rows: Iterator[Mapping[str, Any]]) -> None:
    """Write rows as Parquet with the columns `types`, a dict of pyarrow types; a missing value is null."""
    pyarrow, parquet = import_pyarrow()
    with parquet.ParquetWriter(path, pyarrow.schema(list(types.items()))) as writer:
        while group := list(islice(rows, _GROUP)):
            columns = {name: pyarrow.array([row.get(name) for row in group], kind) for name, kind in types.items()}
            writer.write_table(pyarrow.table(columns))


def import_pyarrow() -> tuple[Any, Any]:
    """Import pyarrow and pyarrow.parquet. Raises GlitError if they are missing."""
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise GlitError("Parquet files need pyarrow: pip install pyarrow, or take .csv") from None
