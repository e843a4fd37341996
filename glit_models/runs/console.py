"""Print the messages and progress bars of long jobs to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TYPE_CHECKING, TypeVar

from ..errors import printable

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

__all__ = ["MinuteLines", "progress_bar", "say", "show_seconds", "track"]

T = TypeVar("T")
_EVERY = 60.0  # seconds


def say(line: str) -> None:
    """Print a line to stderr without buffering, with control characters escaped."""
    print(printable(line), file=sys.stderr, flush=True)


def progress_bar(*columns: str | ProgressColumn, shown: bool = True) -> Progress:
    """A progress bar with these columns; silent if not `shown`, or if stderr is not a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    return Progress(*columns, console=Console(stderr=True), disable=not shown or not sys.stderr.isatty())


class MinuteLines:
    """Print at most one line per minute, if stderr is not a terminal and shows no progress bar."""

    def __init__(self) -> None:
        self.said = time.monotonic()

    def say(self, line: str) -> None:
        """Print a line, unless there is a terminal or the last line is less than a minute old."""
        if time.monotonic() - self.said >= _EVERY and not sys.stderr.isatty():
            say(line)
            self.said = time.monotonic()


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """Iterate over the items with a progress bar that disappears at the end, or with `MinuteLines`.

    Args:
        total: number of items, if `items` has no length.
    """
    from rich.console import Console
    from rich.progress import track

    if sys.stderr.isatty():
        return track(items, total=total, description=description, console=Console(stderr=True), transient=True)
    return _with_lines(items, description, len(items) if total is None and isinstance(items, Sized) else total)


def _with_lines(items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    lines, began = MinuteLines(), time.monotonic()
    for number, item in enumerate(items):
        left = (time.monotonic() - began) * ((total or 0) - number) / max(number, 1)
        lines.say(
            f"{description}: {f'{100 * number // total} %' if total else number}"
            f"{f', {show_seconds(left)} left' if total and number else ''}"
        )
        yield item


def show_seconds(seconds: float) -> str:
    """Format a duration with its two largest units: 2 h 5 min, 4 min 10 s, 12 s."""
    whole = round(seconds)
    if whole >= 3600:
        minutes = round(seconds / 60)
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"
