"""Send a search's tasks to an executor's workers, and collect their results."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch

import glit_models
from glit_models.errors import SearchError
from glit_models.extensions import IMPORTED

from . import Executor, Report, TaskLostError
from .tasks import Task

__all__ = ["dispatch", "own_versions"]

_TRIES = 4  # of a task that the engine does not restart
_SECONDS = 0.05  # between polls


def dispatch(
    executor: Executor,
    folder: Path,
    tasks: Sequence[Task],
    origin: dict[str, Any],
    check_stop: Callable[[], None],
    say: Callable[[str], None],
) -> list[Any]:
    """Run tasks on workers; returns their results in the same order.

    Args:
        folder: folder of the search.
        origin: what a worker needs to know about this process, besides its folder and its imports.
        check_stop: raises if the search is to stop. The workers then save and exit.
        say: called with a message for each finished task.

    Raises:
        SearchError: on the first task that fails. The others save and exit.
    """
    by_name = {task.name: task for task in tasks}
    here = {"versions": own_versions(), "cwd": os.getcwd(), "path": sys.path, "modules": list(IMPORTED)}
    _forget_others(folder, by_name)
    for task in by_name.values():
        task.write(folder, {**here, **origin})
    results: dict[str, Any] = {}
    losses = Counter[str]()
    handles: dict[str, Any] = {}
    try:
        for name in by_name:
            handles[name] = executor.submit(name)
        while handles:
            check_stop()
            ended = {name: report for name in handles if (report := _poll(executor, handles[name])) is not None}
            for name, report in ended.items():
                del handles[name]
                title = by_name[name].title
                if "error" in report:
                    raise SearchError(report["error"])
                if "result" in report:
                    results[name] = report["result"]
                    if by_name[name].is_collective and len(by_name) > 1:
                        say(f"done, {len(results)} of {len(by_name)}: {title}")
                    continue
                losses[name] += 1
                if losses[name] == _TRIES:
                    raise SearchError(f"{title}: lost {_TRIES} times, the last time because {report['stopped']}")
                say(f"{title}: lost ({report['stopped']}); it is started again")
                handles[name] = executor.submit(name)
            if not ended:
                time.sleep(_SECONDS)
    except BaseException:
        executor.stop(list(handles.values()))
        raise
    return [results[task.name] for task in tasks]


def own_versions() -> dict[str, str]:
    """The versions of the packages that results depend on."""
    return {"glit_models": glit_models.__version__, "torch": torch.__version__}


def _poll(executor: Executor, handle: Any) -> Report | None:
    try:
        return executor.poll(handle)
    except TaskLostError as error:
        return {"stopped": str(error)}


def _forget_others(folder: Path, names: Collection[str]) -> None:
    """Remove the tasks of earlier calls, whose results are already in the search's files."""
    for path in (folder / "tasks").glob("*"):
        if path.name not in names:
            shutil.rmtree(path, ignore_errors=True)
