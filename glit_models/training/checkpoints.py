"""The state of a run on disk: written aside and moved into place, one older state kept, read without unpickling."""

from __future__ import annotations

import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import TrainingError, first_line

__all__ = ["load_state", "save_state", "write_atomically"]

_NAMES = ("last.pt", "previous.pt")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, force it to disk and move it into place.

    Raises:
        TrainingError: if the disk is full or the folder not writable; what stood at `path` is untouched.
    """
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(aside)
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        aside.unlink(missing_ok=True)
        raise TrainingError(f"{path} could not be written: {first_line(error)}") from None


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write `last.pt`, keeping the one before as `previous.pt`. Raises TrainingError if that fails."""

    def write(aside: Path) -> None:
        torch.save(state, aside)
        if (folder / _NAMES[0]).exists():
            os.replace(folder / _NAMES[0], folder / _NAMES[1])

    write_atomically(folder / _NAMES[0], write)


def load_state(folder: Path) -> dict[str, Any] | None:
    """The newest readable state of a run, or None if it has none. A damaged one is named and the older one taken."""
    damaged = None
    for name in _NAMES:
        path = folder / name
        if not path.is_file():
            continue
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile):
            damaged = path
            print(f"glit: {path} is damaged; trying the checkpoint before it", file=sys.stderr)
    if damaged is not None:
        raise TrainingError(f"{damaged}: no readable checkpoint is left; start again with another --out")
    return None
