"""The errors that a user can cause, each one line that names the thing and the way out.

The command line prints these and exits with status 2; anything else is a bug and keeps its traceback.
"""


class GlitError(Exception):
    """Base of every error that a user's input, files or network can cause."""


class SpecError(GlitError, ValueError):
    """An architecture that cannot be built: names the block, the field, the value and the bound."""


class WeightsError(GlitError, RuntimeError):
    """Weights that are missing, unreachable, damaged or do not fit the model."""


class DataError(GlitError, ValueError):
    """A picture, folder or data set that is missing or cannot be read."""


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


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type's name where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
