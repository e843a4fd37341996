"""Write files and folders atomically: completely or not at all; hash files. Standard library only.

Content is written under a temporary name in the same folder, flushed to disk, and moved into place in one step. Readers
see the old file or the new one, also after a crash or on a full disk.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import WriteError, first_line

__all__ = [
    "force_to_disk",
    "home",
    "scratch_folder",
    "sha256_of",
    "temporary_folder",
    "whole_file",
    "whole_folder",
    "write_bytes",
    "write_json",
    "write_text",
]

_HOST = re.sub(r"\W+", "-", socket.gethostname())[:20] or "host"


def home() -> Path:
    """The package's own folder: `$GLIT_HOME`, else `$XDG_CACHE_HOME/glit`, else `~/.cache/glit`."""
    if own := os.environ.get("GLIT_HOME"):
        return Path(own).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "glit"


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def whole_file(path: Path, *, parents: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write; the file becomes `path` if the block ends without an error.

    Args:
        parents: create missing parent folders of `path`.

    Raises:
        WriteError: if the file cannot be written, for example on a full disk. An existing file is unchanged.
    """
    temporary = _beside(path)
    with _naming(path):
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            force_to_disk(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder to fill; it becomes `folder` if the block ends without an error.

    Args:
        replace: remove an existing `folder`. Otherwise the new files replace files of the same names in it, each in one
            step, and its other files are kept.

    Raises:
        WriteError: if the folder cannot be written. An existing folder is unchanged.
    """
    folder = folder.absolute()
    with scratch_folder(folder) as temporary, _naming(folder):
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                force_to_disk(path)
        if folder.exists() and not replace:
            for path in sorted(temporary.rglob("*")):
                if path.is_file():
                    place = folder / path.relative_to(temporary)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(path, place)
            return
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder next to `path`, on the same disk, which is removed with its contents at the end.

    Raises:
        WriteError: if it cannot be created.
    """
    temporary = _beside(path)
    with _naming(path):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield an empty temporary folder, which is removed at the end, or by a later process if this one is killed."""
    _remove_abandoned(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=".glit", suffix=f".{_HOST}.{os.getpid()}.tmp") as folder:
        yield Path(folder)


def write_bytes(path: Path, content: bytes, *, parents: bool = False) -> None:
    """Write a file atomically; see `whole_file`."""
    with whole_file(path, parents=parents) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str, *, parents: bool = False) -> None:
    """Write a text file in UTF-8 atomically; see `whole_file`."""
    write_bytes(path, text.encode(), parents=parents)


def write_json(path: Path, data: Any) -> None:
    """Write a file of indented JSON atomically; see `whole_file`."""
    write_text(path, json.dumps(data, indent=2) + "\n")


def force_to_disk(path: Path) -> None:
    """Flush a file's content to disk. Raises OSError."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _beside(path: Path) -> Path:
    """A temporary name in the same folder, after removing temporary files that killed processes left there."""
    _remove_abandoned(path.absolute().parent)
    return path.with_name(f".{path.name[:100]}.{_HOST}.{os.getpid()}.tmp")


@functools.cache
def _remove_abandoned(folder: Path) -> None:
    """Runs once per folder, and only for files of this machine, as processes on others are not visible."""
    for path in folder.glob(f".*.{_HOST}.*.tmp"):
        pid = path.name.split(".")[-2]
        if pid.isdecimal() and not _is_alive(int(pid)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Convert an OSError to a WriteError that names `path` and the reason."""
    try:
        yield
    except WriteError:
        raise
    except shutil.Error as error:  # raised by `copytree` with (source, target, reason) of each file
        raise WriteError(f"{path} cannot be written: {error.args[0][0][2]}") from None
    except OSError as error:
        raise WriteError(f"{path} cannot be written: {error.strerror or first_line(error)}") from None
