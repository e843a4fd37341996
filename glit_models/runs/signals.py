"""Detect when a run should stop: after a signal, or at its time limit."""

from __future__ import annotations

import math
import signal
import time
from types import FrameType, TracebackType
from typing import Any, final

from ..errors import Argument, RunError

__all__ = ["StopRequest"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@final
class StopRequest:
    """Records SIGTERM and SIGINT inside a `with` block, and the end of the run's time limit.

    The first signal requests a stop, so that the run can save and exit. The second raises KeyboardInterrupt.

    Args:
        max_minutes: time limit of the block; None for no limit.

    Raises:
        RunError: if `max_minutes` is negative or not a finite number.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        if max_minutes is not None and not 0 <= max_minutes < math.inf:
            raise RunError(Argument("max_minutes"), f" must be a number of minutes from 0, got {max_minutes:g}")
        self.max_minutes = max_minutes
        self.signal: str | None = None  # the name of the first signal
        self._started = time.monotonic()
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        self._started = time.monotonic()
        self._previous = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name

    @property
    def minutes_left(self) -> float | None:
        """Minutes until the limit, at least 0; None without a limit."""
        if self.max_minutes is None:
            return None
        return max(self.max_minutes - (time.monotonic() - self._started) / 60, 0.0)

    @property
    def is_late(self) -> bool:
        """Whether the time limit has passed."""
        return self.minutes_left == 0

    @property
    def exit_status(self) -> int:
        """Exit status of the command after a stop: 128 + the number of the signal, or 3 at the time limit."""
        return 3 if self.signal is None else 128 + signal.Signals[self.signal]

    @property
    def reason(self) -> str:
        """Why the run stops, for a message."""
        if self.signal is not None:
            return self.signal
        if self.max_minutes is not None:
            return f"the limit of {self.max_minutes:g} minutes"
        return "another process of the run"  # that got the signal
