"""Stage compile: fill the compilers' caches for the following stages, with many networks at a time.

Compiling uses a single CPU core, and takes longer than all measurements. Parallel processes write their code to caches
on disk, where the measuring stages find it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from math import inf
from pathlib import Path

import torch

from .. import depthwise_uses
from ..depthwise_forms import FORMS
from ..performance import DEIT, GLIT
from .checkout import make_importable
from .choice import CURRENT
from .context import Context, Result
from .depthwise import KERNELS, one_layer, options_for
from .throughput import prepare
from .training import measure_rates

CUDA_ONLY = {"compile": ("Inductor's and Triton's code for the GPU, in the caches that later stages read",)}

_WORKERS = 12
_RESERVED_GIB = 16  # of the GPU's free memory, for the stage that runs at the same time


def run_compile(context: Context) -> Result:
    """Distribute the jobs to processes, longest first, until all are done or the time is up."""
    jobs = _jobs(context)
    if context.rehearse:
        for job in jobs:
            compile_job(job, context)
        return {"jobs": len(jobs), "done": len(jobs)}
    request = context.work / "requests" / "compile.json"
    waiting, running, failed = list(jobs), dict[str, subprocess.Popen[bytes]](), []
    memory = torch.cuda.mem_get_info(context.device)[0] / 2**30 - _RESERVED_GIB if torch.cuda.is_available() else inf
    workers = min(_WORKERS, max((os.cpu_count() or 2) - 2, 1))
    while waiting or running:
        for job, process in list(running.items()):
            if process.poll() is not None:
                del running[job]
                failed += [job] if process.returncode else []
        while len(running) < workers and (job := _next(waiting, running, memory)):
            waiting.remove(job)
            running[job] = subprocess.Popen([sys.executable, "-m", __name__, str(request), job])
        done = len(jobs) - len(waiting) - len(running)
        context.save({"jobs": len(jobs), "done": done, "failed": failed, "running": list(running)})
        time.sleep(0.2)
    return {"jobs": len(jobs), "done": len(jobs), "failed": failed}


def _next(waiting: Iterable[str], running: Collection[str], memory: float) -> str | None:
    """The first job that fits into this many GiB of the GPU's memory, or any job if none is running."""
    free = memory - sum(map(_gib, running)) if running else inf
    return next((job for job in waiting if _gib(job) <= free), None)


def _gib(job: str) -> int:
    """GPU memory that a job needs, with a margin."""
    kind, *words = job.split("|")
    return {"pretrain": 30, "form": 8, "network": 10 if words and words[0] == "training" else 3}[kind]


def _jobs(context: Context) -> list[str]:
    """Names of the jobs: networks by use, and forms of the convolution."""
    if context.rehearse:
        return [f"network|inference|{GLIT}|compiled|2", "form|conv1d"]
    names = (GLIT, DEIT, *(f"{GLIT}, {form}" for form in FORMS if form.startswith("Triton")))
    networks = [f"network|{use}|{name}|compiled|256" for use in ("training", "inference") for name in names]
    graphs = [f"network|inference|{name}|CUDA graphs|1" for name in (GLIT, DEIT)]
    return ["pretrain", *networks, *(f"form|{form}" for form in FORMS), *graphs]


def compile_job(job: str, context: Context) -> None:
    """Compile a network or form by running it."""
    kind, *words = job.split("|")
    if kind == "pretrain":
        measure_rates("fractal_pretrain", [], context.work / "compile", context, CURRENT)
        return
    if kind == "network":
        use, name, way, batch = words
        with ExitStack() as stack:
            prepare(stack, (use, name, way, int(batch)), context)
        return
    for use in ("inference in chain",) if context.rehearse else depthwise_uses.FLOORS:
        options = options_for(context, use, "eager" if context.rehearse else "compiled")
        options.forms, options.rounds = words, 1
        for spec in (context.spec(),) if "chain" in use else (context.spec(), one_layer(KERNELS[0])):
            list(depthwise_uses.measured(options, spec))


if __name__ == "__main__":
    make_importable()
    torch.set_num_threads(1)
    compile_job(sys.argv[2], Context.from_json(Path(sys.argv[1]).read_text(encoding="utf-8")))
