"""Files on this machine: the store of installed weights, hashes that were checked before, and whole-or-nothing writes.

Standard library only. It knows folders and bytes, not models or registries.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

__all__ = ["home", "installed_folder", "sha256_checked_before", "write_bytes", "write_files", "write_text"]

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
GOLDEN_FILE = "golden.safetensors"
ENTRY_FILE = "entry.json"


def home() -> Path:
    """Where this package keeps files of its own: `$GLIT_HOME`, else `$XDG_CACHE_HOME/glit`, else `~/.cache/glit`."""
    if own := os.environ.get("GLIT_HOME"):
        return Path(own).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "glit"


def installed_folder(name: str) -> Path:
    """The folder that holds the weights `model.tag` once they are installed."""
    return home() / "weights" / name


def sha256_checked_before(path: Path) -> str:
    """The sha256 of a file, read from the file only if its size or time differ from when it was last read.

    The answers are kept in the store; where that cannot be written, every call reads the file.
    """
    path = path.resolve()
    stat = path.stat()
    seen = _read_hashes()
    known = seen.get(str(path))
    if isinstance(known, list) and known[:2] == [stat.st_size, stat.st_mtime_ns] and isinstance(known[-1], str):
        return known[-1]
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    seen[str(path)] = [stat.st_size, stat.st_mtime_ns, digest]
    with contextlib.suppress(OSError):  # only a cache: a store that cannot be written costs time, nothing else
        write_text(_hashes_file(), json.dumps(seen, indent=1))
    return digest


def _hashes_file() -> Path:
    return home() / "hashes.json"


def _read_hashes() -> dict[str, object]:
    try:
        seen = json.loads(_hashes_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return seen if isinstance(seen, dict) else {}


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name and move it into place. Raises OSError."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and move it into place. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_files(directory: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Fill a folder with files, each made by its writer from the path to write: all of them or none.

    They are made in a temporary folder beside it, which becomes `directory`, or whose files replace those of the
    same names there, each in one step.

    Raises:
        OSError: if the folder cannot be written. Whatever a writer raises passes through.
    """
    directory = directory.absolute()
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        for name, write in writers.items():
            write(temporary / name)
        if directory.exists():
            for name in writers:
                os.replace(temporary / name, directory / name)
        else:
            os.replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
