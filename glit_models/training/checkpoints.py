"""The state of a run on disk: written aside and moved into place, one older state kept, read without unpickling."""

from __future__ import annotations

import fcntl
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from ..errors import TrainingError, first_line

__all__ = ["load_state", "lock_folder", "save_state", "write_atomically"]

_NAMES = ("last.pt", "previous.pt")


def lock_folder(folder: Path) -> IO[str]:
    """Make `folder` and keep other processes out of it until the file that is returned is closed, or the process ends.

    Raises:
        TrainingError: if it cannot be made or written to, or another process is at work in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
    except OSError as error:
        raise TrainingError(f"{folder} cannot be made or written to: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise TrainingError(f"{folder} is in use by another process; wait for it, or take another --out") from None
    return file


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
    for left in folder.glob("*.tmp"):  # of a process that was killed while it wrote
        left.unlink(missing_ok=True)


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
