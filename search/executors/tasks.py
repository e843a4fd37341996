"""Tasks: parts of a search's work that any process with access to the search's folder can run.

A task has a kind and plain values as arguments. It is repeatable, and a killed task resumes from its files. `work`
defines the kinds; a search runs its tasks itself, or on an executor's workers (`dispatch`).
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
        arguments: arguments of its function, as stored in JSON. Paths are relative to the search's folder.
        title: description for messages.
        is_collective: whether all processes that `accelerate launch` started run it together.
    """

    kind: str
    arguments: dict[str, Any]
    title: str
    is_collective: bool = False

    @property
    def name(self) -> str:
        """Name of its folder; the same for the same work."""
        content = json.dumps([self.kind, self.arguments], sort_keys=True)
        return f"{self.kind}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"

    def write(self, folder: Path, origin: dict[str, Any]) -> None:
        """Write the task into a search's folder. `origin`: what a worker needs to know about the calling process."""
        path = task_folder(folder, self.name) / "task.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**asdict(self), "origin": origin})


def task_folder(folder: Path, name: str) -> Path:
    """The folder of a task, in a search's folder."""
    return folder / "tasks" / name


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises SearchError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SearchError(
            f"{path} is damaged ({error}); delete it, and the same command makes it again from the rest"
        ) from None
