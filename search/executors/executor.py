"""The protocol of an executor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from glit_models.errors import SearchError

__all__ = ["Executor", "Report", "TaskLostError"]

Report = dict[str, Any]  # of a worker: "result", "error" (one line), or "stopped" (why it left before the end)


class TaskLostError(Exception):
    """A task's process or machine was lost, and the engine does not start the task again by itself."""


class Executor(ABC):
    """Hands tasks to an engine. Abstract.

    Args:
        run: does the task of a name on a worker, which must have the package and see the search's folder; it can be
            pickled.
        folder: of the search.
        workers: how many tasks are worth having at once; None: what the engine has.
        options: of the engine.

    Attributes:
        num_workers: how many tasks are worth having at once, known in a `with` block.

    Raises:
        SearchError: on options that cannot be.
    """

    num_workers: int = 1

    def __init__(
        self, run: Callable[[str], Report], folder: Path, workers: int | None, options: Mapping[str, Any]
    ) -> None:
        if workers is not None and workers < 1:
            raise SearchError(f"workers must be at least 1, got {workers}")
        self.run, self.folder, self.workers, self.options = run, folder, workers, dict(options)

    def __enter__(self) -> Executor:
        self.num_workers = self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def start(self) -> int:
        """Connect to the engine; returns `num_workers`. Raises SearchError, within seconds, if it is not there."""

    @abstractmethod
    def submit(self, name: str) -> Any:
        """Let a worker call `run` with the name of a task; returns a handle at once. The engine may queue it."""

    @abstractmethod
    def poll(self, handle: Any) -> Report | None:
        """What `run` returned, or None at once if it has not ended.

        Raises:
            TaskLostError: if it will not end: its process or machine was lost. It is submitted again, a few times.
            SearchError: if it is useless to try again.
        """

    @abstractmethod
    def stop(self, handles: Sequence[Any]) -> None:
        """Ask these tasks to save and leave, by SIGTERM or SIGINT in their processes, and wait until they have."""

    def close(self) -> None:  # noqa: B027 - most have nothing to give back
        """Give back what `start` took."""
