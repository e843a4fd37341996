"""Where the tasks of a search are done: the protocol, the engines, and the table that names them.

An engine is what others wrote: it places tasks on machines, gives each its CPUs and GPUs, and starts those again whose
machine is lost. One of your own, in a file of yours, is named as `--engine my_module:MyExecutor`.
"""

from glit_models.errors import SearchError
from glit_models.extensions import Table

from .executor import Executor, Report, TaskLostError
from .local import LocalExecutor
from .ray import RayExecutor
from .slurm import SlurmExecutor

__all__ = ["EXECUTORS", "Executor", "Report", "TaskLostError"]

EXECUTORS: Table[type[Executor]] = Table("engine", Executor, SearchError)
"""The engines of `--engine`, by name."""
EXECUTORS.register("local", LocalExecutor)
EXECUTORS.register("ray", RayExecutor)
EXECUTORS.register("slurm", SlurmExecutor)
