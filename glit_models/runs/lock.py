"""Lock a folder, so that only one process works in it."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

from ..errors import RunError, WriteError

__all__ = ["lock_folder"]


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
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RunError(f"{folder} is in use by another process; wait for it, or choose another folder") from None
    except OSError as error:
        file.close()
        raise WriteError(
            f"{folder} is on a file system that cannot lock files ({error.strerror}); choose a folder on another one"
        ) from None
    return file
