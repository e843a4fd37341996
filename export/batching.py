"""Dynamic batching: requests that arrive together share a run of the model.

One thread runs the model. It takes the first waiting request, and the requests that arrive within a short delay.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple, final

import numpy as np

__all__ = ["Batcher"]


class _Job(NamedTuple):
    images: np.ndarray
    answer: Future[np.ndarray]


@final
class Batcher:
    """Runs a function on batches of images from several callers.

    Args:
        run: maps images [B, ...] to rows [B, K].
        max_batch: maximum number of images per run.
        max_delay: seconds that a request waits for others to join it.
        max_waiting: maximum number of waiting requests.

    Attributes:
        runs: number of calls of `run`.
    """

    def __init__(
        self, run: Callable[[np.ndarray], np.ndarray], max_batch: int, max_delay: float, max_waiting: int = 256
    ) -> None:
        self.runs = 0
        self._run, self._max_batch, self._max_delay = run, max_batch, max_delay
        self._waiting: queue.Queue[_Job | None] = queue.Queue(max_waiting)
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._thread.start()

    def submit(self, images: np.ndarray) -> Future[np.ndarray]:
        """Return the rows [B, K] of images [B, ...], B at most `max_batch`, when they are computed.

        Raises:
            queue.Full: if `max_waiting` requests are already waiting.
        """
        job = _Job(images, Future())
        self._waiting.put_nowait(job)
        return job.answer

    def close(self) -> None:
        """Process the waiting requests, then end the thread."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        job = self._waiting.get()
        while job is not None:
            jobs, job = self._gather(job)
            # Skip requests whose callers gave up; images of one shape share a run.
            jobs = [job for job in jobs if job.answer.set_running_or_notify_cancel()]
            for shape in dict.fromkeys(job.images.shape[1:] for job in jobs):
                self._answer([job for job in jobs if job.images.shape[1:] == shape])
            job = self._waiting.get() if job is _NOTHING else job

    def _gather(self, first: _Job) -> tuple[list[_Job], _Job | None]:
        """A batch, and the next request if it did not fit: `_NOTHING` if there is none, None at the end."""
        jobs, count = [first], len(first.images)
        end = time.monotonic() + self._max_delay
        while count < self._max_batch:
            try:
                job = self._waiting.get(timeout=max(end - time.monotonic(), 0))
            except queue.Empty:
                break
            if job is None or count + len(job.images) > self._max_batch:
                return jobs, job
            jobs.append(job)
            count += len(job.images)
        return jobs, _NOTHING

    def _answer(self, jobs: Sequence[_Job]) -> None:
        try:
            self.runs += 1
            rows = self._run(np.concatenate([job.images for job in jobs]))
        except Exception as error:  # each caller gets it; the thread continues
            for job in jobs:
                job.answer.set_exception(error)
            return
        for job in jobs:
            job.answer.set_result(rows[: len(job.images)])
            rows = rows[len(job.images) :]


_NOTHING = _Job(np.empty(0), Future())
