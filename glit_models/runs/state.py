"""Save and load the state of a run: the newest one, and the one before it in case the newest is damaged."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import torch

from ..errors import RunError, first_line
from .console import say
from .files import force_to_disk, whole_file

__all__ = ["StateFiles", "read_tensors", "write_tensors"]

# Errors on reading a damaged file, from torch or JSON.
_DAMAGE = (
    RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError,
    pickle.UnpicklingError, zipfile.BadZipFile,
)  # fmt: skip
T = TypeVar("T")


@dataclass(frozen=True)
class StateFiles:
    """Two files that hold the state of a run.

    Attributes:
        newest: the last state that was saved.
        spare: the state before it.
    """

    newest: Path
    spare: Path

    def save(self, write: Callable[[Path], object]) -> None:
        """Let `write` fill a file, which becomes the newest state; the previous one becomes the spare.

        Raises:
            WriteError: if it cannot be written. A readable state is kept.
        """
        with whole_file(self.newest) as temporary:
            write(temporary)
            force_to_disk(temporary)  # before the newest state is moved away
            if self.newest.exists():
                os.replace(self.newest, self.spare)
        for left in self.newest.parent.glob("*.tmp"):  # from a process that was killed while writing
            if left.is_file():
                left.unlink(missing_ok=True)

    def load(self, read: Callable[[Path], T]) -> T | None:
        """Load the newest readable state with `read`; None if there is none. Prints a message if one is damaged.

        Raises:
            RunError: if states exist, but none is readable.
        """
        damaged = None
        for path in (self.newest, self.spare):
            if not path.is_file():
                continue
            try:
                return read(path)
            except _DAMAGE as error:
                damaged = path
                say(f"glit: {path} is damaged ({first_line(error)}); trying the state before it")
        if damaged is not None:
            raise RunError(f"{damaged}: no readable state is left; delete it to start again from the beginning")
        return None


class _Recording:
    """A file for `torch.save` that keeps the first write error for later.

    If it were raised at once, PyTorch would report a full disk as a wrong position in its archive, or crash.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        if self.error is None:
            try:
                self.file.write(content)
            except OSError as error:
                self.error = error
        return len(content)

    def flush(self) -> None:
        """Do nothing: the file is flushed when it is closed."""


def write_tensors(state: dict[str, Any], path: Path) -> None:
    """Write tensors and plain values with `torch.save`. Raises OSError, also if the disk is full."""
    with open(path, "wb") as file:
        recording = _Recording(file)
        torch.save(state, cast(IO[bytes], recording))  # only the methods above are used
    if recording.error is not None:
        raise recording.error


def read_tensors(path: Path) -> dict[str, Any]:
    """Read a file of `write_tensors`; nothing else is unpickled."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state
