"""The engine `local`: processes on this machine, in Python's process pool."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from multiprocessing.queues import SimpleQueue
from typing import Any, final

import torch

from glit_models.errors import SearchError

from .executor import Executor, Report, TaskLostError

__all__ = ["LocalExecutor"]


@final
class LocalExecutor(Executor):
    """Persistent processes, so that each loads the data and a supernet only once. Takes no options.

    They divide the threads of this machine evenly, unless OMP_NUM_THREADS is set, and are assigned GPUs in turn. They
    exit when this process ends for any reason.
    """

    def start(self) -> int:
        """Start nothing yet: a process is started with the first task that needs it."""
        if self.options:
            raise SearchError(f"engine local takes no options, got {', '.join(self.options)}")
        self.num_workers = self.workers or os.cpu_count() or 1
        self._make_pool()
        return self.num_workers

    def _make_pool(self) -> None:
        spawning = multiprocessing.get_context("spawn")
        places: SimpleQueue[int] = spawning.SimpleQueue()
        for place in range(1, self.num_workers + 1):
            places.put(place)
        reader, self._writer = spawning.Pipe(duplex=False)
        threads = max((os.cpu_count() or 1) // self.num_workers, 1)
        self._pool = ProcessPoolExecutor(
            self.num_workers, spawning, _begin, (places, reader, threads, torch.cuda.device_count())
        )

    def submit(self, name: str) -> tuple[ProcessPoolExecutor, Future[Report] | None]:
        """See `Executor`."""
        try:
            return self._pool, self._pool.submit(_call, self.run, name)
        except BrokenProcessPool:
            return self._pool, None

    def poll(self, handle: tuple[ProcessPoolExecutor, Future[Report] | None]) -> Report | None:
        """See `Executor`. One lost process breaks the whole pool, which is replaced by a new one."""
        pool, future = handle
        if future is not None and not future.done():
            return None
        try:
            if future is not None:
                return future.result()
        except BrokenProcessPool:
            pass
        if pool is self._pool:
            self.close()
            self._make_pool()
        raise TaskLostError("a process of this machine was killed")

    def stop(self, handles: Sequence[Any]) -> None:
        """See `Executor`."""
        for _, future in handles:
            if future is not None:
                future.cancel()
        self.close()

    def close(self) -> None:
        """Let all processes exit, and wait for them."""
        self._writer.close()
        self._pool.shutdown(cancel_futures=True)


def _begin(places: SimpleQueue[int], reader: Connection, threads: int, num_gpus: int) -> None:
    """Initialise a process of the pool."""
    os.setsid()  # Ctrl-C only reaches the main process, which notifies this one
    place = places.get()
    lines = _Lines(sys.stderr.buffer, line_buffering=True)
    lines.place = place
    sys.stderr = lines
    # When one process is lost, the pool sends SIGTERM to the others, perhaps a second one while they save.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    if num_gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(num_gpus)))).split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[(place - 1) % num_gpus]
    threading.Thread(target=_leave_at_the_end, args=(reader,), daemon=True).start()


_busy = threading.Lock()  # held while this process runs a task


def _call(run: Callable[[str], Report], name: str) -> Report:
    with _busy:
        return run(name)


def _leave_at_the_end(reader: Connection) -> None:
    """Wait until the other end is closed, by `close` or because its process ended; let the task save, then exit."""
    reader.poll(None)
    if not _busy.acquire(timeout=0.1):
        os.kill(os.getpid(), signal.SIGINT)
        _busy.acquire()
    os._exit(0)


class _Lines(io.TextIOWrapper):
    """stderr without progress bars, which would overwrite each other; every line is prefixed with its process."""

    place = 0

    def isatty(self) -> bool:
        return False

    def write(self, text: str) -> int:
        return super().write(text if text == "\n" else f"[worker {self.place}] {text}")
