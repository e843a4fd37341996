"""Lock a folder or a file, so that only one process works in it."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

from ..errors import RunError, WriteError

__all__ = ["lock_file", "lock_folder"]


def lock_folder(folder: Path) -> IO[str]:
    """Create and lock `folder`. It is unlocked when the returned file is closed or the process ends.

    Raises:
        WriteError: if it cannot be created or written to, or is on a file system without `flock`.
        RunError: if another process is working in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
    except OSError as error:
        raise WriteError(f"{folder} cannot be made or written to: {error.strerror}") from None
    return _lock(file, folder, "folder")


def lock_file(path: Path) -> IO[str]:
    """Create a file if it is missing, and lock it, as `lock_folder` does. Its contents are unchanged."""
    try:
        file = path.open("a")
    except OSError as error:
        raise WriteError(f"{path} cannot be written: {error.strerror}") from None
    return _lock(file, path, "name")


def _lock(file: IO[str], path: Path, what: str) -> IO[str]:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RunError(f"{path} is in use by another process; wait for it, or choose another {what}") from None
    except OSError as error:
        file.close()
        raise WriteError(
            f"{path} is on a file system that cannot lock files ({error.strerror}); choose a folder on another one"
        ) from None
    return file
