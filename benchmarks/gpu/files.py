"""Files of the command: atomic JSON, logs of limited size. Without torch, so that the driver starts no device."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["MAX_BYTES", "MAX_FILES", "MAX_TOTAL_BYTES", "join_logs", "over_limits", "read_json", "tail", "write_json"]

MAX_FILES = 8
MAX_BYTES = 16 * 2**20
MAX_TOTAL_BYTES = 64 * 2**20
_LOG_BYTES = 2**20  # per stage; the end of the log is kept


def write_json(path: Path, value: Any) -> None:
    """Write a readable JSON file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    aside.write_text(json.dumps(value, indent=1, default=str) + "\n", encoding="utf-8")
    os.replace(aside, path)


def read_json(path: Path) -> Any:
    """The content of a JSON file, or None if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def tail(path: Path, max_bytes: int = _LOG_BYTES) -> str:
    """The end of a text file, from the start of a line; empty if there is no such file."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        cut = file.tell() > max_bytes
        file.seek(-min(file.tell(), max_bytes), os.SEEK_END)
        text = file.read().decode(errors="replace").replace("\r", "\n")
    return text.partition("\n")[2] if cut else text


def join_logs(logs: Iterable[Path], target: Path) -> None:
    """Write the ends of all logs that exist into one file."""
    parts = [f"===== {path.stem} =====\n{tail(path)}" for path in logs if path.is_file()]
    aside = target.with_name(f"{target.name}.tmp")
    aside.write_text("\n".join(parts)[: MAX_BYTES // 4], encoding="utf-8")
    os.replace(aside, target)


def over_limits(folder: Path) -> list[str]:
    """What in `folder` exceeds the limits: `MAX_FILES` files, each below `MAX_BYTES`, and `MAX_TOTAL_BYTES` in all."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    problems = [f"{name} has {size} bytes" for name, size in sizes.items() if size >= MAX_BYTES]
    if len(sizes) > MAX_FILES:
        problems.append(f"{len(sizes)} files, {MAX_FILES} are allowed")
    if (total := sum(sizes.values())) > MAX_TOTAL_BYTES:
        problems.append(f"{total} bytes in all, {MAX_TOTAL_BYTES} are allowed")
    return problems
