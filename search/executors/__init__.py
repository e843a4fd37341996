"""Executors run the tasks of a search: their base class, the engines, and the table of their names.

An engine places tasks on machines, assigns CPUs and GPUs to them, and restarts tasks of lost machines. A custom one is
named as `--engine my_module:MyExecutor`.
"""

from glit_models.errors import SearchError
from glit_models.extensions import Table

from .executor import Executor, Report, TaskLostError
from .local import LocalExecutor
from .ray import RayExecutor
from .slurm import SlurmExecutor

__all__ = ["EXECUTORS", "Executor", "Report", "TaskLostError"]

EXECUTORS: Table[type[Executor]] = Table("engine", Executor, SearchError)
"""The values of `--engine`, by name."""
EXECUTORS.register("local", LocalExecutor)
EXECUTORS.register("ray", RayExecutor)
EXECUTORS.register("slurm", SlurmExecutor)
