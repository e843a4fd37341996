"""The engine `slurm`: jobs on a Slurm cluster, through submitit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, final

from glit_models.errors import SearchError, first_line, pip_install

from .executor import Executor, Report, TaskLostError

__all__ = ["SlurmExecutor"]

_WORKERS = 8
_WAIT_SECONDS = 120  # timeout for jobs to save and exit


@final
class SlurmExecutor(Executor):
    """Runs each task of the search as a job, which is requeued if it is preempted or reaches its time limit.

    Args:
        options: parameters of `submitit.AutoExecutor`: `timeout_min` (240 by default), `gpus_per_node`,
            `cpus_per_task`, `mem_gb`, `slurm_partition`, ... `cluster=local` runs jobs on this machine.
    """

    def start(self) -> int:
        """See `Executor`."""
        if find_spec("submitit") is None:
            raise SearchError(f"engine slurm needs submitit: {pip_install('cluster')}")
        import submitit

        options = {"timeout_min": 240, **self.options}
        folder = self.folder / "slurm"
        try:
            self._executor = submitit.AutoExecutor(
                folder, cluster=options.pop("cluster", "slurm"), slurm_max_num_timeout=1000
            )  # fmt: skip
            self._executor.update_parameters(**options)
        except (RuntimeError, ValueError, TypeError, NameError, AssertionError) as error:
            raise SearchError(f"engine slurm: {first_line(error)}") from None
        return self.workers or _WORKERS

    def submit(self, name: str) -> Any:
        """See `Executor`."""
        from submitit.core.utils import FailedJobError

        try:
            return self._executor.submit(_Call(self.run, name))
        except FailedJobError as error:  # sbatch refuses an option
            raise SearchError(f"engine slurm: {str(error).strip().splitlines()[-1]}") from None

    def poll(self, handle: Any) -> Report | None:
        """See `Executor`."""
        from submitit.core.utils import FailedJobError, UncompletedJobError

        if not handle.done():
            return None
        try:
            report: Report = handle.result()
        except FailedJobError as error:  # `run` does not raise; the package may be missing on the node
            last = str(error).strip().splitlines()[-1]
            raise SearchError(f"job {handle.job_id} cannot begin its task: {last}") from None
        except UncompletedJobError as error:
            raise TaskLostError(f"job {handle.job_id}: {first_line(error)}") from None
        return report

    def stop(self, handles: Sequence[Any]) -> None:
        """Cancel the jobs: Slurm sends SIGTERM, and SIGKILL half a minute later."""
        for job in handles:
            job.cancel(check=False)
        end = time.monotonic() + _WAIT_SECONDS
        while time.monotonic() < end and not all(job.done() for job in handles):
            time.sleep(0.2)


class _Call:
    """A call that submitit may requeue: the task resumes from its files."""

    def __init__(self, run: Callable[[str], Report], name: str) -> None:
        self.run, self.name = run, name

    def __call__(self) -> Report:
        return self.run(self.name)

    def checkpoint(self) -> Any:
        """The call to queue instead of this one."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)
