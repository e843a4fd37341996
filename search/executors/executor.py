"""The base class of executors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from glit_models.errors import SearchError

__all__ = ["Executor", "Report", "TaskLostError"]

Report = dict[str, Any]  # from a worker: "result", "error" (one line), or "stopped" (why it stopped early)


class TaskLostError(Exception):
    """A task's process or machine was lost, and the engine does not restart the task."""


class Executor(ABC):
    """Passes tasks to an engine. Abstract.

    Args:
        run: runs the task of a given name on a worker, which must have the package and access to the search's folder;
            it can be pickled.
        folder: folder of the search.
        workers: number of tasks to run at once; None for the engine's default.
        options: options of the engine.

    Attributes:
        num_workers: number of tasks to run at once, set inside a `with` block.

    Raises:
        SearchError: on invalid options.
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
        """Connect to the engine; returns `num_workers`. Raises SearchError within seconds if it is not available."""

    @abstractmethod
    def submit(self, name: str) -> Any:
        """Make a worker call `run` with the name of a task; returns a handle at once. The engine may queue the task."""

    @abstractmethod
    def poll(self, handle: Any) -> Report | None:
        """The return value of `run`, or None if it has not finished. Does not wait.

        Raises:
            TaskLostError: if its process or machine was lost. The task is resubmitted, up to a few times.
            SearchError: if a retry is useless.
        """

    @abstractmethod
    def stop(self, handles: Sequence[Any]) -> None:
        """Ask these tasks to save and exit, by SIGTERM or SIGINT to their processes, and wait until they have."""

    def close(self) -> None:  # noqa: B027 - most have nothing to give back
        """Release the resources that `start` acquired."""
