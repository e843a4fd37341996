"""Run a worker: execute a task by name, in the folder of a search that another process runs."""

from __future__ import annotations

import functools
import os
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

from glit_models.errors import GlitError, RunError, SearchError, first_line
from glit_models.extensions import import_module
from glit_models.runs.console import say
from glit_models.runs.files import write_json
from glit_models.runs.lock import lock_folder
from glit_models.runs.signals import StopRequest

from ..executors import EXECUTORS, Executor, Report
from ..executors.dispatch import own_versions
from ..executors.tasks import KINDS, read_json, task_folder
from ..recipe import read_recipe_of
from .context import Interrupted, RunContext
from .work import KEPT

__all__ = ["open_executor", "run_task"]


def open_executor(
    engine: str,
    folder: str | Path,
    workers: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Executor:
    """Open the executor for a search in a folder.

    Args:
        engine: a name of `EXECUTORS`, or `my_module:MyExecutor`.
        folder: folder of the search, with the same path on all machines.
        workers: number of tasks to run at once; None for the engine's default.
        options: options of the engine, see `Executor`.

    Raises:
        SearchError: if there is no such engine, or its options are invalid.
    """
    folder = Path(folder).absolute()
    return EXECUTORS.find(engine)(partial(run_task, str(folder)), folder, workers, options or {})


def run_task(folder: str, name: str) -> Report:
    """Run a task and report its result; never raises. Other output of the task is in the search's folder."""
    host = socket.gethostname()
    try:
        return {"result": _run(Path(folder), name)}
    except Interrupted as why:
        return {"stopped": f"{host}: {why}"}
    except GlitError as error:
        return {"error": f"{host}: {error}"}
    except Exception as error:  # a bug; the caller gets a message, and the worker's log has the traceback
        traceback.print_exc()
        return {"error": f"{host}: {type(error).__name__}: {first_line(error)}"}


def _run(folder: Path, name: str) -> Any:
    path = task_folder(folder, name)
    if not path.is_dir():
        raise SearchError(f"{path} is not there; all machines must see the search's folder at the same place")
    task = read_json(path / "task.json")
    origin = task["origin"]
    _check_versions(origin["versions"])
    if Path(origin["cwd"]).is_dir():
        os.chdir(origin["cwd"])
    sys.path.extend(entry for entry in origin["path"] if entry not in sys.path)
    for module in origin["modules"]:
        import_module(module, f"--import {module}", SearchError)
    context = _open_context(folder, origin["device"], origin["command"])
    context.stop = StopRequest()
    with context.stop, _lock(path, context):
        result = path / "result.json"
        if result.is_file():
            return read_json(result)
        if task["is_collective"]:
            say(task["title"])
        done = KINDS[task["kind"]](context, **task["arguments"])
        if task["kind"] in KEPT:
            write_json(result, done)
        return done


def _check_versions(wanted: Mapping[str, str]) -> None:
    versions = own_versions()
    for package, version in wanted.items():
        if versions[package] != version:
            raise SearchError(
                f"{package} is {versions[package]} here, and {version} where the search was started; they must be equal"
            )


@functools.lru_cache(maxsize=1)
def _open_context(folder: Path, device: str | None, command: str | None) -> RunContext:
    return RunContext(read_recipe_of(folder), folder, device, None, command)


def _lock(folder: Path, context: RunContext) -> IO[str]:
    """Wait for another process that runs the same task, for example on a machine that seemed to be lost."""
    said = False
    while True:
        try:
            return lock_folder(folder)
        except RunError:
            context.check_stop(together=False)
            if not said:
                say(f"glit: waiting for another process that does the task in {folder}")
            said = True
            time.sleep(0.5)
