"""Tasks: the work of a search that any process can do which sees the search's folder.

A task is a kind and plain values. Done twice it gives the same, and one that was killed goes on from its files. What a
kind does stands in `work`; a search does its tasks itself, or an executor's workers do (`dispatch`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from glit_models.errors import SearchError
from glit_models.runs.files import write_json

__all__ = ["KINDS", "Task", "read_json", "task_folder"]

KINDS: dict[str, Callable[..., Any]] = {}  # kind -> function of a `RunContext` and the arguments; returns plain values


@final
@dataclass(frozen=True)
class Task:
    """A part of a search's work.

    Attributes:
        kind: a key of `KINDS`.
        arguments: of its function, as they stand in JSON. Paths are relative to the search's folder.
        title: what it is, for messages.
        is_collective: whether all processes that `accelerate launch` started do it together.
    """

    kind: str
    arguments: dict[str, Any]
    title: str
    is_collective: bool = False

    @property
    def name(self) -> str:
        """Of its folder; the same for the same work."""
        content = json.dumps([self.kind, self.arguments], sort_keys=True)
        return f"{self.kind}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"

    def write(self, folder: Path, origin: dict[str, Any]) -> None:
        """Write it into a search's folder. `origin`: what a worker has to know of the process that asks."""
        path = task_folder(folder, self.name) / "task.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**asdict(self), "origin": origin})


def task_folder(folder: Path, name: str) -> Path:
    """Where a task is, in a search's folder."""
    return folder / "tasks" / name


def read_json(path: Path) -> Any:
    """Read a file of JSON. Raises SearchError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SearchError(
            f"{path} is damaged ({error}); delete it, and the same command makes it again from the rest"
        ) from None
