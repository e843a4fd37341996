"""The errors that a user can cause, each one line that names the thing and the way out.

The command line prints these and exits with status 2; anything else is a bug and keeps its traceback. A message that
names an argument holds an `Argument`: Python reads `force=True` where the command line prints `--force`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

# What a user may catch; the rest is for the package's own messages.
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
    """An argument of a function, or a key of a recipe such as `data.root`, as a message names it.

    Attributes:
        name: of the argument.
        value: to give it; `...` stands for any, None names the argument alone.
    """

    name: str
    value: object = None

    def __str__(self) -> str:
        if self.value is None:
            return self.name
        return f"{self.name}={'...' if self.value is ... else repr(self.value)}"


class Message:
    """A line of text that may name arguments.

    Args:
        parts: joined as they are.
    """

    def __init__(self, *parts: str | Argument) -> None:
        self.parts = parts

    def __str__(self) -> str:
        return self.spelled(str)

    def spelled(self, spell: Callable[[Argument], str]) -> str:
        """The text in one line, with each argument as `spell` writes it, and what no terminal should see escaped."""
        return printable("".join(part if isinstance(part, str) else spell(part) for part in self.parts))


class GlitError(Exception):
    """Base of every error that a user's input, files or network can cause.

    Args:
        parts: of its message; see `Message`.
    """

    def __init__(self, *parts: str | Argument) -> None:
        self.message = Message(*parts)
        super().__init__(str(self.message))


class SpecError(GlitError, ValueError):
    """An architecture that cannot be built: names the block, the field, the value and the bound."""


class WeightsError(GlitError, RuntimeError):
    """Weights that are missing, unreachable, damaged or do not fit the model."""


class DataError(GlitError, ValueError):
    """An image, folder or data set that is missing or cannot be read."""


class RecipeError(GlitError, ValueError):
    """A training recipe with an unknown key, a wrong type or an impossible combination."""


class WriteError(GlitError, OSError):
    """A file or folder that cannot be written: names it and the reason."""


class RunError(GlitError, RuntimeError):
    """A run whose folder is in use, whose state is damaged, or that cannot start on this machine."""


class TrainingError(RunError):
    """A training run that cannot go on."""


class SearchError(GlitError, ValueError):
    """A search space, budget or search that cannot be: names the key, the value and the bound."""


class ExportError(GlitError, RuntimeError):
    """A model that cannot be exported so, an exported file that cannot be used, or a provider that is not there."""


# What pip installs: "." is the checkout. CONTRIBUTING says what becomes of it with the release on PyPI.
DISTRIBUTION = "."


def pip_install(extra: str) -> str:
    """The command that installs this package with one of its extras."""
    return f'pip install "{DISTRIBUTION}[{extra}]"{" in the checkout" if DISTRIBUTION == "." else ""}'


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type's name where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def failure_of_machine(error: BaseException) -> GlitError | None:
    """A failure that is no bug but of this machine, wherever it is raised: too little memory, a process that died."""
    text = first_line(error)
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return GlitError(f"memory is short ({text[:200]}); a smaller batch, image or network takes less")
    if "DataLoader worker" in text and "Caught" not in text:  # no exception of its own
        return DataError(
            "a process that loads data died; is memory short? try a lower ", Argument("num_workers"), f" ({text})"
        )
    if isinstance(error, OSError) and error.filename is not None:  # a name too long, a disk that cannot be read
        return GlitError(f"{str(error.filename)[:200]}: {error.strerror}")
    return None


# Control characters, marks that turn the direction of text, and bytes of file names that are no UTF-8.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """One line of text that is safe on a terminal and in a file: what is in UNPRINTABLE, as Python escapes it."""
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
