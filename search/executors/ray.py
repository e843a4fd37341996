"""The engine `ray`: a running Ray cluster."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, final

from glit_models.errors import SearchError, first_line, pip_install

from .executor import Executor, Report, TaskLostError

__all__ = ["RayExecutor"]

_SECONDS = 5  # timeout for a response
_WAIT_SECONDS = 120  # timeout for tasks to save and exit


@final
class RayExecutor(Executor):
    """Runs each task of the search as a Ray task; Ray places it and restarts it if its machine is lost.

    Args:
        options: `address` ('auto' by default: the cluster of this machine), and those of Ray's `options`. A task has
            `num_cpus=1`, `num_gpus=1` if the cluster has any, and up to `max_retries=3` retries.
    """

    def start(self) -> int:
        """See `Executor`."""
        if find_spec("ray") is None:
            raise SearchError(f"engine ray needs Ray: {pip_install('cluster')}")
        os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # Ray takes lines of different trainings for duplicates
        import ray

        options = dict(self.options)
        address = str(options.pop("address", "auto"))
        _check_reachable(address)
        try:
            ray.init(address=address, logging_level="ERROR", configure_logging=False)
            has = ray.cluster_resources()
            options = {"num_cpus": 1, "num_gpus": int(has.get("GPU", 0) > 0), "max_retries": 3, **options}
            self._call = ray.remote(_call).options(scheduling_strategy="SPREAD", **options)
        except Exception as error:  # Ray's errors have no common base class
            raise SearchError(f"no Ray cluster at {address}: {first_line(error)}") from None
        needs = {"CPU": options["num_cpus"], "GPU": options["num_gpus"]}
        fitting = min((int(has.get(name, 0) / number) for name, number in needs.items() if number), default=1)
        return self.workers or max(fitting, 1)

    def submit(self, name: str) -> Any:
        """See `Executor`."""
        return self._call.remote(self.run, name)

    def poll(self, handle: Any) -> Report | None:
        """See `Executor`."""
        import ray

        if not ray.wait([handle], timeout=0)[0]:
            return None
        try:
            report: Report = ray.get(handle)
        except ray.exceptions.RayTaskError as error:  # `run` does not raise; the package may be missing on the worker
            raise SearchError(f"a worker cannot begin its task: {first_line(error.cause)}") from None
        except ray.exceptions.RayError as error:
            raise TaskLostError(first_line(error)) from None
        return report

    def stop(self, handles: Sequence[Any]) -> None:
        """Let Ray interrupt the tasks, with SIGINT to their processes."""
        import ray

        for handle in handles:
            ray.cancel(handle)
        if handles:
            ray.wait(list(handles), num_returns=len(handles), timeout=_WAIT_SECONDS)

    def close(self) -> None:
        """Disconnect from the cluster."""
        import ray

        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise SearchError if the cluster is not reachable: Ray would try for a minute and then end the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS).close()
    except (OSError, ValueError) as error:
        raise SearchError(f"no Ray cluster at {address}: {first_line(error)}") from None


def _call(run: Any, name: str) -> Report:
    report: Report = run(name)
    return report
