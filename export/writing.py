"""Write a file or folder under a temporary name, and move it into place only after comparison; with a report next to
it.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from glit_models.errors import Argument, ExportError, WriteError
from glit_models.runs.files import force_to_disk, scratch_folder, write_text
from glit_models.weights.folder import to_json

from .verify import Agreement

__all__ = ["UNVERIFIED", "check_writable", "files_of", "report_path", "write_and_judge"]

UNVERIFIED = ".unverified"


def check_writable(path: Path, force: bool, is_folder: bool = False) -> None:
    """Raise ExportError if the file, or the folder, cannot be written; before any work is done."""
    if path.exists() and path.is_dir() != is_folder:
        kinds = ("file", "folder") if is_folder else ("folder", "file")
        raise ExportError(f"{path} is a {kinds[0]}; give the {kinds[1]} to write")
    if path.exists() and not force:
        raise ExportError(f"{path} exists; ", Argument("force", True), " replaces it")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ExportError(f"{path}: cannot be written, {parent} is no folder that may be written to")


def write_and_judge(
    path: Path,
    write: Callable[[Path], object],
    judge: Callable[[Path], Agreement | None],
    about: Mapping[str, Any],
) -> tuple[Path, Agreement | None]:
    """Write a file or folder under a temporary name, judge it, and move it to `path`, or to `path` with the suffix
    `.unverified`.

    Args:
        path: final path.
        write: writes it.
        judge: compares it; None if it was not compared.
        about: further content of the report next to it.

    Returns:
        Its path, and the verdict.

    Raises:
        WriteError: if it cannot be written. Errors of `write` and `judge` are passed on; nothing is then left.
    """
    with scratch_folder(path) as folder:
        temporary = folder / path.name  # with its final name, which torch writes into the file
        try:
            write(temporary)
            agreement = judge(temporary)
            for file in files_of(temporary):
                force_to_disk(file)
            return _place(temporary, path, agreement, about), agreement
        except WriteError:
            raise
        except OSError as error:
            raise WriteError(f"{path} cannot be written: {error.strerror or error}") from None


def files_of(path: Path) -> list[Path]:
    """The file itself, or all files in the folder."""
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


def report_path(path: Path) -> Path:
    """The path of a file's report."""
    return path.with_name(f"{path.name}.json")


def _place(temporary: Path, path: Path, agreement: Agreement | None, about: Mapping[str, Any]) -> Path:
    marked = path.with_name(path.name + UNVERIFIED)
    holds = agreement is not None and agreement.holds
    final = path if holds else marked
    report = {"verified": holds, **about, "agreement": None if agreement is None else dataclasses.asdict(agreement)}
    write_text(report_path(final), to_json(report))
    if final.is_dir():  # replaced, if it was allowed
        shutil.rmtree(final)
    os.replace(temporary, final)
    if holds:  # remove files of an earlier attempt
        report_path(marked).unlink(missing_ok=True)
        if marked.is_dir():
            shutil.rmtree(marked)
        marked.unlink(missing_ok=True)
    return final
