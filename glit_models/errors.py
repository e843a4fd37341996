"""Errors that a user can cause, with one-line messages that name the cause and the remedy.

The command line prints these and exits with status 2; any other error is a bug and keeps its traceback. A message that
names an argument contains an `Argument`: Python shows `force=True` where the command line prints `--force`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

# The exceptions that a user may catch; the rest is for the package's messages.
__all__ = [
    "DataError",
    "ExportError",
    "GlitError",
    "RecipeError",
    "RunError",
    "SearchError",
    "SpecError",
    "TrainingError",
    "WeightsError",
    "WriteError",
]


class Argument(NamedTuple):
    """An argument of a function, or a key of a recipe such as `data.root`, in a message.

    Attributes:
        name: name of the argument.
        value: suggested value; `...` stands for any value, None names only the argument.
    """

    name: str
    value: object = None

    def __str__(self) -> str:
        if self.value is None:
            return self.name
        return f"{self.name}={'...' if self.value is ... else repr(self.value)}"


class Message:
    """A line of text that may contain arguments.

    Args:
        parts: strings and arguments, which are joined without separators.
    """

    def __init__(self, *parts: str | Argument) -> None:
        self.parts = parts

    def __str__(self) -> str:
        return self.spelled(str)

    def spelled(self, spell: Callable[[Argument], str]) -> str:
        """The text in one line, with each argument formatted by `spell`, and with control characters escaped."""
        return printable("".join(part if isinstance(part, str) else spell(part) for part in self.parts))


class GlitError(Exception):
    """Base class of all errors that a user's input, files or network can cause.

    Args:
        parts: parts of the message; see `Message`.
    """

    def __init__(self, *parts: str | Argument) -> None:
        self.message = Message(*parts)
        super().__init__(str(self.message))


class SpecError(GlitError, ValueError):
    """An architecture cannot be built. Names the block, the field, the value and the bound."""


class WeightsError(GlitError, RuntimeError):
    """Weights are missing, unreachable, damaged or do not fit the model."""


class DataError(GlitError, ValueError):
    """An image, folder or data set is missing or cannot be read."""


class RecipeError(GlitError, ValueError):
    """A training recipe has an unknown key, a wrong type or an impossible combination."""


class WriteError(GlitError, OSError):
    """A file or folder cannot be written. Names it and the reason."""


class RunError(GlitError, RuntimeError):
    """A run's folder is in use, its state is damaged, or it cannot start on this machine."""


class TrainingError(RunError):
    """A training run cannot continue."""


class SearchError(GlitError, ValueError):
    """A search space, budget or search is invalid. Names the key, the value and the bound."""


class ExportError(GlitError, RuntimeError):
    """A model cannot be exported with these options, an exported file cannot be used, or a provider is unavailable."""


# What pip installs: "." is the checkout. CONTRIBUTING explains how this changes with a release on PyPI.
DISTRIBUTION = "."


def pip_install(extra: str) -> str:
    """The command that installs this package with one of its extras."""
    return f'pip install "{DISTRIBUTION}[{extra}]"{" in the checkout" if DISTRIBUTION == "." else ""}'


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the name of its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error reports too little memory, on the machine or on a GPU."""
    text = first_line(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def failure_of_machine(error: BaseException) -> GlitError | None:
    """Describe an error that is caused by the machine, not by a bug: too little memory, a process that died."""
    text = first_line(error)
    if is_out_of_memory(error):
        return GlitError(f"memory is short ({text[:200]}); a smaller batch, image or network takes less")
    if "DataLoader worker" in text and "Caught" not in text:  # torch has no exception type for this
        return DataError(
            "a process that loads data died; is memory short? try a lower ", Argument("num_workers"), f" ({text})"
        )
    if isinstance(error, OSError) and error.filename is not None:  # such as a name that is too long
        return GlitError(f"{str(error.filename)[:200]}: {error.strerror}")
    return None


# Control characters, marks that change the direction of text, and bytes of file names that are not UTF-8.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """One line of text that is safe on a terminal and in a file: characters in UNPRINTABLE are escaped as in Python."""
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
