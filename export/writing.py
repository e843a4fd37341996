"""A file that gets its name only once it was found to be right: written, judged, moved, reported on.

It knows files and verdicts, not what they are of.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from glit_models import store
from glit_models.errors import ExportError
from glit_models.folders import to_json

from .verify import Agreement

__all__ = ["UNVERIFIED", "check_target", "report_path", "write_and_judge"]

UNVERIFIED = ".unverified"


def check_target(path: Path, force: bool) -> None:
    """Raises ExportError if a file cannot be written there, before any work is done."""
    if path.is_dir():
        raise ExportError(f"{path} is a folder; give the file to write")
    if path.exists() and not force:
        raise ExportError(f"{path} exists; --force replaces it")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ExportError(f"{path}: cannot be written, {parent} is no folder that may be written to")


def write_and_judge(
    path: Path,
    write: Callable[[Path], object],
    judge: Callable[[Path], Agreement | None],
    about: Mapping[str, Any],
) -> tuple[Path, Agreement | None]:
    """Write a file under a temporary name, judge it, and move it to `path`, or beside it with the suffix `.unverified`.

    Args:
        path: where it is to lie. write: makes the file. judge: compares it; None if it was not compared.
        about: what the report beside it is to say besides.

    Returns:
        Where it lies, and the verdict.

    Raises:
        ExportError: if it cannot be written. What `write` and `judge` raise passes through; then nothing is left.
    """
    workplace = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary = workplace / path.name  # under its own name, which torch writes into the file
    try:
        workplace.mkdir(parents=True, exist_ok=True)
        write(temporary)
        agreement = judge(temporary)
        return _place(temporary, path, agreement, about), agreement
    except OSError as error:
        raise ExportError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


def report_path(path: Path) -> Path:
    """Where the report of a file stands."""
    return path.with_name(f"{path.name}.json")


def _place(temporary: Path, path: Path, agreement: Agreement | None, about: Mapping[str, Any]) -> Path:
    marked = path.with_name(path.name + UNVERIFIED)
    holds = agreement is not None and agreement.holds
    final = path if holds else marked
    report = {"verified": holds, **about, "agreement": None if agreement is None else dataclasses.asdict(agreement)}
    store.write_text(report_path(final), to_json(report))
    os.replace(temporary, final)
    if holds:  # what an earlier attempt left is out of date
        for old in (marked, report_path(marked)):
            old.unlink(missing_ok=True)
    return final
