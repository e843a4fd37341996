"""What a long job tells on the terminal: lines and progress bars, on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

from ..errors import printable

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

__all__ = ["progress_bar", "say", "track"]

T = TypeVar("T")


def say(line: str) -> None:
    """Print a line to stderr at once, with what a terminal would act upon escaped."""
    print(printable(line), file=sys.stderr, flush=True)


def progress_bar(*columns: str | ProgressColumn, shown: bool = True) -> Progress:
    """A progress bar with these columns; silent if not `shown`, or where stderr is not a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    return Progress(*columns, console=Console(stderr=True), disable=not shown or not sys.stderr.isatty())


def track(items: Iterable[T], description: str) -> Iterable[T]:
    """The items, with a progress bar over them that disappears at the end; silent where stderr is not a terminal."""
    from rich.console import Console
    from rich.progress import track

    return track(
        items, description=description, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
    )
